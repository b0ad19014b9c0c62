"""Experts computed for every token and weighted by zero where not chosen become routed experts.

    values, ids = topk(logits, K);  scores = sigmoid(scatter(full(-inf), 1, ids, values))            [T, E]
    hidden = repeat(x, [E, 1]) * reshape(scores.T, [E*T, 1])                                        [E*T, H]
    sum(bmm(act_mul(bmm(reshape(hidden, [E, T, H]), gate_up)), down), dim 0)                        (Llama 4)
        →  gs.moe(x, ids, sigmoid(values), gate_up, down, weights_on_input=True)

Legal because an expert that was not chosen gets a zero input (sigmoid(-inf) is 0), and without biases gives zero back:
act(0) * 0 is 0. Cost then grows with chosen experts, not with all. The sum over experts is taken in another order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    arg,
    aten,
    dtype,
    getitem_of,
    is_gs,
    is_op,
    is_tensor,
    is_weight,
    last_dim_slice,
    only_user,
    pairs,
    rank,
    shape,
    strip_cast,
)


def pattern(node: fx.Node) -> Match | None:
    if not is_op(node, aten.sum.dim_IntList) or list(node.args[1]) != [0] or arg(node, 2, "keepdim", False):
        return None
    down = node.args[0]
    act_mul = down.args[0] if is_op(down, aten.bmm.default) else None
    if not is_gs(act_mul, "act_mul") or not is_weight(down.args[1]):
        return None
    gate, up = last_dim_slice(act_mul.args[0]), last_dim_slice(act_mul.args[1])
    if gate is None or up is None or gate[0] is not up[0] or not is_op(gate[0], aten.bmm.default):
        return None
    merged = gate[0]
    spread, gate_up = merged.args[:2]
    inner = shape(down.args[1])[1]
    if gate[1:] != (0, inner, 1) or up[1:] != (inner, 2 * inner, 1) or not is_weight(gate_up):
        return None
    product = spread.args[0] if is_op(spread, aten.reshape.default) else spread
    if not is_op(product, aten.mul.Tensor):
        return None
    for repeated, scores in pairs(product):
        if is_op(repeated, aten.repeat.default) and is_op(scores, aten.reshape.default):
            nodes = (repeated, scores, product, merged, act_mul, down, node)
            found = {"x": repeated.args[0], "repeats": repeated.args[1], "scores": scores.args[0]}
            return Match(node, nodes, {**found, "gate_up": gate_up, "down": down.args[1], "act": act_mul.args[2]})
    return None


def _routing(scores: Any) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """``transpose(cast(sigmoid(cast(scatter(full(-inf), 1, ids, values)))))`` as (sigmoid, scattered, ids, values)."""
    if not is_op(scores, aten.transpose.int) or {d % 2 for d in scores.args[1:3]} != {0, 1}:
        return None
    sigmoid = strip_cast(scores.args[0])
    scattered = strip_cast(sigmoid.args[0]) if is_op(sigmoid, aten.sigmoid.default) else None
    if not is_op(scattered, aten.scatter.src) or scattered.args[1] not in (1, -1):
        return None
    base, _, ids, values = scattered.args
    if not is_op(base, aten.full_like.default) or base.args[1] != -math.inf:
        return None
    return sigmoid, scattered, ids, values


def check(match: Match, ctx: PassContext) -> str | None:
    routing = _routing(match["scores"])
    if routing is None:
        return "the experts' weights are not sigmoid of chosen scores, with -inf for the others"
    _, _, ids, values = routing
    chosen, scores = getitem_of(ids), getitem_of(values)
    if chosen is None or scores is None or chosen[0] is not scores[0] or not is_op(chosen[0], aten.topk.default):
        return "ids and scores do not come from one topk"
    experts = shape(match["gate_up"])[0]
    if list(match["repeats"]) != [experts, 1] or not is_tensor(match["x"]) or rank(match["x"]) != 2:
        return f"the input is repeated {list(match['repeats'])} times, not once for each of {experts} experts"
    inside = match.nodes[:-1]
    if any(only_user(n) is None for n in inside if not is_op(n, aten.bmm.default)):
        return "an intermediate result is used elsewhere too"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    routing = _routing(match["scores"])
    assert routing is not None
    sigmoid, _, ids, values = routing
    wide, narrow = dtype(sigmoid), dtype(match["scores"])
    weights = values if dtype(values) == wide else ctx.emit(aten.to.dtype, values, wide)
    weights = ctx.emit(aten.sigmoid.default, weights)
    if narrow != wide:
        weights = ctx.emit(aten.to.dtype, weights, narrow)
    args = (match["x"], ids, weights, match["gate_up"], None, match["down"], None)
    return {
        match.root: ctx.emit(torch.ops.gs.moe.default, *args, match["act"], True, False, 0.0, 0.0, True, True)
    }  # fmt: skip


PASS = Pass("dense_experts", replacement, pattern=pattern, check=check, tier="approximate", tolerance=4.0)
