"""Elementwise ops that no other pass took become generated kernels: each group of them is one ``gs.pointwise``.

    a = x.to(float32); b = a * 0.5; y = softmax(b)      →  y = gs.pointwise([x], "v1 = to(v0) ...")[0]

A group is one op, its sink, and the elementwise ops (and reductions over the last dimension) that feed it, as long as
whoever else reads one of them comes after the sink; such a value is a further result. Legal when its tensors broadcast
to one shape. Exact: each op is computed in fp32 and rounded to the dtype that it has in the model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphserve.kernels.pointwise_program import GROUP_DTYPES, GROUP_OPS, ROW_OPS, Instruction, PointwiseProgram
from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import arg, dtype, is_static, is_tensor, rank, same_shape, same_size, shape

# A kernel of more inputs or instructions than this keeps too many values in registers.
MAX_INPUTS = 8
MAX_INSTRUCTIONS = 32


def find(graph: fx.Graph) -> Iterator[Match]:
    """Groups from the last sink to the first, so that each is as large as it can be."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for sink in reversed(list(graph.nodes)):
        if not sink._erased and _is_member(sink):
            members = _members(sink, position)
            yield Match(sink, tuple(sorted(members, key=position.__getitem__)))


def _is_member(node: Any) -> bool:
    """Whether a node may be part of a group."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not is_tensor(node):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    packet = node.target.overloadpacket.__name__
    if packet not in GROUP_OPS | ROW_OPS or node.target._schema.is_mutable:
        return False
    tensors = (node, *node.all_input_nodes)
    if not all(is_tensor(t) and _dtype_name(t) in GROUP_DTYPES for t in tensors):
        return False
    return (packet not in ROW_OPS or _is_over_rows(node)) and all(map(_is_plain, _arguments(node)))


def _is_over_rows(node: fx.Node) -> bool:
    """Whether a reduction or softmax takes whole rows and keeps their dimension."""
    x = node.args[0]
    dims = arg(node, 1, "dim")
    last = rank(x) - 1 if isinstance(x, fx.Node) else -1
    is_last = isinstance(dims, int | list | tuple) and [d % (last + 1) for d in _as_list(dims)] == [last]
    keeps = node.target.overloadpacket.__name__ == "_softmax" or rank(node) == last + 1
    return is_last and keeps


def _as_list(dims: int | list[int] | tuple[int, ...]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def _is_plain(argument: Any) -> bool:
    """Whether a non-tensor argument can be written into a program."""
    if isinstance(argument, (list, tuple)):
        return all(isinstance(item, int) for item in argument)
    return argument is None or isinstance(argument, (bool, int, float, str, torch.dtype, torch.memory_format))


def _arguments(node: fx.Node) -> list[Any]:
    return [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)]


def _members(sink: fx.Node, position: dict[fx.Node, int]) -> set[fx.Node]:
    members = {sink}
    pending = [sink]
    while pending:
        for producer in pending.pop().all_input_nodes:
            if producer not in members and _may_join(producer, members, sink, position):
                members.add(producer)
                pending.append(producer)
    return members


def _may_join(node: fx.Node, members: set[fx.Node], sink: fx.Node, position: dict[fx.Node, int]) -> bool:
    if not _is_member(node) or node.meta.get("gs_layer") != sink.meta.get("gs_layer"):
        return False
    others = [user for user in node.users if user not in members]
    # Groups made before this one are not in the list: they stand where a later sink stood.
    if any(user in position and position[user] < position[sink] for user in others):
        return False
    grown = members | {node}
    if len(grown) > MAX_INSTRUCTIONS or len(_inputs(grown)) > MAX_INPUTS:
        return False
    whole = _group_shape(grown)
    return whole is not None and (not others or _is_result(node, whole))


def _inputs(members: set[fx.Node]) -> list[fx.Node]:
    read = dict.fromkeys(n for member in sorted(members) for n in member.all_input_nodes)
    return [node for node in read if node not in members]


def _group_shape(members: set[fx.Node]) -> list[Any] | None:
    """The shape that all tensors of a group broadcast to, None if there is none."""
    nodes = [*members, *_inputs(members)]
    width = max(rank(node) for node in nodes)
    whole: list[Any] = [1] * width
    for node in nodes:
        for axis, size in enumerate(shape(node), start=width - rank(node)):
            if _is_one(whole[axis]):
                whole[axis] = size
            elif not _is_one(size) and not same_size(size, whole[axis]):
                return None
    return whole


def _is_one(size: Any) -> bool:
    return is_static(size) and size == 1


def _is_result(node: fx.Node, whole: list[Any]) -> bool:
    """Whether a kernel for the group can write this value: one element a place, or one a row."""
    return same_shape(shape(node), whole) or same_shape(shape(node), [*whole[:-1], 1])


def check(match: Match, ctx: PassContext) -> str | None:
    whole = _group_shape(set(match.nodes))
    if whole is None:
        return f"{match.root} joins shapes that do not broadcast to one"
    if not whole:
        return f"{match.root} is a single number"
    if not _is_result(match.root, whole):
        return f"{match.root} has shape {list(shape(match.root))} in a group of shape {whole}"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    members = match.nodes
    inputs = _inputs(set(members))
    number = {node: i for i, node in enumerate([*inputs, *members])}
    instructions = tuple(
        Instruction(
            str(node.target),
            tuple(_encode(a, number) for a in node.args),
            _dtype_name(node),
            {k: _encode(a, number) for k, a in node.kwargs.items() if k not in ("memory_format", "copy")},
        )
        for node in members
    )
    results = [node for node in members if node is match.root or any(u not in members for u in node.users)]
    program = PointwiseProgram(len(inputs), instructions, tuple(number[node] for node in results))
    both = ctx.emit(torch.ops.gs.pointwise.default, inputs, program.encode())
    return {node: ctx.emit(operator.getitem, both, i) for i, node in enumerate(results)}


def _encode(argument: Any, number: dict[fx.Node, int]) -> Any:
    if isinstance(argument, fx.Node):
        return {"v": number[argument]}
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, (list, tuple)):
        return list(argument)
    if isinstance(argument, float) and argument in (float("inf"), float("-inf")):
        return {"f": str(argument)}
    return argument


def _dtype_name(node: fx.Node) -> str:
    return str(dtype(node)).removeprefix("torch.")


PASS = Pass("pointwise_groups", replacement, find=find, check=check)
