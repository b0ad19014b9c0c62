"""Every product with a weight becomes ``gs.linear``, whose weight is stored [out, in].

    aten.linear(x, w, b)                                             →  gs.linear(x, w, b)
    aten.addmm(b, x, w [in, out])  or  aten.mm(x, w), matmul(x, w)   →  gs.linear(x, transposed w, b)   (GPT-2's Conv1D)
    aten.mm(x, transpose(w [out, in], 0, 1)), matmul likewise        →  gs.linear(x, w)
    aten.add(gs.linear(x, w, None), b [out])                         →  gs.linear(x, w, b)

A weight stored [in, out] becomes a new weight that the loader transposes once. Legal when x and w have one dtype and w
is two-dimensional. Exact up to the order of the sum inside one dot product.
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
    is_gs,
    is_op,
    is_tensor,
    is_weight,
    only_user,
    pairs,
    rank,
    shape,
    weight_name,
)


def pattern(node: fx.Node) -> Match | None:
    if is_op(node, aten.linear.default):
        x, weight = node.args[:2]
        return Match(node, (node,), {"x": x, "weight": weight, "bias": arg(node, 2, "bias"), "transposed": False})
    if is_op(node, aten.addmm.default):
        bias, x, weight = node.args[:3]
        return Match(node, (node,), {"x": x, "bias": bias, **_stored(weight)})
    if is_op(node, aten.mm.default, aten.matmul.default):
        x, weight = node.args[:2]
        if is_tensor(weight) and rank(weight) == 2 and is_weight(_stored(weight)["weight"]):
            return Match(node, (node,), {"x": x, "bias": None, **_stored(weight)})
    if is_add(node):
        for product, bias in pairs(node):
            if is_gs(product, "linear") and product.args[2] is None and is_weight(bias) and rank(bias) == 1:
                captures = {"x": product.args[0], "weight": product.args[1], "bias": bias, "transposed": False}
                return Match(node, (product, node), captures)
    return None


def _stored(weight: fx.Node) -> dict[str, object]:
    """The weight behind a transpose, and whether ``gs.linear`` needs it transposed ([in, out] as it stands)."""
    if is_op(weight, aten.t.default) or (is_op(weight, aten.transpose.int) and rank(weight) == 2):
        return {"weight": weight.args[0], "transposed": False}
    return {"weight": weight, "transposed": True}


def check(match: Match, ctx: PassContext) -> str | None:
    node, x, weight, bias = match.root, match["x"], match["weight"], match["bias"]
    if is_op(node, aten.addmm.default) and (node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1):
        return "addmm scales its product or its bias"
    if rank(weight) != 2:
        return f"the weight has {rank(weight)} dimensions, not 2"
    if match["transposed"] and not is_weight(weight):
        return f"the [in, out] matrix {weight} is computed, not a parameter"
    if dtype(x) != dtype(weight):
        return f"the input is {dtype(x)}, the weight {dtype(weight)}"
    outputs = shape(weight)[1 if match["transposed"] else 0]
    if bias is not None and (tuple(shape(bias)) != (outputs,) or dtype(bias) != dtype(weight)):
        return f"the bias is {dtype(bias)} {list(shape(bias))}, not {dtype(weight)} [{outputs}]"
    if is_add(node) and only_user(match.nodes[0]) is None:
        return "the product without bias is used too"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    weight = match["weight"]
    if match["transposed"]:
        name = weight_name(weight)
        like = ctx.empty((shape(weight)[1], shape(weight)[0]), dtype(weight))
        weight = ctx.new_weight(f"{name}.transposed", like, ("transpose", [name], 0))
    return {match.root: ctx.emit(torch.ops.gs.linear.default, match["x"], weight, match["bias"])}


PASS = Pass("linear", replacement, pattern=pattern, check=check)
