"""What depends on weights alone is computed once at load.

    gs.linear(x, to(weight, fp32));  layer_norm(x, [D], weight + 1, bias)   →  the same on a weight ``const.N``

The subgraph goes to ``ctx.init_graphs["const.N"]``. Reshapes, transposes and slices of a weight alone cost nothing at
run time and stay. Legal because weights do not change between steps. Exact.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, is_op, is_tensor, is_weight, static_shape, value
from graphserve.passes.position_tables import extract

_VIEWS = (
    aten.reshape.default,
    aten.transpose.int,
    aten.t.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
)


def find(graph: fx.Graph) -> Iterator[Match]:
    constant: dict[fx.Node, bool] = {}  # node → whether anything was computed for it
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if is_weight(node):
            constant[node] = False
        elif _is_call(node) and inputs and all(i in constant for i in inputs):
            constant[node] = not is_op(node, *_VIEWS) or any(constant[i] for i in inputs)
    for node in list(constant):
        if constant[node] and any(user not in constant for user in node.users):
            yield Match(node, _sources(node))


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.is_impure() and is_tensor(node) and static_shape(node)


def _sources(node: fx.Node) -> tuple[fx.Node, ...]:
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return tuple(sorted(seen))


def check(match: Match, ctx: PassContext) -> str | None:
    made = [n for n in match.nodes if is_weight(n) and n.meta["gs_weight"] in ctx.init_graphs]
    return f"{made[0]} is itself computed at load" if made else None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    node = match.root
    name = f"const.{sum(key.startswith('const.') for key in ctx.init_graphs)}"
    ctx.init_graphs[name] = extract(match.nodes, node, None, ctx)
    return {node: ctx.placeholder(name, "gs_weight", ctx.empty(tuple(value(node).shape), value(node).dtype))}


PASS = Pass("weight_constants", replacement, find=find, check=check)
