"""Row-wise ops keep the model's shape [1, T, H]: a reshape to rows moves behind them.

    r = reshape(x [1, T, H], [-1, H]); y = gs.linear(r, w)          →  y = reshape(gs.linear(x, w), [-1, N])
    a + b, both reshaped that way                                   →  reshape(a' + b')

Moved behind one op after the other the reshape meets its inverse and both go (``no_ops.py``), and patterns see the sum
that a norm reads. Legal for ops that treat each row alone. Exact.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    aten,
    is_cast,
    is_gs,
    is_op,
    is_tensor,
    rank,
    reshape_arg,
    same_shape,
    same_size,
    shape,
)

_ONE_INPUT = ("linear", "rms_norm", "layer_norm", "activation")


def _unflattened(node: Any) -> fx.Node | None:
    """``x`` [1, T, H] when the node is x reshaped to [T, H]."""
    if not is_op(node, aten.reshape.default) or rank(node) != 2 or rank(node.args[0]) != 3:
        return None
    x: fx.Node = node.args[0]
    return x if shape(x)[0] == 1 and same_shape(shape(x)[1:], shape(node)) else None


def pattern(node: fx.Node) -> Match | None:
    if not is_tensor(node) or rank(node) != 2:
        return None
    if is_gs(node, *_ONE_INPUT) or is_cast(node):
        rows = node.args[:1]
    elif is_gs(node, "act_mul") or is_op(node, aten.add.Tensor, aten.mul.Tensor):
        rows = node.args[:2]
    else:
        return None
    sources = [_unflattened(row) for row in rows]
    if any(x is None for x in sources) or any(not same_shape(shape(x), shape(sources[0])) for x in sources):
        return None
    if not same_size(shape(node)[0], shape(rows[0])[0]):
        return None
    return Match(node, (*rows, node), {"sources": sources})


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    node, sources = match.root, match["sources"]
    moved = ctx.emit(node.target, *sources, *node.args[len(sources) :], **node.kwargs)
    return {node: ctx.emit(aten.reshape.default, moved, reshape_arg(shape(node)))}


PASS = Pass("row_reshape", replacement, pattern=pattern)
