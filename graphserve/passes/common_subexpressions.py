"""Equal calls are made once.

    c1 = unsqueeze(cos, 1); ...; c2 = unsqueeze(cos, 1)   →  c1 for both

Legal for calls with no side effect and no randomness; the graph is functional here. Exact. Layers that each widen or
unsqueeze the shared cos and sin, or a norm that subtracts the mean twice, become the one form that patterns know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext


def _key(node: fx.Node) -> Any:
    """Equal for two nodes exactly when they make the same call; None for a call that may not be shared."""
    target = node.target
    if node.op != "call_function" or node.is_impure():
        return None
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        return None
    return target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(a) for a in argument)
    if isinstance(argument, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in argument.items()))
    if isinstance(argument, (bool, int, float)):
        return type(argument).__name__, repr(argument)  # 1, 1.0 and True are different arguments; so are 0.0 and -0.0
    return argument if isinstance(argument, fx.Node) else (type(argument).__name__, str(argument))


def find(graph: fx.Graph) -> Iterator[Match]:
    outside: dict[Any, fx.Node] = {}
    seen = outside
    for node in list(graph.nodes):
        # Between layer markers a call may share what was made outside, but not what another layer made: the layer is
        # going to be repeated alone.
        if node.target is torch.ops.gs.layer_begin.default:
            seen = {}
        elif node.target is torch.ops.gs.layer_end.default:
            seen = outside
        key = _key(node)
        if key is None:
            continue
        first = outside[key] if key in outside else seen.setdefault(key, node)
        if first is not node:
            yield Match(node, (node,), {"first": first})


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    return {match.root: match["first"]}


PASS = Pass("common_subexpressions", replacement, find=find)
