"""One spelling for what ATen can say in several ways, so that later patterns need to know one.

    type_as(x, y), to.dtype_layout(x, ...), to.device(x, ...)   →  to.dtype(x, dtype)
    view, _unsafe_view, flatten, unflatten, view_as (x)         →  reshape(x, sizes), T written as -1
    split/chunk/split_with_sizes (x)[i]                         →  slice(x, dim, a, b)
    slice, transpose, unsqueeze, cat, stack, ... with dim < 0   →  the same with dim >= 0; a slice's end cut to size
    mul/add/sub/div.Scalar                                      →  the .Tensor overload
    min/max(x, y)                                               →  minimum/maximum(x, y)

Legal because each pair computes the same values on the same device. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    SLICE_END,
    arg,
    aten,
    dtype,
    getitem_of,
    is_op,
    is_static,
    is_tensor,
    rank,
    reshape_arg,
    shape,
    slice_of,
    value,
)

_CASTS = (
    aten.type_as.default,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
)
_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape.default,
)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_DIM_AT_1 = (aten.cat.default, aten.stack.default, aten.unsqueeze.default, aten.squeeze.dim)
_OVERLOADS = {
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def canonical_call(node: fx.Node) -> Call | None:
    """``(op, args, kwargs)`` of the canonical spelling, or None when the node has it already (or has none)."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    if is_op(node, *_CASTS):
        return _cast(node)
    if is_op(node, *_RESHAPES):
        sizes = reshape_arg(shape(node))
        if sizes is None or (node.target is aten.reshape.default and list(node.args[1]) == sizes):
            return None
        return aten.reshape.default, (node.args[0], sizes), {}
    if (item := getitem_of(node)) is not None and is_op(item[0], *_SPLITS):
        return _part(item[0], item[1])
    if is_op(node, aten.slice.Tensor):
        return _slice(node)
    if node.target in _OVERLOADS:
        return _OVERLOADS[node.target], node.args, dict(node.kwargs)
    if is_op(node, aten.transpose.int):
        dims = tuple(sorted(d % rank(node) for d in node.args[1:3]))
        return None if dims == node.args[1:3] else (node.target, (node.args[0], *dims), {})
    if is_op(node, *_DIM_AT_1):
        dim = arg(node, 1, "dim", 0)
        count = rank(node) + 1 if node.target is aten.squeeze.dim else rank(node)
        return None if dim >= 0 else (node.target, (node.args[0], dim % count), {})
    return None


def _cast(node: fx.Node) -> Call | None:
    x = node.args[0]
    source, result = value(x), value(node)
    kwargs = node.kwargs
    if source.device != result.device or kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    return aten.to.dtype, (x, dtype(node)), {}


def _slice(node: fx.Node) -> Call | None:
    found = slice_of(node)
    assert found is not None
    x, dim, start, end, step = found
    if isinstance(end, torch.SymInt):
        end = SLICE_END  # up to the end of a dimension that varies
    args = (x, dim, start, end) if step == 1 else (x, dim, start, end, step)
    return None if node.args == args else (aten.slice.Tensor, args, {})


def _part(split: fx.Node, index: int) -> Call | None:
    x = split.args[0]
    dim = arg(split, 2, "dim", 0) % rank(x)
    sizes = [part.shape[dim] for part in split.meta["val"]]
    if not all(is_static(size) for size in sizes):
        return None
    start = sum(sizes[:index])
    return aten.slice.Tensor, (x, dim, start, start + sizes[index]), {}


def pattern(node: fx.Node) -> Match | None:
    call = canonical_call(node)
    return Match(node, (node,), {"call": call}) if call is not None else None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    op, args, kwargs = match["call"]
    return {match.root: ctx.emit(op, *args, **kwargs)}


PASS = Pass("canonical_forms", replacement, pattern=pattern)
