"""Gated linear units: activation times the other half becomes one op.

    gs.activation(gate, act) * up   or   sigmoid(gate) * up     →  gs.act_mul(gate, up, act)

``gate`` and ``up`` may be column slices of one merged product. Legal when both have one shape and dtype and nothing
else uses the activated gate. Exact: the op rounds after the activation as the model does.
"""

from __future__ import annotations

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, dtype, is_gs, is_mul, is_op, is_tensor, only_user, pairs, same_shape, shape


def pattern(node: fx.Node) -> Match | None:
    if not is_mul(node):
        return None
    for gated, up in pairs(node):
        if not is_tensor(up) or gated is up:
            continue
        if is_gs(gated, "activation"):
            return Match(node, (gated, node), {"gate": gated.args[0], "up": up, "act": gated.args[1]})
        if is_op(gated, aten.sigmoid.default):
            return Match(node, (gated, node), {"gate": gated.args[0], "up": up, "act": "sigmoid"})
    return None


def check(match: Match, ctx: PassContext) -> str | None:
    gate, up = match["gate"], match["up"]
    if not same_shape(shape(gate), shape(up)):
        return f"gate and up have shapes {list(shape(gate))} and {list(shape(up))}"
    if dtype(gate) != dtype(up):
        return f"gate is {dtype(gate)}, up is {dtype(up)}"
    if only_user(match.nodes[0]) is None:
        return "the activated gate is used elsewhere too"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    return {match.root: ctx.emit(torch.ops.gs.act_mul.default, match["gate"], match["up"], match["act"])}


PASS = Pass("glu", replacement, pattern=pattern, check=check)
