"""Helpers to read a graph: what a node computes, from what, and for whom. Used by every pattern.

Patterns run on the canonical forms that ``canonical_forms.py`` leaves: casts are ``aten.to.dtype``, reshapes
``aten.reshape`` with at most one ``-1``, splits are slices, dimensions count from the front.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
SLICE_END = 2**63 - 1

Number = int | float


def is_op(node: Any, *overloads: Any) -> TypeGuard[fx.Node]:
    """Whether ``node`` calls one of ``overloads`` (``torch.ops`` overloads or functions)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in overloads


def is_gs(node: Any, *names: str) -> TypeGuard[fx.Node]:
    """Whether ``node`` calls ``torch.ops.gs.<name>``, by name, so that patterns need no registered op."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace == "gs" and node.target._schema.name.removeprefix("gs::") in names


def is_write(node: fx.Node) -> bool:
    """Whether a call changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Argument ``index`` of a call, given by position or by ``name``."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def value(node: fx.Node) -> torch.Tensor:
    """The node's fake tensor. Raises TypeError for a node whose value is not one tensor."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        raise TypeError(f"node {node} holds {type(val).__name__}, not a tensor")
    return val


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> torch.Size:
    return value(node).shape


def dtype(node: fx.Node) -> torch.dtype:
    return value(node).dtype


def rank(node: fx.Node) -> int:
    return value(node).dim()


def same_size(a: Any, b: Any) -> bool:
    """Whether two dimensions are known to be equal for every T. Adds no guard."""
    return bool(a is b or statically_known_true(a == b))


def same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_static(size: Any) -> bool:
    """Whether a dimension is a plain number, not a symbol."""
    return isinstance(size, int)


def static_shape(node: fx.Node) -> bool:
    return all(is_static(size) for size in shape(node))


def reshape_arg(sizes: Any) -> list[int] | None:
    """``sizes`` as a reshape argument that holds for every T: its one symbolic size becomes -1.

    None when two sizes are symbolic, or when a size of 0 makes -1 ambiguous.
    """
    out = [size if is_static(size) else -1 for size in sizes]
    return out if out.count(-1) <= 1 and not (-1 in out and 0 in out) else None


def token_axis(node: fx.Node) -> int | None:
    """The one symbolic dimension of a tensor, or None."""
    axes = [axis for axis, size in enumerate(shape(node)) if not is_static(size)]
    return axes[0] if len(axes) == 1 else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's user when it has exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_cast(node: Any) -> TypeGuard[fx.Node]:
    return is_op(node, aten.to.dtype)


def strip_cast(node: Any) -> Any:
    """What a cast (or several) was made from; the node itself when it is none."""
    while is_cast(node):
        node = node.args[0]
    return node


def is_weight(node: Any) -> TypeGuard[fx.Node]:
    """Whether a node is a parameter or buffer of the model."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and "gs_weight" in node.meta


def weight_name(node: fx.Node) -> str:
    name: str = node.meta["gs_weight"]
    return name


def is_mul(node: Any) -> TypeGuard[fx.Node]:
    return is_op(node, aten.mul.Tensor)


def is_add(node: Any) -> TypeGuard[fx.Node]:
    """A plain sum; ``alpha`` other than 1 is no plain sum."""
    return is_op(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1


def is_sub(node: Any) -> TypeGuard[fx.Node]:
    return is_op(node, aten.sub.Tensor) and node.kwargs.get("alpha", 1) == 1


def pairs(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Both orders of a commutative node's operands."""
    a, b = node.args[:2]
    yield a, b
    yield b, a


def with_number(node: Any, is_kind: Any) -> tuple[fx.Node, Number] | None:
    """``(x, c)`` of a commutative node (``is_kind`` says which) between a tensor and a Python number."""
    if is_kind(node):
        for x, c in pairs(node):
            if isinstance(x, fx.Node) and isinstance(c, (int, float)):
                return x, c
    return None


def squared(node: Any) -> fx.Node | None:
    """``x`` when the node is x², in any of its spellings."""
    if is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if is_op(node, aten.square.default):
        return node.args[0]
    if is_mul(node) and node.args[0] is node.args[1] and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def mean_last(node: Any) -> fx.Node | None:
    """``x`` when the node is the mean of x over its last dimension, kept as size 1."""
    if not is_op(node, aten.mean.dim) or not arg(node, 2, "keepdim", False):
        return None
    x, dims = node.args[:2]
    return x if tuple(d % rank(x) for d in dims) == (rank(x) - 1,) else None


def slice_of(node: Any) -> tuple[fx.Node, int, int, Any, int] | None:
    """``(x, dim, start, end, step)`` of a slice, with ``end`` cut to the dimension's size."""
    if not is_op(node, aten.slice.Tensor):
        return None
    x = node.args[0]
    dim = arg(node, 1, "dim", 0) % rank(x)
    start, end, step = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
    size = shape(x)[dim]
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0 and is_static(size):
        start += size
    if end is None or (isinstance(end, int) and end == SLICE_END):
        end = size
    elif isinstance(end, int) and is_static(size):
        end = min(end + size if end < 0 else end, size)
    return x, dim, start, end, step


def last_dim_slice(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """``(x, start, end, step)`` of a slice of the last dimension with fixed bounds."""
    found = slice_of(node)
    if found is None:
        return None
    x, dim, start, end, step = found
    if dim != rank(x) - 1 or not is_static(start) or not is_static(end):
        return None
    return x, start, end, step


def tensor_list(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors of a ``cat`` or ``stack``."""
    return tuple(node.args[0])


def is_last_dim(node: fx.Node, index: int, name: str, of: int) -> bool:
    """Whether a ``cat``-like node works on the last of ``of`` dimensions."""
    return bool(arg(node, index, name, 0) % of == of - 1)


def getitem_of(node: Any) -> tuple[fx.Node, int] | None:
    if is_op(node, operator.getitem) and isinstance(node.args[1], int):
        return node.args[0], node.args[1]
    return None


def module_path(*nodes: fx.Node) -> str:
    """Where in the model nodes come from, for reports: their module, else that of the weight next to them."""
    for node in nodes:
        if path := node.meta.get("gs_module"):
            return str(path)
        stack = node.meta.get("nn_module_stack")
        if stack:
            return str(list(stack.values())[-1][0])
    for node in nodes:
        for near in (*node.all_input_nodes, *node.users):
            if is_weight(near):
                return weight_name(near).rpartition(".")[0]
    return ""
