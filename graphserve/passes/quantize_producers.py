"""The kernel that makes an activation quantizes it as well.

    gs.quantize_rows(gs.rms_norm(x, ...))              →  gs.rms_norm_quant(x, ...)
    y, h = gs.add_rms_norm(...); gs.quantize_rows(y)   →  q, s, h = gs.add_rms_norm_quant(...)
    gs.quantize_rows(gs.act_mul(gate, up, act))        →  gs.act_mul_quant(gate, up, act)
    gs.quantize_rows(gs.paged_attention(q, ...))       →  gs.paged_attention_quant_rows(q, ...), also over a reshape

Legal when nothing else reads the activation. Exact: the ops round to the activation's dtype before they quantize, and a
row is quantized by itself. Attention's programs each see a part of a row; they leave it to the kernel that joins the
parts of split keys, which sees all.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, getitem_of, is_gs, is_op, only_user, reshape_arg, shape


def pattern(node: fx.Node) -> Match | None:
    if not is_gs(node, "quantize_rows"):
        return None
    x = node.args[0]
    if is_gs(x, "rms_norm", "act_mul"):
        return Match(node, (x, node), {"activation": x, "producer": x})
    if is_op(x, aten.reshape.default) and is_gs(x.args[0], "paged_attention") and only_user(x) is not None:
        return Match(node, (x.args[0], x, node), {"activation": x.args[0], "producer": x.args[0]})
    found = getitem_of(x)
    if found is not None and found[1] == 0 and is_gs(found[0], "add_rms_norm"):
        return Match(node, (found[0], x, node), {"activation": x, "producer": found[0]})
    return None


def check(match: Match, ctx: PassContext) -> str | None:
    others = [user for user in match["activation"].users if user not in match.nodes]
    return f"{match['activation']} is also read by {others[0]}" if others else None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    quantize, producer, gs = match.root, match["producer"], torch.ops.gs
    name = producer.target._schema.name.removeprefix("gs::")
    op = {
        "rms_norm": gs.rms_norm_quant,
        "act_mul": gs.act_mul_quant,
        "add_rms_norm": gs.add_rms_norm_quant,
        "paged_attention": gs.paged_attention_quant_rows,
    }[name]
    with ctx.graph.inserting_before(producer):
        results = ctx.emit(op.default, *producer.args, quantize.args[1])
        replaced = {item: ctx.emit(operator.getitem, results, item.args[1]) for item in list(quantize.users)}
        if name == "paged_attention":
            replaced = {
                item: ctx.emit(aten.reshape.default, new, reshape_arg(shape(item))) for item, new in replaced.items()
            }
        if name == "add_rms_norm":
            sums = [item for item in producer.users if item.args[1] == 1]
            replaced |= {item: ctx.emit(operator.getitem, results, 2) for item in sums}
    return replaced


PASS = Pass("quantize_producers", replacement, pattern=pattern, check=check)
