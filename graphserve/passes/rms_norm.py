"""RMSNorm becomes one op.

    x32 = to(x, fp32); n = x32 * rsqrt(mean(x32², -1) + eps)                         (or x32 / sqrt, pow(..., -0.5))
    weight * to(n, x.dtype)                         →  gs.rms_norm(x, weight, eps, 0.0, weight_fp32=False)   (Llama)
    to(n * (1 + to(weight, fp32)), x.dtype)         →  gs.rms_norm(x, weight, eps, 1.0, weight_fp32=True)    (Gemma)
    to(n, x.dtype)                                  →  gs.rms_norm(x, None, eps, 0.0, False)
    aten.rms_norm(x, [D], weight, eps)              →  gs.rms_norm

The pattern starts at the reciprocal root and grows down as far as the norm goes. When the fp32 result itself has other
users, or the scale is not one weight of size [D], the part above it is still a norm of x32 without weight.

Legal when the mean runs over the last dimension only and in fp32. Approximate: the sum of squares may be taken in
another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    Number,
    arg,
    aten,
    dtype,
    is_add,
    is_cast,
    is_mul,
    is_op,
    is_weight,
    mean_last,
    only_user,
    pairs,
    rank,
    shape,
    squared,
    strip_cast,
    with_number,
)


def reciprocal_root(node: Any) -> fx.Node | None:
    """``v`` when the node is 1/sqrt(v)."""
    if is_op(node, aten.rsqrt.default):
        return node.args[0]
    if is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
        return node.args[0]
    if is_op(node, aten.reciprocal.default) and is_op(node.args[0], aten.sqrt.default):
        return node.args[0].args[0]
    if is_op(node, aten.div.Tensor) and node.args[0] == 1 and is_op(node.args[1], aten.sqrt.default):
        return node.args[1].args[0]
    return None


def scaled_by(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(v, product)`` where product = x * 1/sqrt(v) and the node is the reciprocal root (or the root divided by)."""
    user = only_user(node)
    if (v := reciprocal_root(node)) is not None:
        return (v, user) if user is not None and is_mul(user) else None
    if is_op(node, aten.sqrt.default) and is_op(user, aten.div.Tensor) and user.args[1] is node:
        return node.args[0], user
    return None


def grow_scale(n: fx.Node, x: fx.Node) -> tuple[fx.Node, Any, float, bool]:
    """Grows from the normed value ``n`` over casts and the scale.

    Returns:
        ``(last node, weight or None, offset, weight_fp32)``. The last node has ``x``'s dtype, or is ``n``.
    """
    want, user = dtype(x), only_user(n)
    if user is None:
        return n, None, 0.0, False
    if dtype(n) == want:
        scale = _scale_of(user, n, want)
        # A narrower weight is widened before the offset is added to it.
        return (user, *scale, dtype(scale[0]) != want) if scale is not None else (n, None, 0.0, False)
    if is_cast(user) and dtype(user) == want:
        below = only_user(user)
        scale = _scale_of(below, user, want) if below is not None else None
        return (below, *scale, False) if below is not None and scale is not None else (user, None, 0.0, False)
    scale, below = _scale_of(user, n, torch.float32), only_user(user)
    if scale is not None and below is not None and is_cast(below) and dtype(below) == want:
        return below, *scale, True
    return n, None, 0.0, False


def _scale_of(node: fx.Node, n: fx.Node, result: torch.dtype) -> tuple[fx.Node, float] | None:
    """``(weight, offset)`` when the node is ``(offset + weight) * n`` of dtype ``result``."""
    if not is_mul(node) or dtype(node) != result:
        return None
    for factor, other in pairs(node):
        if other is not n or not isinstance(factor, fx.Node):
            continue
        weight, offset = factor, 0.0
        shifted = with_number(strip_cast(factor), is_add)
        if shifted is not None and dtype(shifted[0]) in (result, torch.float32):
            weight, offset = shifted[0], float(shifted[1])
        weight = strip_cast(weight)
        if is_weight(weight) and rank(weight) == 1 and shape(weight)[0] == shape(n)[-1]:
            return weight, offset
    return None


def pattern(node: fx.Node) -> Match | None:
    if is_op(node, aten.rms_norm.default):
        return Match(node, (node,), {"x": node.args[0], "call": True})
    if (scaled := scaled_by(node)) is None:
        return None
    variance, n = scaled
    found = with_number(variance, is_add)
    mean, eps = found if found is not None else (variance, 0.0)
    square = mean_last(mean)
    x32 = squared(square) if square is not None else None
    if x32 is None or n.args[0 if n.args[0] is not node else 1] is not x32:
        return None
    nodes = tuple(dict.fromkeys((x32, square, mean, variance, node, n)))
    captures: dict[str, Any] = {"x32": x32, "n": n, "eps": float(eps), "call": False}
    return Match(n, nodes, captures)


def _eps_of(node: fx.Node) -> float:
    eps: Number | None = arg(node, 3, "eps")
    return float(torch.finfo(dtype(node.args[0])).eps if eps is None else eps)


def check(match: Match, ctx: PassContext) -> str | None:
    if match["call"]:
        node = match.root
        weight = arg(node, 2, "weight")
        if len(node.args[1]) != 1:
            return f"the norm runs over {len(node.args[1])} dimensions, not over the last one"
        if weight is not None and dtype(weight) != dtype(node.args[0]):
            return f"the weight's dtype {dtype(weight)} differs from the input's {dtype(node.args[0])}"
        return None
    x32 = match["x32"]
    if dtype(x32) != torch.float32:
        return f"the mean of squares is taken in {dtype(x32)}, not in float32"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    op = torch.ops.gs.rms_norm.default
    if match["call"]:
        node = match.root
        weight = arg(node, 2, "weight")
        # aten.rms_norm multiplies by the weight before it rounds.
        return {node: ctx.emit(op, node.args[0], weight, _eps_of(node), 0.0, True)}
    x32, n, eps = match["x32"], match["n"], match["eps"]
    x = strip_cast(x32)
    last, weight, offset, weight_fp32 = grow_scale(n, x)
    if dtype(last) != dtype(x):  # the fp32 value itself is used
        x = x32
        last, weight, offset, weight_fp32 = grow_scale(n, x)
    with ctx.graph.inserting_before(last):
        return {last: ctx.emit(op, x, weight, eps, offset, weight_fp32)}


PASS = Pass("rms_norm", replacement, pattern=pattern, check=check, tier="approximate", tolerance=4.0)
