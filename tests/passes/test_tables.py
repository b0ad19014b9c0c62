"""position_tables, weight_constants and last_rows: what is computed once, and what must not be."""

import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.passes.common_subexpressions import PASS as COMMON_SUBEXPRESSIONS
from graphserve.passes.last_rows import PASS as LAST_ROWS
from graphserve.passes.linear import PASS as LINEAR
from graphserve.passes.position_tables import PASS as TABLES
from graphserve.passes.rms_norm import PASS as RMS_NORM
from graphserve.passes.weight_constants import PASS as CONSTANTS
from tests.passes.checks import ignores, refuses, rewrites
from tests.passes.graphs import TOKENS, apply, graph_of

D = 8


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 60, (1, TOKENS), generator=generator)  # not in order: rows are gathered, not sliced
    return {"x": torch.randn(1, TOKENS, D, generator=generator), "positions": positions}


FREQ = {"f": torch.rand(D // 2)}


def _cos(positions: Tensor, f: Tensor) -> Tensor:
    angles = positions[:, :, None].float() * f
    return torch.cat((angles, angles), dim=-1).cos() * 1.1


def test_cos_and_sin_are_gathered_from_one_table_each() -> None:
    def form(x: Tensor, positions: Tensor, f: Tensor) -> Tensor:
        angles = positions[:, :, None].float() * f
        return x * torch.cat((angles, angles), -1).cos() + torch.cat((angles, angles), -1).sin()

    left = rewrites(TABLES, form, _inputs(), FREQ, matches=2)
    assert left == ["gs.embedding", "aten.mul", "gs.embedding", "aten.add"]


def test_equal_tables_of_many_layers_are_one() -> None:
    def form(x: Tensor, positions: Tensor, f: Tensor) -> Tensor:
        return (x * _cos(positions, f)) * _cos(positions, f)

    assert rewrites(TABLES, form, _inputs(), FREQ, before=(COMMON_SUBEXPRESSIONS,)).count("gs.embedding") == 1


def test_products_with_the_positions_and_leading_ones_are_followed() -> None:
    def form(x: Tensor, positions: Tensor, f: Tensor) -> Tensor:
        angles = (f[None, :, None] @ positions[:, None, :].float()).transpose(1, 2)
        return x.view(1, 1, -1, D) * torch.cat((angles, angles), dim=-1).sin()[:, None]

    assert "aten.sin" not in rewrites(TABLES, form, _inputs(), FREQ)


def test_a_maximum_over_the_batch_stays_out_of_tables() -> None:
    def dynamic(x: Tensor, positions: Tensor, f: Tensor) -> Tensor:
        return x * (positions.max() * f).sum()

    ignores(TABLES, dynamic, _inputs(), FREQ)


def test_what_mixes_tokens_or_reads_the_sequence_stays_out_of_tables() -> None:
    ignores(TABLES, lambda x, positions: x + positions.cumsum(-1)[..., None], _inputs())
    ignores(TABLES, lambda x, positions: x * torch.cos(x + positions[..., None]), _inputs())
    gm = graph_of(lambda x, positions: x[0] @ positions.float().expand(D, -1), _inputs())  # [T, T]: tokens meet tokens
    reports, _ = apply(gm, TABLES)
    assert reports[0].matches == 0


def test_a_result_with_tokens_last_is_refused() -> None:
    def form(x: Tensor, positions: Tensor, f: Tensor) -> Tensor:
        return x + (f[None, :, None] * positions[:, None, :]).sum() + (f[None, :, None] * positions[:, None, :]).mean()

    refuses(TABLES, form, _inputs(), FREQ, reason="not laid out token by token")


def test_what_weights_alone_decide_is_computed_at_load() -> None:
    x = {"x": _inputs()["x"]}
    left = rewrites(CONSTANTS, lambda x, w: F.layer_norm(x, (D,), w + 1), x, {"w": torch.randn(D)})
    assert left == ["aten.layer_norm"]
    cast = rewrites(CONSTANTS, lambda x, w: F.linear(x, w.float().t()), x, {"w": torch.randn(D, D).bfloat16()})
    assert "aten.to" not in cast


def test_views_of_weights_and_mixed_values_are_not_constants() -> None:
    x = {"x": _inputs()["x"]}
    ignores(CONSTANTS, lambda x, w: x @ w.t(), x, {"w": torch.randn(D, D)})
    ignores(CONSTANTS, lambda x, w: (x + w) * 2, x, {"w": torch.randn(D)})


def _wanted() -> dict[str, Tensor]:
    return {"x": _inputs()["x"], "logits_indices": torch.tensor([3, 16, 0])}


def _head(x: Tensor, rows: Tensor, w: Tensor, n: Tensor) -> Tensor:
    normed = n * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    return (torch.tanh(F.linear(normed, w) / 30.0) * 30.0)[:, rows]


def test_rows_are_gathered_before_norm_head_and_softcap() -> None:
    weights = {"w": torch.randn(16, D), "n": torch.randn(D)}
    left = rewrites(LAST_ROWS, _head, _wanted(), weights, before=(RMS_NORM, LINEAR))
    assert left == ["aten.index_select", "gs.rms_norm", "gs.linear", "aten.div", "aten.tanh", "aten.mul"]


def test_the_gather_stops_at_what_is_not_row_wise_or_used_elsewhere() -> None:
    weights = {"w": torch.randn(16, D)}

    def mixing(x: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.softmax(1), w)[:, rows]

    assert rewrites(LAST_ROWS, mixing, _wanted(), weights, before=(LINEAR,))[0] == "aten.softmax"
    refuses(LAST_ROWS, lambda x, rows: x.softmax(1)[:, rows], _wanted(), reason="no row-wise op")

    def shared(x: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        logits = F.linear(x, w)
        return logits[:, rows] * logits.sum()

    refuses(LAST_ROWS, shared, _wanted(), weights, before=(LINEAR,), reason="used elsewhere")
    ignores(LAST_ROWS, lambda x, rows: x[0][rows], _wanted())
