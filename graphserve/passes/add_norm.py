"""Residual add and the norm behind it become one op.

    h = a + b; y = gs.rms_norm(h, ...)      →  y, h = gs.add_rms_norm(x, residual, ...)
    h = a + b; y = gs.layer_norm(h, ...)    →  y, h = gs.add_layer_norm(x, residual, ...)

Of the two summands, the one computed later is ``x``. ``h`` may have any other users; a second norm of the same sum
stays as it is. A norm before the add (OLMo 2) is another graph and no match. Legal when the sum has one dtype and
shape with both summands and the norm's weights exist before it. Exact.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import dtype, is_add, is_gs, is_tensor, same_shape, shape


def pattern(node: fx.Node) -> Match | None:
    if is_gs(node, "rms_norm", "layer_norm") and is_add(node.args[0]):
        total = node.args[0]
        assert isinstance(total, fx.Node)
        return Match(node, (total, node), {"total": total})
    return None


def check(match: Match, ctx: PassContext) -> str | None:
    total = match["total"]
    for part in total.args:
        if not is_tensor(part):
            return f"{total} adds the number {part}"
        if dtype(part) != dtype(total):
            return f"{part} is {dtype(part)}, the sum {dtype(total)}"
        if not same_shape(shape(part), shape(total)):
            return f"{part} is broadcast from {list(shape(part))}"
    for weight in match.root.args[1:]:
        if isinstance(weight, fx.Node) and not weight < total:
            return f"{weight} is computed after the sum"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    total, norm = match["total"], match.root
    residual, x = sorted(total.args)
    gs = torch.ops.gs
    op = gs.add_rms_norm.default if is_gs(norm, "rms_norm") else gs.add_layer_norm.default
    with ctx.graph.inserting_before(total):
        both = ctx.emit(op, x, residual, *norm.args[1:])
        return {norm: ctx.emit(operator.getitem, both, 0), total: ctx.emit(operator.getitem, both, 1)}


PASS = Pass("add_norm", replacement, pattern=pattern, check=check)
