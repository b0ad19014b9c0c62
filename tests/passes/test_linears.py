"""linear, merge_linears, row_reshape, embedding: matches and near misses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.passes.embedding import PASS as EMBEDDING
from graphserve.passes.linear import PASS as LINEAR
from graphserve.passes.merge_linears import PASS as MERGE
from graphserve.passes.merge_linears import merged_name
from graphserve.passes.no_ops import PASS as NO_OPS
from graphserve.passes.row_reshape import PASS as ROW_RESHAPE
from tests.passes.checks import ignores, refuses, rewrites
from tests.passes.graphs import TOKENS, apply, graph_of

K, N = 8, 16


def _x(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.randn(1, TOKENS, K, generator=torch.Generator().manual_seed(0)).to(dtype)}


def _w(*names: str, rows: int = N) -> dict[str, Tensor]:
    return {n: torch.randn(rows, K, generator=torch.Generator().manual_seed(ord(n[0]))) for n in names}


def test_every_product_with_a_weight_becomes_gs_linear() -> None:
    bias = {"c": torch.randn(N)}
    stored_in_out = {"w": torch.randn(K, N)}
    assert rewrites(LINEAR, F.linear, _x(), _w("w")) == ["gs.linear"]
    assert rewrites(LINEAR, F.linear, _x(), _w("w") | bias) == ["gs.linear"]
    conv1d = lambda x, w, c: torch.addmm(c, x.view(-1, K), w).view(1, -1, N)  # noqa: E731
    assert rewrites(LINEAR, conv1d, _x(), stored_in_out | bias).count("gs.linear") == 1
    assert "gs.linear" in rewrites(LINEAR, lambda x, w: x @ w, _x(), stored_in_out)
    assert "aten.matmul" not in rewrites(LINEAR, lambda x, w: x @ w.t(), _x(), _w("w"))


def test_a_bias_added_afterwards_goes_into_the_linear() -> None:
    weights = _w("w") | {"c": torch.randn(N)}
    assert rewrites(LINEAR, lambda x, w, c: F.linear(x, w) + c, _x(), weights, matches=2) == ["gs.linear"]


def test_products_that_are_no_plain_linear_are_refused() -> None:
    scaled = lambda x, w, c: torch.addmm(c, x[0], w, beta=0.5)  # noqa: E731
    refuses(LINEAR, scaled, _x(), {"w": torch.randn(K, N), "c": torch.randn(N)}, reason="scales")
    computed = lambda x, w, c: torch.addmm(c, x[0], w.exp())  # noqa: E731
    refuses(LINEAR, computed, _x(), {"w": torch.randn(K, N), "c": torch.randn(N)}, reason="computed")
    ignores(LINEAR, lambda x: x @ x.transpose(1, 2), _x())


def test_linears_of_one_input_become_one_and_its_columns() -> None:
    def qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.linear(x, q) * F.linear(x, k) + F.linear(x, v)

    left = rewrites(MERGE, qkv, _x(), _w("q", "k", "v"), before=(LINEAR,))
    assert left.count("gs.linear") == 1 and left.count("aten.slice") == 3


def test_linears_with_and_without_bias_merge_apart() -> None:
    def block(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return F.linear(x, q, c) + F.linear(x, k) + F.linear(x, v, d) + F.linear(x, o)

    weights = _w("q", "k", "v", "o") | {"c": torch.randn(N), "d": torch.randn(N)}
    assert rewrites(MERGE, block, _x(), weights, matches=2, before=(LINEAR,)).count("gs.linear") == 2


def test_a_sibling_that_does_not_fit_leaves_the_others_to_merge() -> None:
    def block(x: Tensor, q: Tensor, k: Tensor, g: Tensor) -> Tensor:
        return F.linear(x, q) + F.linear(x, k) + F.linear(x, g)

    weights = _w("q", "k") | _w("g", rows=1)
    assert rewrites(MERGE, block, _x(), weights, before=(LINEAR,)).count("gs.linear") == 2


def test_merge_refuses_shared_odd_and_too_many_weights() -> None:
    tied = lambda x, q: F.linear(x, q) + F.linear(x * 2, q) * F.linear(x, q.exp())  # noqa: E731
    refuses(MERGE, tied, _x(), _w("q"), before=(LINEAR,), reason="used in more than one place")
    odd = lambda x, q, k: F.linear(x, q) + F.linear(x, k)  # noqa: E731
    refuses(MERGE, odd, _x(), _w("q", "k", rows=9), before=(LINEAR,), reason="not a multiple of 8")
    names = "abcdef"
    many = lambda x, *ws: sum(F.linear(x, w) for w in ws)  # noqa: E731
    refuses(MERGE, many, _x(), _w(*names), before=(LINEAR,), reason="more than 5")


def test_linears_of_different_inputs_do_not_merge() -> None:
    ignores(MERGE, lambda x, q, k: F.linear(x, q) + F.linear(x * 2, k), _x(), _w("q", "k"), before=(LINEAR,))


def test_merged_weights_are_named_by_their_parts() -> None:
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    assert merged_name(names) == "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"
    assert merged_name(["a.attn.q.weight", "a.mlp.up.weight"]) == "a.attn.q+mlp.up.weight"


def test_a_reshape_to_rows_moves_behind_row_wise_ops_and_vanishes() -> None:
    def block(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        rows = x.reshape(-1, K)
        return (rows + F.linear(F.linear(rows, w), v)).view(1, -1, K)

    weights = _w("w") | {"v": torch.randn(K, N)}
    left = rewrites(ROW_RESHAPE, block, _x(), weights, matches=3, before=(LINEAR,))
    gm = graph_of(block, _x(), weights)
    apply(gm, LINEAR, ROW_RESHAPE, NO_OPS)
    assert left.count("gs.linear") == 2


def test_row_reshape_leaves_ops_across_rows_alone() -> None:
    ignores(ROW_RESHAPE, lambda x: torch.softmax(x.reshape(-1, K), 0), _x())
    ignores(
        ROW_RESHAPE, lambda x, w: F.linear(x.transpose(1, 2).reshape(K, -1).t(), w), _x(), _w("w"), before=(LINEAR,)
    )


def test_embeddings_become_gs_embedding() -> None:
    ids = {"i": torch.randint(0, N, (1, TOKENS))}
    assert rewrites(EMBEDDING, lambda i, w: F.embedding(i, w, padding_idx=0), ids, _w("w")) == ["gs.embedding"]
    ignores(EMBEDDING, lambda i, w: w[i], ids, _w("w"))
    ignores(EMBEDDING, lambda i, w: w.index_select(0, i[0]), ids, _w("w"))
