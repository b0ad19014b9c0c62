"""Linear layers on 8-bit values, and their activations quantized where they are made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.compiler.pipeline import LIFT, fuse_passes
from graphserve.kernels import register_all
from graphserve.passes.activation import PASS as ACTIVATION
from graphserve.passes.add_norm import PASS as ADD_NORM
from graphserve.passes.base import Pass
from graphserve.passes.glu import PASS as GLU
from graphserve.passes.linear import PASS as LINEAR
from graphserve.passes.match import is_gs
from graphserve.passes.quantize_linears import SCHEMES, quantize_linears
from graphserve.passes.quantize_producers import PASS as PRODUCERS
from graphserve.passes.rms_norm import PASS as RMS_NORM
from graphserve.passes.weight_constants import PASS as WEIGHT_CONSTANTS
from tests.passes.checks import FIRST as CHECKED
from tests.passes.checks import Tensors, refuses, rewrites
from tests.passes.graphs import TOKENS, apply, eager, graph_of, model_graph, ops, packed_logits, run

register_all()

SCHEMES_BY_COST = sorted(SCHEMES, reverse=True)  # int8 first
INT8 = quantize_linears("int8")
X = {"x": torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))}
W = {"w": torch.randn(48, 32, generator=torch.Generator().manual_seed(1))}


def doubled(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).relu()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_becomes_a_product_of_quantized_rows(scheme: str) -> None:
    left = rewrites(quantize_linears(SCHEMES[scheme]), doubled, X, W, before=(LINEAR,), tolerance=0.05)
    assert left == ["gs.quantize_rows", "gs.quantize_weight", "gs.weight_scale", "gs.linear_w8a8", "aten.relu"]


def test_the_weight_is_quantized_at_load() -> None:
    both = (LINEAR, INT8)
    left = rewrites(WEIGHT_CONSTANTS, doubled, X, W, before=both, matches=2, tolerance=0.05)
    assert left == ["gs.quantize_rows", "gs.linear_w8a8", "aten.relu"]


def test_linears_of_one_input_share_its_quantized_rows() -> None:
    def function(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return doubled(x, w) + doubled(x, v)

    left = rewrites(INT8, function, X, W | {"v": W["w"].flip(0)}, before=(LINEAR,), matches=2, tolerance=0.05)
    assert left.count("gs.quantize_rows") == 1 and left.count("gs.linear_w8a8") == 2


def test_the_head_stays() -> None:
    refuses(INT8, lambda x, w: F.linear(x, w).float(), X, W, before=(LINEAR,), reason="logits")


def test_a_router_stays() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w).reshape(-1, 48).softmax(-1).topk(2)[0]

    refuses(INT8, function, X, W, before=(LINEAR,), reason="router")


def test_a_computed_weight_and_odd_rows_stay() -> None:
    refuses(INT8, lambda x, w: doubled(x, w * 2), X, W, before=(LINEAR,), reason="computed")
    odd = {"x": X["x"][..., :30].contiguous()}, {"w": W["w"][:, :30].contiguous()}
    refuses(INT8, doubled, *odd, before=(LINEAR,), reason="16-byte")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORM = {"norm": torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5}
FIRST: tuple[Pass, ...] = (RMS_NORM, LINEAR, ACTIVATION, GLU, INT8)


def fused(function: Callable[..., Tensor], inputs: Tensors, weights: Tensors, before: tuple[Pass, ...]) -> list[str]:
    """Ops left when producers quantize; the result has the bits of the graph where they do not."""
    apart, both = (graph_of(function, inputs, weights) for _ in range(2))
    _, apart_ctx = apply(apart, *CHECKED, *before)
    reports, ctx = apply(both, *CHECKED, *before, PRODUCERS, PRODUCERS)
    assert [r.matches for r in reports[-2:]] == [1, 0]
    assert torch.equal(run(both, ctx, inputs | weights), run(apart, apart_ctx, inputs | weights))
    return ops(both)


def test_a_norm_quantizes_what_it_makes() -> None:
    left = fused(lambda x, w, norm: doubled(rms_norm(x, norm), w), X, W | NORM, FIRST)
    assert left[0] == "gs.rms_norm_quant" and "gs.quantize_rows" not in left


def test_a_norm_after_an_add_keeps_the_sum() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor, norm: Tensor) -> Tensor:
        total = x + y
        return doubled(rms_norm(total, norm), w).sum(-1, keepdim=True) + total

    left = fused(function, X | {"y": X["x"].flip(1)}, W | NORM, (*FIRST, ADD_NORM))
    assert left[0] == "gs.add_rms_norm_quant" and "gs.quantize_rows" not in left


def test_a_gated_product_quantizes_what_it_makes() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return doubled(F.silu(x) * y, w)

    left = fused(function, X | {"y": X["x"].flip(1)}, W, FIRST)
    assert left[0] == "gs.act_mul_quant" and "gs.quantize_rows" not in left


def test_an_activation_that_others_read_is_quantized_apart() -> None:
    def function(x: Tensor, w: Tensor, norm: Tensor) -> Tensor:
        normed = rms_norm(x, norm)
        return doubled(normed, w).sum(-1, keepdim=True) + normed

    refuses(PRODUCERS, function, X, W | NORM, before=FIRST, reason="also read by")


def rounded(x: Tensor, dtype: str) -> Tensor:
    """What is left of a tensor's values when each row is quantized."""
    values, scale = torch.ops.gs.quantize_rows(x, dtype)
    return values.float() * scale


@pytest.mark.parametrize("scheme", [SCHEMES_BY_COST[0], pytest.param(SCHEMES_BY_COST[1], marks=pytest.mark.full)])
def test_a_whole_model_computes_with_quantized_values_in_every_layer(scheme: str) -> None:
    gm = model_graph("qwen3")
    _, ctx = apply(gm, *LIFT, *fuse_passes(scheme))
    found = ops(gm)
    layers = found.count("gs.act_mul_quant")
    # qkv, o, gate_up, down of each layer; the head stays.
    assert found.count("gs.linear_w8a8") == 4 * layers and found.count("gs.linear") == 1
    # In the last layer, attention's rows are gathered before they are quantized.
    assert found.count("gs.paged_attention_quant_rows") == layers - 1 and found.count("gs.paged_attention") == 1
    assert found.count("gs.quantize_rows") == 1
    assert not {"gs.quantize_weight", "gs.weight_scale", "gs.act_mul"} & set(found)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rounded(x, SCHEMES[scheme]), rounded(weight, SCHEMES[scheme]), bias)

    plain = model_graph("qwen3")
    _, plain_ctx = apply(plain, *LIFT, *fuse_passes(None))
    linears = [n for n in plain.graph.nodes if is_gs(n, "linear")]
    for node in linears[:-1]:
        node.target = linear
    requests = [[5, 6, 7, 8, 9], [11, 3]]
    expected = packed_logits(plain, plain_ctx, eager("qwen3"), requests)
    actual = packed_logits(gm, ctx, eager("qwen3"), requests)
    # A value that lies between two steps may go either way.
    assert float((actual - expected).abs().max()) <= 0.01 * float(expected.abs().max())
