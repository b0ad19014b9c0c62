"""In-place ops on fresh tensors become functional ones, so that every later pattern may read the graph as mathematics.

    b = div_(a, s); use(b)                               →  b = div(a, s); use(b)
    e = new_empty(...); copy_(e[..., :n], x);            →  e = cat([x, y], -1)
    copy_(e[..., n:], y); use(e)
    copy_(z[..., i:j], x); use(z)                        →  z' = slice_scatter(z, x, -1, i, j); use(z')

Legal when nothing else can see the tensor change: it is the result of an op of this graph that is no view, and no view
of it is read after the write. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import arg, aten, getitem_of, is_op, rank, same_shape, shape, slice_of

_ALLOCATIONS = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)
_VIEWING_LISTS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
)


def _is_in_place(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return target._schema.is_mutable and target._opname.endswith("_") and not target._opname.startswith("_")


def _is_view(node: Any) -> bool:
    """Whether a node's result may share memory with an input: any op whose schema says so, and items of view lists."""
    if (item := getitem_of(node)) is not None:
        return is_op(item[0], *_VIEWING_LISTS)
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload):
        return True
    aliases = any(r.alias_info is not None for r in target._schema.returns)
    return aliases or target in (aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.flatten.using_ints)


def _functional(node: fx.Node) -> Any:
    """The overload without the underscore, or None."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    packet = getattr(aten, target._opname[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def pattern(node: fx.Node) -> Match | None:
    if is_op(node, *_ALLOCATIONS) and (writes := _filling_writes(node)) is not None:
        return Match(writes[-1], (node, *writes), {"kind": "fill", "allocation": node, "writes": writes})
    if node.op != "call_function" or not _is_in_place(node):
        return None
    base = node.args[0]
    if is_op(node, aten.copy_.default) and (part := slice_of(base)) is not None:
        return Match(node, (node, base), {"kind": "scatter", "base": part[0], "part": part})
    return Match(node, (node,), {"kind": "op", "base": base})


def _filling_writes(allocation: fx.Node) -> list[fx.Node] | None:
    """The copies that fill an allocation from front to back along one dimension, before anything reads it."""
    writes: list[fx.Node] = []
    users = list(allocation.users)
    axis, position = None, 0
    for user in users:
        if (part := slice_of(user)) is None:
            break
        write = next(iter(user.users), None)
        if len(user.users) != 1 or not is_op(write, aten.copy_.default) or write.args[0] is not user:
            break
        _, dim, start, end, step = part
        if step != 1 or start != position or not isinstance(end, int) or (axis is not None and dim != axis):
            return None
        axis, position = dim, end
        writes.append(write)
    if axis is None or not writes or shape(allocation)[axis] != position:
        return None
    return writes if all(not user < writes[-1] for user in users[len(writes) :]) else None


def check(match: Match, ctx: PassContext) -> str | None:
    node = match.root
    if match["kind"] == "fill":
        return None
    base = match["base"]
    if not isinstance(base, fx.Node) or base.op != "call_function" or _is_view(base):
        return f"{node.target} writes into {base}, which other values may share memory with"
    if match["kind"] == "op" and _functional(node) is None:
        return f"{node.target} has no functional form"
    if match["kind"] == "op" and not same_shape(shape(node), shape(base)):
        return f"{node.target} changes the shape of {base}"
    for user in base.users:
        if user in match.nodes or not _is_view(user):
            continue
        if any(not reader < node for reader in user.users):
            return f"{user} is a view of {base} and is read after {node} changes it"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    node = match.root
    if match["kind"] == "fill":
        allocation = match["allocation"]
        parts, axis = [], 0
        for write in match["writes"]:
            view, source = write.args[:2]
            axis = arg(view, 1, "dim", 0) % rank(view)
            if not same_shape(shape(source), shape(view)):
                source = ctx.emit(
                    aten.expand.default,
                    source,
                    [-1 if s == t else t for s, t in zip(shape(source), shape(view), strict=True)],
                )
            parts.append(source)
        new = ctx.emit(aten.cat.default, parts, axis)
        for write in match["writes"]:
            view = write.args[0]
            ctx.graph.erase_node(write)
            ctx.graph.erase_node(view)
        return {allocation: new}
    base = match["base"]
    if match["kind"] == "scatter":
        _, dim, start, end, step = match["part"]
        new = ctx.emit(aten.slice_scatter.default, base, node.args[1], dim, start, end, step)
        view = node.args[0]
        node.replace_all_uses_with(ctx.emit(aten.slice.Tensor, new, dim, start, end, step))
        ctx.graph.erase_node(node)
        if not view.users:
            ctx.graph.erase_node(view)
    else:
        new = ctx.emit(_functional(node), *node.args, **node.kwargs)
        node.replace_all_uses_with(new)
        ctx.graph.erase_node(node)
    for user in list(base.users):
        if user is not new and not user < new:
            user.replace_input_with(base, new)
    return {}


PASS = Pass("functionalize", replacement, pattern=pattern, check=check)
