"""attention: fused and generic write, shared caches, groups, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphserve.compiler.pipeline import PIPELINE, PassReport
from graphserve.passes.attention import PASS as ATTENTION
from graphserve.passes.attention import read_heads, why_not_fused
from graphserve.passes.context import PassContext
from tests.passes.graphs import TOKENS, apply, graph_of, ops

HIDDEN, HEADS, KV, D = 24, 4, 2, 8
WEIGHTS = {"wq": torch.randn(HEADS * D, HIDDEN), "wk": torch.randn(KV * D, HIDDEN), "wv": torch.randn(KV * D, HIDDEN)}
INPUTS = {
    "x": torch.randn(1, TOKENS, HIDDEN),
    "input_ids": torch.zeros(1, TOKENS, dtype=torch.int64),
    "positions": torch.arange(TOKENS)[None],
}
FREQS = {"f": torch.rand(D // 2)}
NORMS = {"nq": torch.rand(D), "nk": torch.rand(D)}


def _split(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).view(1, -1, w.shape[0] // D, D).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: int = 0, window: int = 0, chunk: int = 0) -> Tensor:
    return torch.ops.gs.attention_trace(q, k, v, None, layer, D**-0.5, window, chunk, 0.0, True)


def _rotate(x: Tensor, positions: Tensor, f: Tensor) -> Tensor:
    angles = positions[:, :, None].float() * f
    full = torch.cat((angles, angles), dim=-1)[:, None]
    turned = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1)
    return x * full.cos() + turned * full.sin()


def _norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _rewritten(function, weights: dict[str, Tensor]) -> tuple[fx.GraphModule, PassReport, PassContext]:  # type: ignore[no-untyped-def]
    gm = graph_of(function, INPUTS, weights)
    reports, ctx = apply(gm, *PIPELINE)
    return gm, next(r for r in reports if r.name == "attention"), ctx


def test_norm_rotation_and_write_become_one_op_on_columns_of_one_product() -> None:
    def layer(x, ids, positions, wq, wk, wv, f, nq, nk):  # type: ignore[no-untyped-def]
        q, k = _norm(_split(x, wq), nq), _norm(_split(x, wk), nk)
        return _attend(_rotate(q, positions, f), _rotate(k, positions, f), _split(x, wv))

    gm, report, ctx = _rewritten(layer, WEIGHTS | FREQS | NORMS)
    left = ops(gm)
    assert report.matches == 1 and left.count("gs.rope_kv_write") == 1 and left.count("gs.paged_attention") == 1
    assert not {"gs.rope", "gs.rms_norm", "gs.kv_write", "aten.transpose", "gs.embedding"} & set(left)
    write = next(n for n in gm.graph.nodes if "rope_kv_write" in str(n.target))
    assert [a.meta.get("gs_weight") for a in write.args[3:5]] == list(ctx.init_graphs)
    spec = ctx.cache_layers[0]
    assert (spec.kv_heads, spec.k_dim, spec.v_dim, spec.dtype) == (KV, D, D, "float32")


@pytest.mark.parametrize("norm", [False, True])
def test_layers_without_rotation_write_plainly_or_after_the_norm(norm: bool) -> None:
    def layer(x, ids, positions, wq, wk, wv, nq, nk):  # type: ignore[no-untyped-def]
        q, k = _split(x, wq), _split(x, wk)
        if norm:
            q, k = _norm(q, nq), _norm(k, nk)
        return _attend(q, k, _split(x, wv))

    gm, report, _ = _rewritten(layer, WEIGHTS | NORMS)
    assert report.matches == 1
    assert ops(gm).count("gs.rope_kv_write" if norm else "gs.kv_write") == 1


def test_a_norm_after_the_rotation_is_not_fused() -> None:
    def layer(x, ids, positions, wq, wk, wv, f, nq, nk):  # type: ignore[no-untyped-def]
        q, k = _rotate(_split(x, wq), positions, f), _rotate(_split(x, wk), positions, f)
        return _attend(_norm(q, nq), _norm(k, nk), _split(x, wv))

    gm, report, _ = _rewritten(layer, WEIGHTS | FREQS | NORMS)
    left = ops(gm)
    assert report.matches == 1 and left.count("gs.rope") == 2
    assert left.index("gs.rope") < left.index("gs.paged_attention")


def test_queries_and_keys_rotated_differently_are_not_fused() -> None:
    def layer(x, ids, positions, wq, wk, wv, f, g):  # type: ignore[no-untyped-def]
        return _attend(_rotate(_split(x, wq), positions, f), _rotate(_split(x, wk), positions, g), _split(x, wv))

    gm, report, _ = _rewritten(layer, WEIGHTS | FREQS | {"g": torch.rand(D // 2)})
    assert report.matches == 1 and ops(gm).count("gs.kv_write") == 1 and ops(gm).count("gs.rope") == 2


def test_the_reasons_against_fusing_are_told() -> None:
    def layer(x, ids, positions, wq, wk, wv, f, nq, nk):  # type: ignore[no-untyped-def]
        q, k = _norm(_split(x, wq), nq), _norm(_split(x, wk), nk, eps=1e-5)
        return _attend(_rotate(q, positions, f), _rotate(k, positions, f), _split(x, wv))

    gm = graph_of(layer, INPUTS, WEIGHTS | FREQS | NORMS)
    without_attention = PIPELINE[: PIPELINE.index(ATTENTION)]
    apply(gm, *without_attention)
    trace = next(n for n in gm.graph.nodes if "attention_trace" in str(n.target))
    q, k, v = (read_heads(part, steps=True) for part in trace.args[:3])
    assert why_not_fused(q, k) == "q and k are normed with different constants"
    assert why_not_fused(v, v) == "q and k are neither normed nor rotated"
    assert why_not_fused(q, v) == "q and k are treated differently"


def test_a_layer_that_attends_to_another_layers_keys_reads_that_cache_and_writes_none() -> None:
    def layers(x, ids, positions, wq, wk, wv):  # type: ignore[no-untyped-def]
        k, v = _split(x, wk), _split(x, wv)
        first = _attend(_split(x, wq), k, v, layer=0)
        return first + _attend(_split(x * 2, wq), k, v, layer=1)

    gm, report, ctx = _rewritten(layers, WEIGHTS)
    assert report.matches == 2 and ops(gm).count("gs.kv_write") == 1
    assert [spec.shared_with for spec in ctx.cache_layers] == [None, 0]
    caches = [n.args[1].meta["gs_input"] for n in gm.graph.nodes if "paged_attention" in str(n.target)]
    assert caches == ["kv_k.0", "kv_k.0"]


def test_a_shared_cache_with_another_window_is_refused() -> None:
    def layers(x, ids, positions, wq, wk, wv):  # type: ignore[no-untyped-def]
        q, k, v = _split(x, wq), _split(x, wk), _split(x, wv)
        return _attend(q, k, v, layer=0, window=8) + _attend(q * 2, k, v, layer=1)

    gm, report, _ = _rewritten(layers, WEIGHTS)
    assert report.matches == 1
    assert "keeps other keys (window 8)" in report.refusals[0].reason


def test_mixed_dtypes_are_refused() -> None:
    def layer(x, ids, positions, wq, wk, wv):  # type: ignore[no-untyped-def]
        return _attend(_split(x, wq).bfloat16(), _split(x, wk), _split(x, wv))

    _, report, _ = _rewritten(layer, WEIGHTS)
    assert report.matches == 0 and "q, k and v are torch.bfloat16" in report.refusals[0].reason


def test_layers_are_grouped_by_window_and_chunk() -> None:
    def layers(x, ids, positions, wq, wk, wv):  # type: ignore[no-untyped-def]
        total = x.new_zeros(())
        for number, (window, chunk) in enumerate(((8, 0), (0, 0), (8, 0), (0, 16))):
            scaled = x * (number + 1.5)
            parts = (_split(scaled, w) for w in (wq, wk, wv))
            total = total + _attend(*parts, layer=number, window=window, chunk=chunk)
        return total

    gm, _, ctx = _rewritten(layers, WEIGHTS)
    assert ctx.cache_groups == {(8, None): [0, 2], (None, None): [1], (None, 16): [3]}
    tables = [n.args[3].meta["gs_input"] for n in gm.graph.nodes if "paged_attention" in str(n.target)]
    assert tables == ["block_table.0", "block_table.1", "block_table.0", "block_table.2"]


def test_a_second_run_finds_no_attention_to_lower() -> None:
    def layer(x, ids, positions, wq, wk, wv):  # type: ignore[no-untyped-def]
        return _attend(_split(x, wq), _split(x, wk), _split(x, wv))

    gm, _, _ = _rewritten(layer, WEIGHTS)
    assert apply(gm, ATTENTION)[0][0].matches == 0
