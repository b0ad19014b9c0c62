"""The router of a mixture of experts becomes one op.

    s = softmax(logits); v, ids = topk(s, k); w = v / sum(v)                        (Mixtral, Qwen3-MoE)
    v, ids = topk(logits, k); w = softmax(v) or sigmoid(v)                          (gpt-oss, Granite, Llama 4)
    s = sigmoid(logits); ids = topk(s + bias, k)[1]; w = gather(s, ids) / (sum + eps) * scale
        where the best groups of experts may be chosen first                        (DeepSeek-V3, GLM-4, MiniMax)
        →  w, ids = gs.route(logits, bias, ...);  gs.moe(x, ids, w, ...)

A match is anchored at ``gs.moe``, whose arguments ``ids`` and ``w`` are read backwards. Legal when both come from one
choice and nothing else reads a value in between. Approximate: the model may round scores, sums and weights one after
the other to 16 bits, the op rounds once; and of two equal choices either may be taken.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    arg,
    aten,
    dtype,
    getitem_of,
    is_add,
    is_cast,
    is_gs,
    is_mul,
    is_op,
    is_tensor,
    pairs,
    rank,
    shape,
    strip_cast,
    with_number,
)

Attributes = dict[str, Any]


def pattern(node: fx.Node) -> Match | None:
    if not is_gs(node, "moe"):
        return None
    ids, weights = node.args[1:3]
    choice = _chosen(ids, 1)
    if choice is None or not is_tensor(weights):
        return None
    values, attributes = _weights(weights)
    chosen_from, top_k = choice
    selected = _without_groups(chosen_from)
    scores, bias = _without_bias(selected[0])
    if values is None or not _are_scores_of(values, ids, scores, chosen_from):
        return None
    logits, kind = _logits(scores)
    captures = {"ids": ids, "weights": weights, "logits": logits, "bias": bias, "chosen_from": chosen_from,
                "attributes": {"top_k": top_k, "scores": kind, **attributes, **selected[1]}}  # fmt: skip
    inside = _between((ids, weights), {strip_cast(logits), bias, *_casts_above(logits)})
    return Match(node, inside, captures) if inside else None


def _weights(node: fx.Node) -> tuple[fx.Node | None, Attributes]:
    """The chosen scores that the weights come from, and how."""
    found: Attributes = {"normalize": "none", "eps": 0.0, "min_sum": 0.0, "scale": 1.0}
    node = strip_cast(node)
    if (scaled := with_number(node, is_mul)) is not None:
        node, found["scale"] = strip_cast(scaled[0]), float(scaled[1])
    if is_op(node, aten.softmax.int) and node.args[1] in (-1, 1):
        return strip_cast(node.args[0]), {**found, "normalize": "softmax"}
    if is_op(node, aten.sigmoid.default):
        return strip_cast(node.args[0]), {**found, "normalize": "sigmoid"}
    if is_op(node, aten.div.Tensor) and isinstance(node.args[1], fx.Node):
        values = strip_cast(node.args[0])
        total = strip_cast(node.args[1])
        if (eps := with_number(total, is_add)) is not None:
            total, found["eps"] = strip_cast(eps[0]), float(eps[1])
        elif is_op(total, aten.clamp.default, aten.clamp_min.default) and arg(total, 2, "max") is None:
            found["min_sum"], total = float(arg(total, 1, "min")), strip_cast(total.args[0])
        is_sum = is_op(total, aten.sum.dim_IntList) and tuple(d % 2 for d in total.args[1]) == (1,)
        if is_sum and arg(total, 2, "keepdim", False) and strip_cast(total.args[0]) is values:
            return values, {**found, "normalize": "sum"}
        return None, found
    return node, found


def _chosen(node: Any, output: int) -> tuple[fx.Node, int] | None:
    """``(x, k)`` when ``node`` is the values (0) or ids (1) of the k largest of each row of ``x``."""
    found = getitem_of(node)
    if found is None or found[1] != output or not is_op(found[0], aten.topk.default):
        return None
    topk = found[0]
    x, k = topk.args[:2]
    if arg(topk, 2, "dim", -1) % rank(x) != rank(x) - 1 or not arg(topk, 3, "largest", True):
        return None
    return x, k


def _are_scores_of(values: fx.Node, ids: fx.Node, scores: fx.Node, chosen_from: fx.Node) -> bool:
    """Whether ``values`` are the scores at ``ids``: gathered, or the choice's own where it was among the scores."""
    if is_op(values, aten.gather.default):
        return values.args[1] in (-1, 1) and values.args[2] is ids and strip_cast(values.args[0]) is strip_cast(scores)
    own = getitem_of(values)
    mine = getitem_of(ids)
    if own is None or mine is None or own[0] is not mine[0] or own[1] != 0:
        return False
    # A score of a group that stays is its own value, whatever the others were filled with.
    return strip_cast(chosen_from) is strip_cast(scores) or _without_groups(chosen_from)[0] is scores


def _without_groups(node: fx.Node) -> tuple[fx.Node, Attributes]:
    """The choices that a mask of the best groups was laid over, and the groups' attributes."""
    plain: Attributes = {"num_groups": 1, "top_groups": 1, "group_top": 1}
    if not is_op(node, aten.masked_fill.Scalar):
        return node, plain
    choice, mask, fill = node.args
    groups = _groups(mask, choice)
    # Scores of a softmax are positive, so that 0 leaves a group out as surely as -inf does.
    if groups is None or not (fill == float("-inf") or (fill == 0 and is_op(strip_cast(choice), aten.softmax.int))):
        return node, plain
    return choice, groups if groups["num_groups"] > 1 else plain


