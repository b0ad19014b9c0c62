"""Only the rows whose logits are wanted go through the final norm and the lm_head.

    x → norm → lm_head → softcap → index(logits [1, T, V], [None, logits_indices])
        →  index_select(x, 1, logits_indices) → norm → lm_head → softcap     (all on [1, R, ...])

The gather moves up through one row-wise op after the other until it meets one that is none or whose result has another
user. Legal because those ops treat each row alone. Exact per row; a matrix product over fewer rows may sum in another
order.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import arg, aten, is_cast, is_gs, is_op, is_tensor, rank, shape, token_axis

_ROW_OPS = ("linear", "rms_norm", "layer_norm", "activation")
_ELEMENTWISE = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


def row_wise_input(node: fx.Node) -> fx.Node | None:
    """The one argument [1, T, ...] of an op that treats each row alone, when its other arguments hold no rows."""
    if is_gs(node, *_ROW_OPS) or is_cast(node) or is_op(node, aten.tanh.default):
        x: Any = node.args[0]
    elif is_op(node, aten.slice.Tensor) and arg(node, 1, "dim", 0) > 1:
        x = node.args[0]
    elif is_op(node, *_ELEMENTWISE):
        with_rows = [a for a in node.args[:2] if is_tensor(a) and (rank(a) > 1 or token_axis(a) is not None)]
        x = with_rows[0] if len(with_rows) == 1 else None
    else:
        return None
    return x if is_tensor(x) and rank(x) == 3 and token_axis(x) == 1 else None


def pattern(node: fx.Node) -> Match | None:
    if not is_op(node, aten.index.Tensor):
        return None
    x, indices = node.args[:2]
    if len(indices) != 2 or indices[0] is not None or not is_tensor(indices[1]) or rank(indices[1]) != 1:
        return None
    chain: list[fx.Node] = []
    while len(x.users) == 1 and (above := row_wise_input(x)) is not None:
        chain.append(x)
        x = above
    return Match(node, (*reversed(chain), node), {"x": x, "indices": indices[1], "chain": tuple(reversed(chain))})


def check(match: Match, ctx: PassContext) -> str | None:
    x = match["x"]
    if rank(x) != 3 or shape(x)[0] != 1 or token_axis(x) != 1:
        return f"rows are taken from {list(shape(x))}, not from [1, T, H]"
    if not match["chain"]:
        return f"{x} is no row-wise op, or is used elsewhere too"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    old = match["x"]
    new = ctx.emit(aten.index_select.default, old, 1, match["indices"])
    for node in match["chain"]:
        args = tuple(new if a is old else a for a in node.args)
        old, new = node, ctx.emit(node.target, *args, **node.kwargs)
    return {match.root: new}


PASS = Pass("last_rows", replacement, pattern=pattern, check=check)
