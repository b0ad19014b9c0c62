"""Ops that return their input unchanged are removed.

    to(x, x.dtype), mul(x, 1.0), div(x, 1.0), add(x, 0), dropout(x, p, train=False), alias, detach, clone, contiguous,
    lift_fresh_copy, reshape/expand/slice to the same shape, transpose of a transpose                      →  x
    reshape(reshape(x)), to(to(x, wider), x.dtype)                                                         →  one, or x
    cat([x, y]) with y of size 0                                                                           →  x

Legal because the graph is functional here (see ``functionalize.py``), so a copy cannot be told from its source. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    arg,
    aten,
    dtype,
    is_cast,
    is_op,
    is_tensor,
    rank,
    reshape_arg,
    same_shape,
    shape,
    tensor_list,
    value,
)

_COPIES = (
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.positive.default,
)
_SAME_IF_SHAPE = (
    aten.expand.default,
    aten.slice.Tensor,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.broadcast_to.default,
)
# Every value of the first dtype is a value of the second, so a round trip through it changes nothing.
_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def unchanged_input(node: fx.Node) -> fx.Node | None:
    """The node that a no-op may be replaced by."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    if is_op(node, aten.cat.default):
        full = [x for x in tensor_list(node) if shape(x)[arg(node, 1, "dim", 0) % rank(node)] != 0]
        return full[0] if len(full) == 1 and same_shape(shape(full[0]), shape(node)) else None
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or not is_tensor(x):
        return None
    if is_op(node, aten.clone.default) and node.kwargs.get("memory_format") is torch.contiguous_format:
        return x if value(x).is_contiguous() else None  # a layout that a kernel asks for
    if is_op(node, *_COPIES):
        return x
    if is_op(node, aten.dropout.default, aten.feature_dropout.default) and node.args[2] is False:
        return x
    if is_cast(node):
        return _uncast(node, x)
    if not same_shape(shape(x), shape(node)) or dtype(x) != dtype(node):
        return None
    return x if is_op(node, *_SAME_IF_SHAPE) or _is_neutral(node) else None


def _uncast(node: fx.Node, x: fx.Node) -> fx.Node | None:
    if dtype(x) == dtype(node) and value(x).device == value(node).device:
        return x
    if is_cast(x) and dtype(x.args[0]) == dtype(node) and dtype(x) in _WIDER.get(dtype(node), ()):
        return x.args[0]
    return None


def _is_neutral(node: fx.Node) -> bool:
    other: Any = node.args[1] if len(node.args) > 1 else None
    if not isinstance(other, (int, float)) or isinstance(other, bool):
        return False
    if is_op(node, aten.mul.Tensor, aten.div.Tensor):
        return other == 1
    return is_op(node, aten.add.Tensor, aten.sub.Tensor) and other == 0


def pattern(node: fx.Node) -> Match | None:
    if (x := unchanged_input(node)) is not None:
        return Match(node, (node,), {"by": x})
    if is_op(node, aten.reshape.default) and is_op(node.args[0], aten.reshape.default):
        sizes, source = reshape_arg(shape(node)), node.args[0].args[0]
        if sizes is not None:
            return Match(node, (node,), {"source": source, "sizes": sizes})
    if is_op(node, aten.transpose.int) and is_op(inner := node.args[0], aten.transpose.int):
        return Match(node, (node,), {"by": inner.args[0]}) if inner.args[1:3] == node.args[1:3] else None
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    if "by" in match.captures:
        return {match.root: match["by"]}
    source = match["source"]
    if same_shape(shape(source), shape(match.root)):
        return {match.root: source}
    return {match.root: ctx.emit(aten.reshape.default, source, match["sizes"])}


PASS = Pass("no_ops", replacement, pattern=pattern)
