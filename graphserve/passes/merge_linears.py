"""Linears that read the same input become one, and its column slices.

    q = gs.linear(x, Wq, bq); k = gs.linear(x, Wk, bk); v = gs.linear(x, Wv, bv)
        →  m = gs.linear(x, [Wq; Wk; Wv], [bq; bk; bv]); q = m[..., :Nq]; k = m[..., Nq:Nq+Nk]; v = m[..., Nq+Nk:]

The merged weight is made by the loader, never by copying at run time. Two to five linears are merged; those with bias
and those without go separately, so that no zeros are stored and added. Legal when each weight is a parameter used once,
of the same dtype. Exact: each output column is the same dot product.
"""

from __future__ import annotations

import os.path

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    aten,
    dtype,
    is_gs,
    is_static,
    is_tensor,
    is_weight,
    only_user,
    rank,
    shape,
    weight_name,
)

MAX_SIBLINGS = 5
# Slices of the merged result must start on 16-byte boundaries for vector loads, in any dtype of 2 bytes or more.
_COLUMN_MULTIPLE = 8


def pattern(node: fx.Node) -> Match | None:
    """Fits at the last of the siblings, so that each group is looked at once."""
    if not is_gs(node, "linear"):
        return None
    x, has_bias = node.args[0], node.args[2] is not None
    assert isinstance(x, fx.Node)
    siblings = [u for u in x.users if is_gs(u, "linear") and u.args[0] is x and (u.args[2] is not None) == has_bias]
    siblings.sort()
    if len(siblings) < 2 or siblings[-1] is not node:
        return None
    good = [s for s in siblings if _unfit(s) is None]
    return Match(node, tuple(good if len(good) > 1 else siblings))


def _unfit(linear: fx.Node) -> str | None:
    weight, bias = linear.args[1:]
    assert isinstance(weight, fx.Node)
    if not is_weight(weight):
        return f"the weight of {linear} is computed, not a parameter"
    if len(weight.users) != 1 or (isinstance(bias, fx.Node) and only_user(bias) is None):
        return f"{weight_name(weight)} is used in more than one place"
    columns = shape(weight)[0]
    if not is_static(columns) or columns % _COLUMN_MULTIPLE:
        return f"{weight_name(weight)} has {columns} rows, not a multiple of {_COLUMN_MULTIPLE}"
    return None


def check(match: Match, ctx: PassContext) -> str | None:
    for linear in match.nodes:
        if (reason := _unfit(linear)) is not None:
            return reason
        for weight in (linear.args[1], linear.args[2]):
            if isinstance(weight, fx.Node) and weight_name(weight) in ctx.weight_recipes:
                return f"{weight_name(weight)} is itself made from other parameters"
    if len(match.nodes) > MAX_SIBLINGS:
        return f"{len(match.nodes)} linears read one input, more than {MAX_SIBLINGS}"
    if len({dtype(linear.args[1]) for linear in match.nodes}) > 1:
        return "the weights have different dtypes"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    linears = match.nodes
    x = linears[0].args[0]
    weight = _concat(ctx, [linear.args[1] for linear in linears])
    biases = [linear.args[2] for linear in linears]
    bias = _concat(ctx, biases) if is_tensor(biases[0]) else None
    replaced, start = {}, 0
    with ctx.graph.inserting_before(linears[0]):
        merged = ctx.emit(torch.ops.gs.linear.default, x, weight, bias)
        for linear in linears:
            end = start + shape(linear)[-1]
            replaced[linear] = ctx.emit(aten.slice.Tensor, merged, rank(merged) - 1, start, end)
            start = end
    return replaced


def _concat(ctx: PassContext, weights: list[fx.Node]) -> fx.Node:
    names = [weight_name(w) for w in weights]
    like = ctx.empty((sum(shape(w)[0] for w in weights), *shape(weights[0])[1:]), dtype(weights[0]))
    return ctx.new_weight(merged_name(names), like, ("concat", names, 0))


def merged_name(names: list[str]) -> str:
    """``a.q_proj.weight, a.k_proj.weight`` → ``a.q_proj+k_proj.weight``."""
    parts = [name.split(".") for name in names]
    prefix = os.path.commonprefix(parts)
    tails = [part[len(prefix) :] for part in parts]
    suffix = os.path.commonprefix([tail[::-1] for tail in tails])[::-1]
    middle = "+".join(".".join(tail[: len(tail) - len(suffix)]) for tail in tails)
    return ".".join([*prefix, middle, *suffix])


PASS = Pass("merge_linears", replacement, pattern=pattern, check=check)
