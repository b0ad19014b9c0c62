"""Prove that no token can influence another outside gs ops.

Requests are packed into one row of tokens ``[1, T]``. That is only right if everything but attention works on each
token by itself. This check follows the token dimension through the graph and refuses, by op and module, whatever
reduces, shifts, sorts or gathers along it, makes values out of the token count, or writes into a buffer of the model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphserve.errors import UnsupportedModelError

aten = torch.ops.aten

_RESHAPES = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten}
_PERMUTES = {
    aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze, aten.expand, aten.t, aten.movedim, aten.alias,
    aten.detach, aten.contiguous, aten.clone, aten.repeat, aten.expand_as, aten.numpy_T, aten.mT, aten.swapaxes,
    aten.lift_fresh_copy, aten.lift_fresh, aten.view_as_complex, aten.view_as_real, aten.dropout, aten.resolve_conj,
    aten.squeeze_, aten.unsqueeze_, aten.repeat_interleave, aten.view_as, aten.reshape_as, aten._conj,
    aten.real, aten.imag,
}  # fmt: skip
_ALONG_DIM = {  # op → position of its ``dim`` argument; the dimension must not be the token dimension
    aten.slice: 1, aten.select: 1, aten.split: 2, aten.split_with_sizes: 2, aten.chunk: 2, aten.unbind: 1,
    aten.narrow: 1, aten.softmax: 1, aten._softmax: 1, aten.log_softmax: 1, aten.mean: 1, aten.sum: 1, aten.amax: 1,
    aten.amin: 1, aten.max: 1, aten.min: 1, aten.argmax: 1, aten.cumsum: 1, aten.sort: 1, aten.topk: 2, aten.var: 1,
    aten.std: 1, aten.cat: 1, aten.stack: 1, aten.scatter: 1, aten.scatter_: 1, aten.scatter_add: 1,
    aten.scatter_add_: 1, aten.linalg_vector_norm: 2, aten.norm: 2, aten.argsort: 1, aten.logsumexp: 1, aten.glu: 1,
    aten.split_copy: 2, aten.tensor_split: 2, aten.flip: 1, aten.prod: 1, aten.masked_select: 1, aten.unfold: 1,
    aten.var_mean: 1, aten.index_select: 1, aten.cumprod: 1, aten.logcumsumexp: 1, aten.roll: 2, aten.diff: 2,
}  # fmt: skip
_DEFAULT_DIM = {aten.split: 0, aten.split_with_sizes: 0, aten.chunk: 0, aten.unbind: 0, aten.cat: 0, aten.stack: 0,
                aten.slice: 0, aten.topk: -1, aten.sort: -1, aten.glu: -1, aten.argsort: -1,
                aten.tensor_split: 0}  # fmt: skip
_NORMS = {aten.layer_norm, aten.rms_norm, aten.native_layer_norm}
_CREATORS = {aten.zeros, aten.ones, aten.full, aten.empty, aten.zeros_like, aten.ones_like, aten.full_like,
             aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty,
             aten.scalar_tensor}  # fmt: skip


def check_rowwise(gm: fx.GraphModule) -> None:
    """Raise unless every node outside gs ops works on each token by itself.

    Raises:
        UnsupportedModelError: names the op, its module and what it does across tokens.
    """
    ids = next((n for n in gm.graph.nodes if n.meta.get("gs_input") == "input_ids"), None)
    if ids is None:
        raise UnsupportedModelError("the graph does not read input_ids")
    symbol = ids.meta["val"].shape[1].node.expr
    outer: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            reason = _why_not(node, symbol, outer)
            if reason is not None:
                raise UnsupportedModelError(f"{_describe(node)}: {reason}; requests packed together would mix")


def _describe(node: fx.Node) -> str:
    where = f" in {node.meta['gs_module']} ({node.meta['gs_class']})" if "gs_module" in node.meta else ""
    return f"{node.target}{where}"


def token_dims(value: Any, symbol: Any) -> list[int]:
    """Dimensions of a fake tensor whose size depends on the token count."""
    if not isinstance(value, torch.Tensor):
        return []
    return [i for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt) and symbol in s.node.expr.free_symbols]


def _has_token_symbol(value: Any, symbol: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat)) and symbol in value.node.expr.free_symbols


def _why_not(node: fx.Node, symbol: Any, outer: dict[fx.Node, Any]) -> str | None:
    """Why ``node`` may mix tokens, or None.

    Args:
        outer: for a node whose token dimension was merged with dimensions before it (size ``outer * T * inner``), the
            outer factor; 1 for others. Updated for ``node``.
    """
    target = node.target
    if target is operator.getitem or not isinstance(target, torch._ops.OpOverload):
        return None
    if target.namespace == "gs":
        return None
    packet = target.overloadpacket
    inputs: list[fx.Node] = node.all_input_nodes
    token_inputs = [(n, token_dims(n.meta.get("val"), symbol)) for n in inputs]
    token_inputs = [(n, dims) for n, dims in token_inputs if dims]
    if target._schema.is_mutable and node.args and isinstance(node.args[0], fx.Node) and _is_buffer(node.args[0]):
        return "writes into a buffer of the model"
    if packet is aten.sym_size:
        return None
    if packet is aten.arange:
        return "numbers the tokens of the whole batch" if _mentions(node, symbol) else None
    if packet in _CREATORS:
        value_position = 1 if packet in (aten.full, aten.full_like) else 2 if packet is aten.new_full else None
        if value_position is not None and len(node.args) > value_position:
            value = node.args[value_position]
            if _has_token_symbol(value.meta.get("val") if isinstance(value, fx.Node) else value, symbol):
                return "makes a value out of the token count"
        return None
    if not token_inputs:
        return "makes a value out of the token count" if _pointwise(target) and _mentions(node, symbol) else None
    if any(len(dims) > 1 for _, dims in token_inputs) or len(_output_dims(node, symbol)) > 1:
        return "relates tokens to one another"
    if _pointwise(target):
        if any(_has_token_symbol(n.meta.get("val"), symbol) for n in inputs):
            return "computes with the token count"
        places = {(dims[0] - n.meta["val"].dim(), outer.get(n, 1)) for n, dims in token_inputs}
        if len(places) > 1:
            return "combines different tokens"
    if packet in _RESHAPES:
        return _reshape_reason(node, token_inputs[0], symbol, outer)
    factors = {outer.get(n, 1) for n, _ in token_inputs}
    if len(factors) > 1:
        return "combines different tokens"
    outer[node] = factors.pop()
    if packet is aten.repeat:
        source, dims = token_inputs[0]
        repeats = node.args[1]
        outer[node] *= repeats[dims[0] + len(repeats) - source.meta["val"].dim()]
    if _pointwise(target) or packet in _PERMUTES:
        return None
    if packet in _NORMS:
        normalized = node.args[1] if isinstance(node.args[1], Sequence) else ()
        value = token_inputs[0][0].meta["val"]
        return None if token_inputs[0][1][0] < value.dim() - len(normalized) else "normalises along the tokens"
    if packet is aten.embedding:
        return None
    if packet in (aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.einsum, aten.baddbmm):
        return _product_reason(node, packet, token_inputs, symbol)
    if packet is aten.index:
        return _index_reason(node, symbol)
    if packet is aten.gather:
        return _gather_reason(node, symbol)
    if packet in _ALONG_DIM:
        return _along_dim_reason(node, packet, token_inputs)
    return "is not known to work on each token by itself"


def _is_buffer(node: fx.Node) -> bool:
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


def _pointwise(target: torch._ops.OpOverload) -> bool:
    return torch.Tag.pointwise in target.tags or target.overloadpacket in (
        aten.to, aten._to_copy, aten.where, aten.type_as, aten.copy_, aten.masked_fill, aten.masked_fill_, aten.one_hot,
        aten.softplus, aten.dropout_, aten.polar, aten.complex, aten.copy, aten.float_power, aten.relu6, aten.selu,
        aten.prelu,
    )  # fmt: skip


def _mentions(node: fx.Node, symbol: Any) -> bool:
    found = False

    def look(argument: Any) -> Any:
        nonlocal found
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        found = found or _has_token_symbol(value, symbol)
        return argument

    fx.node.map_aggregate((node.args, node.kwargs), look)
    return found


def _output_dims(node: fx.Node, symbol: Any) -> list[int]:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return max((token_dims(v, symbol) for v in value), key=len, default=[])
    return token_dims(value, symbol)


def _reshape_reason(
    node: fx.Node, source: tuple[fx.Node, list[int]], symbol: Any, outer: dict[fx.Node, Any]
) -> str | None:
    before = _product(source[0].meta["val"].shape[: source[1][0]]) * outer.get(source[0], 1)
    dims = token_dims(node.meta["val"], symbol)
    if not dims:
        return "hides the token dimension"
    after = _product(node.meta["val"].shape[: dims[0]])
    if not (isinstance(before, int) and isinstance(after, int)) or before % after:
        return "scatters tokens over other dimensions"
    outer[node] = before // after
    coefficient = node.meta["val"].shape[dims[0]].node.expr.coeff(symbol, 1)
    return None if coefficient % outer[node] == 0 else "scatters tokens over other dimensions"


def _product(sizes: Iterable[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _product_reason(
    node: fx.Node, packet: Any, token_inputs: list[tuple[fx.Node, list[int]]], symbol: Any
) -> str | None:
    if packet is aten.einsum:
        return "is an einsum over tokens"
    output = _output_dims(node, symbol)
    if not output:
        return "sums over the tokens"
    a = node.args[1] if packet in (aten.addmm, aten.baddbmm) else node.args[0]
    b = node.args[2] if packet in (aten.addmm, aten.baddbmm) else node.args[1]
    by_node = dict(token_inputs)
    for operand, contracted in ((a, -1), (b, -1 if packet is aten.linear else -2)):
        if operand in by_node:
            value = operand.meta["val"]
            position = contracted + value.dim() if value.dim() > 1 else 0
            if position in by_node[operand]:
                return "sums over the tokens"
    return None


def _index_reason(node: fx.Node, symbol: Any) -> str | None:
    source, indices = node.args[0], node.args[1]
    dims = token_dims(source.meta["val"], symbol)
    if not dims:
        return None  # a table look-up
    index = indices[dims[0]] if len(indices) > dims[0] else None
    if index is None or index.meta.get("gs_input") == "logits_indices":
        return None
    return "gathers along the tokens"


def _gather_reason(node: fx.Node, symbol: Any) -> str | None:
    source, dim, index = node.args[:3]
    source_dims, index_dims = token_dims(source.meta["val"], symbol), token_dims(index.meta["val"], symbol)
    dim %= index.meta["val"].dim()
    if not source_dims:  # a table: right when the index says which row, not the token's place
        return None if index_dims == [dim] else "looks up a table by the place of the token"
    return None if index_dims == source_dims and dim not in source_dims else "gathers along the tokens"


def _along_dim_reason(node: fx.Node, packet: Any, token_inputs: list[tuple[fx.Node, list[int]]]) -> str | None:
    position = _ALONG_DIM[packet]
    dim = node.kwargs.get("dim", node.args[position] if len(node.args) > position else _DEFAULT_DIM.get(packet))
    for source, token in token_inputs:
        value = source.meta["val"]
        rank = value.dim() + (1 if packet is aten.stack else 0)
        if dim is None:
            return "reduces over the tokens"
        dims = [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
        if (not dims and packet not in (aten.squeeze,)) or token[0] in dims:
            if packet is aten.slice and _whole(node):
                continue
            if packet is aten.index_select and node.args[2].meta.get("gs_input") == "logits_indices":
                continue
            return "works along the tokens"
    return None


def _whole(node: fx.Node) -> bool:
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= 1 << 62))
