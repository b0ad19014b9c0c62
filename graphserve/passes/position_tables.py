"""What depends on positions alone is computed once for every position, and gathered per token.

    cos = to(cos(to(unsqueeze(positions)) * inv_freq) * scale, bf16)          (any such subgraph)
        →  gs.embedding(positions, table.N),   table.N [max_model_len, C] = the subgraph at positions 0..max_model_len-1

The subgraph goes to ``ctx.init_graphs["table.N"]`` and runs once at load. Legal when each op of it is elementwise along
the tokens: then row p of the table is what any token at position p would compute. Exact. Whatever reduces over the
tokens (dynamic rope takes their maximum) or reads the sequence is outside and ends the subgraph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import arg, aten, dtype, is_op, is_tensor, is_weight, rank, shape, token_axis

_ELEMENTWISE = {
    getattr(getattr(aten, name), overload)
    for name, overload in (
        *((n, "Tensor") for n in ("mul", "add", "sub", "div", "rsub", "remainder")),
        *((n, "default") for n in ("cos", "sin", "neg", "exp", "log", "log1p", "floor", "polar", "reciprocal", "abs")),
        *((n, "default") for n in ("ones_like", "zeros_like", "view_as_real", "real", "imag", "complex")),
        *((n, "default") for n in ("sqrt", "rsqrt")),
        ("to", "dtype"),
        ("pow", "Tensor_Scalar"),
        ("pow", "Scalar"),
        ("div", "Tensor_mode"),
        ("floor_divide", "default"),
    )
}
# Ops that work along one dimension: position and name of that argument, and its default.
_ALONG = {
    aten.cat.default: (1, "dim", 0),
    aten.slice.Tensor: (1, "dim", 0),
    aten.select.int: (1, "dim", None),
    aten.repeat_interleave.self_int: (2, "dim", None),
}
# Ops that move or add dimensions; the token dimension of the result is looked up by its symbol.
_MOVES = (aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.reshape.default, aten.expand.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def tokens_apart(node: fx.Node) -> bool:
    """Whether each token's part of the result depends on that token's part of the inputs only."""
    if node.op != "call_function" or not is_tensor(node) or token_axis(node) is None:
        return False
    if node.target in _ELEMENTWISE or is_op(node, *_MOVES):
        return True
    if node.target in _ALONG:
        index, name, default = _ALONG[node.target]
        dim = arg(node, index, name, default)
        x: Any = node.args[0]
        x = x[0] if isinstance(x, (list, tuple)) else x
        return dim is not None and dim % rank(x) != token_axis(x)
    if is_op(node, aten.stack.default):
        return True
    if is_op(node, *_PRODUCTS):
        a, b = node.args[:2]
        return isinstance(shape(a)[-1], int) and isinstance(shape(b)[-2], int)
    return False


def _subgraphs(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that depend on positions (and weights) alone, and nodes that depend on weights alone."""
    positional: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.meta.get("gs_input") == "positions":
                positional.add(node)
            elif is_weight(node):
                constant.add(node)
            continue
        inputs = node.all_input_nodes
        if not inputs or node.op != "call_function":
            continue
        if all(i in constant for i in inputs):
            constant.add(node)
        elif all(i in constant or i in positional for i in inputs) and tokens_apart(node):
            positional.add(node)
    return positional, constant


def find(graph: fx.Graph) -> Iterator[Match]:
    positional, constant = _subgraphs(graph)
    for node in list(graph.nodes):
        if node not in positional or node.op == "placeholder" or dtype(node).is_complex:
            continue
        if all(user in positional for user in node.users) or not dtype(node).is_floating_point:
            continue
        nodes = _ancestors(node, positional | constant)
        yield Match(node, nodes, {"inputs": tuple(n for n in nodes if n.op == "placeholder")})


def _ancestors(node: fx.Node, within: set[fx.Node]) -> tuple[fx.Node, ...]:
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen and current in within:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return tuple(sorted(seen))


def check(match: Match, ctx: PassContext) -> str | None:
    axis = token_axis(match.root)
    if axis is None or any(size != 1 for size in shape(match.root)[:axis]):
        return f"the result {list(shape(match.root))} is not laid out token by token"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    node = match.root
    axis = token_axis(node)
    assert axis is not None
    row = tuple(shape(node)[axis + 1 :])
    width = 1
    for size in row:
        width *= size
    name = f"table.{sum(key.startswith('table.') for key in ctx.init_graphs)}"
    ctx.init_graphs[name] = extract(match.nodes, node, [ctx.max_model_len, width], ctx)
    table = ctx.placeholder(name, "gs_weight", ctx.empty((ctx.max_model_len, width), dtype(node)))
    rows = ctx.emit(torch.ops.gs.embedding.default, ctx.step_input("positions"), table)
    sizes = [*([1] * axis), -1, *row]
    return {node: rows if sizes == [1, -1, width] else ctx.emit(aten.reshape.default, rows, sizes)}


def extract(nodes: tuple[fx.Node, ...], result: fx.Node, sizes: list[int] | None, ctx: PassContext) -> fx.GraphModule:
    """``nodes`` as a graph of their own, ``positions`` being [1, max_model_len], its result reshaped to ``sizes``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in [n for n in nodes if n.op == "placeholder"] + [n for n in nodes if n.op != "placeholder"]:
        copy = graph.node_copy(node, lambda n: copies[n])
        if node.meta.get("gs_input") == "positions":
            copy.meta["val"] = ctx.empty((1, ctx.max_model_len), torch.int64)
        elif node.op != "placeholder":
            copy.meta["val"] = ctx.fake_result(copy)
        copies[node] = copy
    out = copies[result]
    if sizes is not None:
        out = graph.call_function(aten.reshape.default, (out, sizes))
        out.meta["val"] = ctx.fake_result(out)
    graph.output(out)
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


PASS = Pass("position_tables", replacement, find=find, check=check)
