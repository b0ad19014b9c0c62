"""LayerNorm becomes one op.

    aten.layer_norm(x, [D], w, b, eps)                          →  gs.layer_norm(x, w, b, eps)
    to(aten.layer_norm(to(x, fp32), [D], w, b, eps), x.dtype)   →  gs.layer_norm(x, w, b, eps)
    x32 = to(x, fp32); d = x32 - mean(x32, -1); n = d * rsqrt(mean(d², -1) + eps)
    to(to(w, fp32) * n, x.dtype)                                →  gs.layer_norm(x, w, None, eps)

Legal when the norm runs over the last dimension only and, if decomposed, in fp32. Approximate: sums may be taken in
another order.
"""

from __future__ import annotations

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    arg,
    aten,
    dtype,
    is_add,
    is_cast,
    is_op,
    is_sub,
    mean_last,
    only_user,
    squared,
    strip_cast,
    with_number,
)
from graphserve.passes.rms_norm import grow_scale, scaled_by


def pattern(node: fx.Node) -> Match | None:
    if is_op(node, aten.layer_norm.default):
        return Match(node, (node,), {"call": True})
    if (scaled := scaled_by(node)) is None:
        return None
    variance, n = scaled
    found = with_number(variance, is_add)
    square = mean_last(found[0]) if found is not None else None
    centred = squared(square) if square is not None else None
    if found is None or not is_sub(centred) or n.args[0 if n.args[0] is not node else 1] is not centred:
        return None
    x32, mean = centred.args[:2]
    if mean_last(mean) is not x32:
        return None
    nodes = (x32, mean, centred, square, found[0], variance, node, n)
    return Match(n, nodes, {"call": False, "x32": x32, "n": n, "eps": float(found[1])})


def check(match: Match, ctx: PassContext) -> str | None:
    if match["call"]:
        node = match.root
        if len(node.args[1]) != 1:
            return f"the norm runs over {len(node.args[1])} dimensions, not over the last one"
        return None
    if dtype(match["x32"]) != torch.float32:
        return f"the variance is taken in {dtype(match['x32'])}, not in float32"
    _, _, offset, _ = grow_scale(match["n"], strip_cast(match["x32"]))
    return "gs.layer_norm has no weight offset" if offset else None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    op = torch.ops.gs.layer_norm.default
    if match["call"]:
        node = match.root
        x, weight, bias = node.args[0], arg(node, 2, "weight"), arg(node, 3, "bias")
        eps = float(arg(node, 4, "eps", 1e-5))
        user, plain = only_user(node), strip_cast(x)
        narrow = is_cast(user) and dtype(user) == dtype(plain) and dtype(x) == torch.float32
        # A weight that was widened with x may stay as it is: the op works in fp32 inside.
        weights = [strip_cast(w) if w is not None else None for w in (weight, bias)]
        if narrow and user is not None and all(w is None or dtype(w) == dtype(plain) for w in weights):
            with ctx.graph.inserting_before(user):
                return {user: ctx.emit(op, plain, *weights, eps)}
        return {node: ctx.emit(op, x, weight, bias, eps)}
    x32, n, eps = match["x32"], match["n"], match["eps"]
    x = strip_cast(x32)
    last, weight, _, _ = grow_scale(n, x)
    if dtype(last) != dtype(x) or (weight is not None and dtype(weight) != dtype(x)):
        x, last, weight = x32, n, None  # keep the scale outside: F.layer_norm wants one dtype
    with ctx.graph.inserting_before(last):
        return {last: ctx.emit(op, x, weight, None, eps)}


PASS = Pass("layer_norm", replacement, pattern=pattern, check=check, tier="approximate", tolerance=4.0)
