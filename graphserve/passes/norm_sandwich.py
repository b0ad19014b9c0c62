"""A norm after a sublayer, the residual add behind it, and the norm before the next sublayer become one op.

    n = gs.rms_norm(x, w1); y, h = gs.add_rms_norm(n, residual, w2)  →  y, h = gs.norm_add_rms_norm(x, w1, residual, w2)
    n = gs.rms_norm(x, w1); h = residual + n                        →  h = gs.norm_add(x, w1, residual)

The first form is Gemma's (2 and later), the second OLMo 2's, where no norm follows the add. Legal when nobody else
reads ``n``, and both norms of the first form treat their weights alike. Exact: each step rounds as before.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import dtype, is_add, is_gs, is_tensor, only_user, same_shape, shape


def pattern(node: fx.Node) -> Match | None:
    if not is_gs(node, "add_rms_norm") and not is_add(node):
        return None
    summands = node.args[:2]
    for post, residual in (summands, summands[::-1]):
        if is_gs(post, "rms_norm") and is_tensor(residual):
            return Match(node, (post, node), {"post": post, "residual": residual})
    return None


def check(match: Match, ctx: PassContext) -> str | None:
    post, residual, root = match["post"], match["residual"], match.root
    if only_user(post) is None:
        return f"{post} is used elsewhere too"
    if not same_shape(shape(post), shape(residual)) or dtype(post) != dtype(residual):
        return f"{residual} is {dtype(residual)} {list(shape(residual))}, the norm {dtype(post)} {list(shape(post))}"
    if is_gs(root, "add_rms_norm") and post.args[3:5] != root.args[4:6]:
        return "the two norms treat their weights differently"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    post, residual, root = match["post"], match["residual"], match.root
    x, post_weight, post_eps, offset, weight_fp32 = post.args
    gs = torch.ops.gs
    if is_add(root):
        return {root: ctx.emit(gs.norm_add.default, x, post_weight, residual, post_eps, offset, weight_fp32)}
    _, _, weight, eps, _, _ = root.args
    args = (x, post_weight, residual, weight, post_eps, eps, offset, weight_fp32)
    both = ctx.emit(gs.norm_add_rms_norm.default, *args)
    # The results of a pair are read through getitem; each of those is replaced.
    return {item: ctx.emit(operator.getitem, both, item.args[1]) for item in root.users}


PASS = Pass("norm_sandwich", replacement, pattern=pattern, check=check)