def _groups(mask: Any, choice: fx.Node) -> Attributes | None:
    """``not (scatter 1 at the best groups, each spread over its experts)``."""
    steps = (
        (aten.bitwise_not.default, aten.logical_not.default),
        (aten.to.dtype,),
        (aten.reshape.default,),
        (aten.expand.default,),
        (aten.unsqueeze.default,),
    )
    node = mask
    for step in steps:
        if not is_op(node, *step):
            return None
        node = node.args[0]
    if not is_op(node, aten.scatter.value) or not is_op(node.args[0], aten.zeros_like.default) or node.args[3] != 1:
        return None
    best = _chosen(node.args[2], 1)
    if best is None or node.args[1] != 1:
        return None
    ranks, top_groups = best
    return _ranks(ranks, choice, top_groups)


def _ranks(ranks: fx.Node, choice: fx.Node, top_groups: int) -> Attributes | None:
    """A group's rank: the sum of its best choices, or its largest one."""
    if is_op(ranks, aten.sum.dim_IntList) and tuple(d % 2 for d in ranks.args[1]) in ((0,), (1,)):
        best = _chosen(ranks.args[0], 0)
        if best is None or ranks.args[1][0] % rank(ranks.args[0]) != 2:
            return None
        grouped, group_top = best
    elif is_op(ranks, aten.amax.default) and ranks.args[1][0] % 3 == 2:
        grouped, group_top = ranks.args[0], 1
    elif (largest := getitem_of(ranks)) is not None and largest[1] == 0 and is_op(largest[0], aten.max.dim):
        grouped, group_top = largest[0].args[0], 1
        if rank(grouped) != 3 or largest[0].args[1] % 3 != 2:
            return None
    else:
        return None
    if not is_op(grouped, aten.reshape.default) or grouped.args[0] is not choice or rank(grouped) != 3:
        return None
    return {"num_groups": shape(grouped)[1], "top_groups": top_groups, "group_top": group_top}


def _without_bias(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    if is_add(node):
        for scores, bias in pairs(node):
            if is_tensor(bias) and is_tensor(scores) and rank(bias) == 1 and rank(scores) == 2:
                return scores, bias
    return node, None


def _logits(scores: fx.Node) -> tuple[fx.Node, str]:
    node = strip_cast(scores)
    if is_op(node, aten.softmax.int) and node.args[1] in (-1, 1):
        return node.args[0], "softmax"
    if is_op(node, aten.sigmoid.default):
        return node.args[0], "sigmoid"
    return scores, "none"


def _casts_above(node: fx.Node) -> list[fx.Node]:
    casts = [node]
    while is_cast(node):
        node = node.args[0]
        casts.append(node)
    return casts


def _between(results: tuple[fx.Node, ...], sources: set[fx.Node | None]) -> tuple[fx.Node, ...]:
    """Nodes on the way from ``sources`` to ``results``; none when another input is on it."""
    seen: set[fx.Node] = set()
    pending = list(results)
    while pending:
        node = pending.pop()
        if node in seen or node in sources:
            continue
        if node.op != "call_function":
            return ()
        seen.add(node)
        pending.extend(node.all_input_nodes)
    return tuple(sorted(seen))


def check(match: Match, ctx: PassContext) -> str | None:
    logits, bias, inside = match["logits"], match["bias"], set(match.nodes)
    if rank(logits) != 2 or not dtype(logits).is_floating_point:
        return f"the router's logits {logits} are {dtype(logits)} {list(shape(logits))}, not rows of experts"
    if bias is not None and (not bias < match.root or shape(bias)[0] != shape(logits)[1]):
        return f"the bias {bias} has no value for each expert"
    for node in match.nodes:
        outside = set(node.users) - inside - {match.root}
        if outside and node not in (match["ids"], match["weights"]):
            return f"{node}, a step of the router, is used by {next(iter(outside))} too"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    ids, weights, logits, a = match["ids"], match["weights"], match["logits"], match["attributes"]
    logits = strip_cast(logits) if _widens(logits) else logits
    first = min(node for node in match.nodes if node is ids or node is weights)
    start = first if match["bias"] is None or match["bias"] < first else match.root
    with ctx.graph.inserting_before(start):
        both = ctx.emit(
            torch.ops.gs.route.default, logits, match["bias"], a["top_k"], a["scores"], a["normalize"],
            a["eps"], a["min_sum"], a["scale"], a["num_groups"], a["top_groups"], a["group_top"],
            str(dtype(weights)).removeprefix("torch."),
        )  # fmt: skip
        return {weights: ctx.emit(operator.getitem, both, 0), ids: ctx.emit(operator.getitem, both, 1)}


def _widens(node: fx.Node) -> bool:
    """Whether ``node`` is a 16-bit value cast to fp32, which the op does itself."""
    return is_cast(node) and dtype(node) == torch.float32 and dtype(strip_cast(node)).itemsize == 2


PASS = Pass("route", replacement, pattern=pattern, check=check, tier="approximate", tolerance=4.0)
