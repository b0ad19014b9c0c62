"""Only the rows whose logits are wanted go through what follows the last attention.

    x → norm → lm_head → softcap → index(logits [1, T, V], [None, logits_indices])
        →  index_select(x, 1, logits_indices) → norm → lm_head → softcap     (all on [1, R, ...])

The gather moves up over every row-wise op whose result is wanted for those rows only: softcap, lm_head, final norm,
and the last layer's MLP, norms, residual adds and output projection. It stops at the last attention, at the residual
stream that feeds it, and at any op that is not known to treat each row alone. Legal because those ops treat each row
alone and nobody reads their other rows. Exact per row; a matrix product over fewer rows may sum in another order.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import arg, aten, is_cast, is_gs, is_op, is_tensor, rank, shape, token_axis

_ROW_OPS = ("linear", "rms_norm", "layer_norm", "activation", "act_mul")
_ELEMENTWISE = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


def _is_rows(value: Any) -> bool:
    """A tensor [1, T, ...]."""
    return is_tensor(value) and rank(value) == 3 and token_axis(value) == 1 and shape(value)[0] == 1


def row_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments [1, T, ...] of an op that treats each row alone; empty for any other op."""
    if not _is_rows(node):
        return ()
    if is_op(node, aten.slice.Tensor):
        is_row_wise = arg(node, 1, "dim", 0) in (2, -1)
    else:
        is_row_wise = is_gs(node, *_ROW_OPS) or is_cast(node) or is_op(node, aten.tanh.default, *_ELEMENTWISE)
    with_rows = [a for a in node.args if is_tensor(a) and token_axis(a) is not None]
    if not is_row_wise or not all(_is_rows(a) for a in with_rows):
        return ()
    return tuple(dict.fromkeys(with_rows))


def pattern(node: fx.Node) -> Match | None:
    if not is_op(node, aten.index.Tensor):
        return None
    x, indices = node.args[:2]
    if len(indices) != 2 or indices[0] is not None or not is_tensor(indices[1]) or rank(indices[1]) != 1:
        return None
    # Ops above the gather, nearest first, all of whose users are the gather or among them.
    above: dict[fx.Node, None] = {}
    pending = [x]
    while pending:
        current = max(pending)  # the last in graph order: its users have all been looked at
        pending = [n for n in pending if n is not current]
        if current not in above and row_inputs(current) and all(u is node or u in above for u in current.users):
            above[current] = None
            pending.extend(row_inputs(current))
    chain = tuple(reversed(above))
    return Match(node, (*chain, node), {"x": x, "indices": indices[1], "chain": chain})


def check(match: Match, ctx: PassContext) -> str | None:
    x = match["x"]
    if not _is_rows(x):
        return f"rows are taken from {list(shape(x))}, not from [1, T, H]"
    if not match["chain"]:
        return f"{x} is no row-wise op, or is used elsewhere too"
    return None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    gathered: dict[fx.Node, fx.Node] = {}

    def rows_of(node: fx.Node) -> fx.Node:
        if node not in gathered:
            gathered[node] = ctx.emit(aten.index_select.default, node, 1, match["indices"])
            gathered[node].meta.pop("gs_layer", None)  # the gather belongs to no layer
        return gathered[node]

    for node in match["chain"]:
        args = tuple(rows_of(a) if a in row_inputs(node) else a for a in node.args)
        gathered[node] = ctx.emit(node.target, *args, **node.kwargs)
        _keep_place(gathered[node], node)
    return {match.root: gathered[match["x"]]}


def _keep_place(new: fx.Node, old: fx.Node) -> None:
    """The new node belongs to the layer and module of the old one, not to the gather's."""
    new.meta["gs_sources"] = old.meta.get("gs_sources", (old.name,))
    for key in ("gs_layer", "gs_module", "nn_module_stack"):
        new.meta.pop(key, None)
        if key in old.meta:
            new.meta[key] = old.meta[key]


PASS = Pass("last_rows", replacement, pattern=pattern, check=check)
