"""Activation functions become ``gs.activation``, whether the model calls them or spells them out.

    silu(x); x * sigmoid(x)                                                        →  gs.activation(x, "silu")
    gelu(x); x * 0.5 * (1 + erf(x / sqrt 2))                                       →  "gelu"
    gelu(x, "tanh"); 0.5 * x * (1 + tanh(sqrt(2/π) * (x + 0.044715 * x³)))         →  "gelu_tanh"
    x * sigmoid(1.702 * x)                                                         →  "quick_gelu"
    relu(x)                                                                        →  "relu"
    relu(x)²                                                                       →  "relu2"

Legal when nothing else uses the values in between. Approximate: a spelled-out form rounds after each of its steps, the
op once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    Number,
    aten,
    is_add,
    is_gs,
    is_mul,
    is_op,
    only_user,
    pairs,
    squared,
    with_number,
)

Found = tuple[fx.Node, str, tuple[fx.Node, ...]]


def _close(a: Number, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _times(node: Any, factor: float) -> fx.Node | None:
    found = with_number(node, is_mul)
    return found[0] if found is not None and _close(found[1], factor) else None


def _called(node: fx.Node) -> Found | None:
    if is_op(node, aten.silu.default):
        return node.args[0], "silu", ()
    if is_op(node, aten.relu.default):
        return node.args[0], "relu", ()
    if is_op(node, aten.gelu.default):
        return node.args[0], "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu", ()
    return None


def _squared_relu(node: fx.Node) -> Found | None:
    inner = squared(node)
    if is_op(inner, aten.relu.default) or (is_gs(inner, "activation") and inner.args[1] == "relu"):
        return inner.args[0], "relu2", (inner,)
    return None


def _sigmoid_product(node: fx.Node) -> Found | None:
    if not is_mul(node):
        return None
    for x, gate in pairs(node):
        if not is_op(gate, aten.sigmoid.default):
            continue
        if gate.args[0] is x:
            return x, "silu", (gate,)
        if _times(gate.args[0], 1.702) is x:
            return x, "quick_gelu", (gate, gate.args[0])
    return None


def _written_gelu(node: fx.Node) -> Found | None:
    """``half * (1 + f)`` with half = x/2 and f the tanh or erf of the gelu, or ``0.5 * (x * (1 + f))``."""
    if not is_mul(node):
        return None
    for half, one_plus in pairs(node):
        x = _times(half, 0.5)
        found = with_number(one_plus, is_add)
        if x is None or found is None or found[1] != 1:
            continue
        if (name := _gelu_core(found[0], x)) is not None:
            return x, name[0], (half, one_plus, found[0], *name[1])
    return None


def _gelu_core(f: fx.Node, x: fx.Node) -> tuple[str, tuple[fx.Node, ...]] | None:
    if is_op(f, aten.erf.default):
        argument = f.args[0]
        if _times(argument, math.sqrt(0.5)) is x:
            return "gelu", (argument,)
        if is_op(argument, aten.div.Tensor) and argument.args[0] is x and _close(argument.args[1], math.sqrt(2)):
            return "gelu", (argument,)
        return None
    if not is_op(f, aten.tanh.default):
        return None
    inner = _times(f.args[0], math.sqrt(2 / math.pi))
    if inner is None or not is_add(inner):
        return None
    for linear, cubic_term in pairs(inner):
        cubic = _times(cubic_term, 0.044715)
        if linear is x and is_op(cubic, aten.pow.Tensor_Scalar) and cubic.args == (x, 3):
            return "gelu_tanh", (f.args[0], inner, cubic_term, cubic)
    return None


def pattern(node: fx.Node) -> Match | None:
    for form in (_called, _squared_relu, _sigmoid_product, _written_gelu):
        if (found := form(node)) is not None:
            x, act, inner = found
            return Match(node, (*inner, node), {"x": x, "act": act})
    return None


def check(match: Match, ctx: PassContext) -> str | None:
    for inner in match.nodes[:-1]:
        if only_user(inner) is None and set(inner.users) - set(match.nodes):
            return f"{inner}, a part of {match['act']}, is used elsewhere too"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    return {match.root: ctx.emit(torch.ops.gs.activation.default, match["x"], match["act"])}


PASS = Pass("activation", replacement, pattern=pattern, check=check, tier="approximate", tolerance=4.0)
