"""Linear layers run on 8-bit values: weights quantized at load, activations at each step.

    gs.linear(x, w, bias)  →  q, s = gs.quantize_rows(x)
                              gs.linear_w8a8(q, s, gs.quantize_weight(w), gs.weight_scale(w), bias)

What is made of weights alone is moved to load time by ``weight_constants`` behind this pass, and the 16-bit weights are
freed there. One scale a token and one an output channel; sums in int32 or fp32. Left as they are: the head, whose
rounding shows in every logit, routers, whose rounding changes the choice of experts, and experts (``gs.moe``). This
pass changes results by more than rounding; it runs only where a user asks for it (``quantization``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, dtype, is_cast, is_gs, is_op, is_weight, shape

# Value of the option ``quantization`` → dtype of weights and activations.
SCHEMES = {"fp8_per_channel": "float8_e4m3fn", "int8_w8a8": "int8"}

# Relative error of one product: each operand is off by at most half a step of its row's largest value, 1/254 for int8
# and 1/16 of the value itself for e4m3, mostly of random sign. In units of bf16's eps.
_TOLERANCE = {"int8": 8.0, "float8_e4m3fn": 32.0}

_ROUTER_STEPS = (aten.reshape.default, aten.softmax.int, aten.sigmoid.default)
_HEAD_STEPS = (aten.reshape.default, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.slice.Tensor)


def quantize_linears(quantized: str) -> Pass:
    """The pass for one dtype of :data:`SCHEMES`."""

    def find(graph: fx.Graph) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_gs(node, "linear"):
                yield Match(node, (node,))

    def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
        gs, linear = torch.ops.gs, match.root
        x, weight, bias = linear.args
        # Linears that read one input and were not merged share its quantized rows.
        rows = next((user for user in x.users if is_gs(user, "quantize_rows")), None)
        if rows is None:
            rows = ctx.emit(gs.quantize_rows.default, x, quantized)
            values, scale = (ctx.emit(operator.getitem, rows, i) for i in (0, 1))
        else:
            values, scale = sorted(rows.users, key=lambda item: item.args[1])
        packed = ctx.emit(gs.quantize_weight.default, weight, quantized)
        channels = ctx.emit(gs.weight_scale.default, weight, quantized)
        name = str(dtype(linear)).removeprefix("torch.")
        return {linear: ctx.emit(gs.linear_w8a8.default, values, scale, packed, channels, bias, name)}

    return Pass(
        "quantize_linears", replacement, find=find, check=check, tier="approximate", tolerance=_TOLERANCE[quantized]
    )


def check(match: Match, ctx: PassContext) -> str | None:
    x, weight, _ = match.root.args
    if not is_weight(weight):
        return f"its weight {weight} is computed from others"
    if dtype(x) != dtype(weight) or not dtype(x).is_floating_point:
        return f"x is {dtype(x)}, the weight {dtype(weight)}"
    if shape(x)[-1] % 16:
        return f"rows of {shape(x)[-1]} values are no whole number of 16-byte loads"
    if _reaches(match.root, lambda n: n.op == "output", _HEAD_STEPS):
        return "it makes the logits"
    if _reaches(match.root, lambda n: is_gs(n, "route") or is_op(n, aten.topk.default), _ROUTER_STEPS):
        return "it is a router"
    return None


def _reaches(node: fx.Node, is_end: object, steps: tuple[object, ...]) -> bool:
    """Whether a user of ``node`` is an end, through ``steps`` and casts alone."""
    assert callable(is_end)
    for user in node.users:
        if is_end(user) or ((is_cast(user) or is_op(user, *steps)) and _reaches(user, is_end, steps)):
            return True
    return False
