"""Rotary position embedding becomes one op, in every spelling that models use.

    x * cos + cat([-x[..., h:], x[..., :h]]) * sin                              →  gs.rope(x, cos, sin, "half")
    x * cos + stack([-x[..., 1::2], x[..., ::2]], -1).flatten * sin             →  "interleaved"
    a, b = halves of x: cat([a * cos - b * sin, b * cos + a * sin])             →  "half"
    a, b = x[..., ::2], x[..., 1::2]: cat([...])                                →  "interleaved_to_half"
    a, b = x[..., ::2], x[..., 1::2]: stack([...], -1).flatten                  →  "interleaved"
    view_as_real(view_as_complex(x.reshape(..., -1, 2)) * freqs).flatten        →  "interleaved"
    cat([gs.rope(x[..., :r], cos, sin), x[..., r:]])                            →  gs.rope(x, cos, sin)   (partial)

``x`` is [1, H, T, D] or [1, T, H, D]. The op's tables [1, T, C] hold one value a column of the result, so half-width
tables are doubled here (once for all layers, see ``position_tables.py``), and a table that met a widened x is widened.
Casts around the rotation go into the op.

Legal when the tables do not differ between heads. Approximate: the op rounds once where a model in bf16 may round
after each product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import (
    aten,
    dtype,
    is_add,
    is_cast,
    is_gs,
    is_last_dim,
    is_mul,
    is_op,
    is_sub,
    is_tensor,
    last_dim_slice,
    only_user,
    pairs,
    rank,
    reshape_arg,
    same_shape,
    same_size,
    shape,
    strip_cast,
    tensor_list,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _halves(a: Any, b: Any) -> tuple[fx.Node, str] | None:
    """``(x, layout)`` when a and b are the two halves (``half``) or the even and odd columns (``interleaved``) of x."""
    first, second = last_dim_slice(a), last_dim_slice(b)
    if first is None or second is None or first[0] is not second[0]:
        return None
    x, width = first[0], shape(first[0])[-1]
    if first[1:] == (0, width // 2, 1) and second[1:] == (width // 2, width, 1):
        return x, "half"
    if first[1:] == (0, width, 2) and second[1:] == (1, width, 2):
        return x, "interleaved"
    return None


def _two_parts(node: Any) -> tuple[Any, Any, str] | None:
    """``(p, q, layout)`` of ``cat([p, q], -1)`` (``half``) or ``stack([p, q], -1).flatten(-2)`` (``interleaved``)."""
    if is_op(node, aten.cat.default) and is_last_dim(node, 1, "dim", rank(node)) and len(node.args[0]) == 2:
        return *tensor_list(node), "half"
    stack = node.args[0] if is_op(node, aten.reshape.default) else None
    if is_op(stack, aten.stack.default) and is_last_dim(stack, 1, "dim", rank(stack)) and len(stack.args[0]) == 2:
        p, q = tensor_list(stack)
        if shape(node)[-1] == 2 * shape(p)[-1] and same_shape(shape(node)[:-1], shape(p)[:-1]):
            return p, q, "interleaved"
    return None


def _partner(node: Any) -> tuple[fx.Node, str, tuple[fx.Node, ...]] | None:
    """``(x, style, nodes)`` when the node is x with each pair (a, b) turned to (-b, a)."""
    if (parts := _two_parts(node)) is None or not is_op(parts[0], aten.neg.default):
        return None
    found = _halves(parts[1], parts[0].args[0])
    return (*found, (parts[0], parts[1], node)) if found is not None and found[1] == parts[2] else None


def _rotation_sum(node: fx.Node) -> dict[str, Any] | None:
    """``x * cos + partner(x) * sin``."""
    if not is_add(node):
        return None
    for direct, turned in pairs(node):
        if not is_mul(direct) or not is_mul(turned):
            continue
        for partner, sin in pairs(turned):
            if (found := _partner(partner)) is None:
                continue
            x, style, inner = found
            cos = next((c for y, c in pairs(direct) if y is x), None)
            if is_tensor(cos) and is_tensor(sin):
                return {"x": x, "cos": cos, "sin": sin, "style": style, "nodes": (*inner, direct, turned, node)}
    return None


def _rotation_parts(node: fx.Node) -> dict[str, Any] | None:
    """Both results of each pair formed apart, then joined: ``[a * cos - b * sin, b * cos + a * sin]``."""
    if (parts := _two_parts(node)) is None:
        return None
    low, high, layout = parts
    if not is_sub(low) or not is_add(high) or not all(is_mul(m) for m in (*low.args[:2], *high.args[:2])):
        return None
    for a, cos in pairs(low.args[0]):
        for b, sin in pairs(low.args[1]):
            if (found := _halves(a, b)) is None:
                continue
            for b_cos, a_sin in pairs(high):
                if set(b_cos.args[:2]) == {b, cos} and set(a_sin.args[:2]) == {a, sin}:
                    style = found[1] if found[1] == layout else f"{found[1]}_to_{layout}"
                    nodes = (low, high, node)
                    return {"x": found[0], "cos": cos, "sin": sin, "style": style, "nodes": nodes, "narrow": True}
    return None


def _rotation_complex(node: fx.Node) -> dict[str, Any] | None:
    """``reshape(view_as_real(view_as_complex(reshape(x, [..., C/2, 2])) * freqs))``."""
    real = node.args[0] if is_op(node, aten.reshape.default) else None
    product = real.args[0] if is_op(real, aten.view_as_real.default) else None
    if not is_mul(product):
        return None
    for turned, freqs in pairs(product):
        paired = turned.args[0] if is_op(turned, aten.view_as_complex.default) else None
        if not is_op(paired, aten.reshape.default) or not is_tensor(freqs) or not dtype(freqs).is_complex:
            continue
        # The pairs may have been cut straight out of a product [1, T, H * D]: x is then reshaped to the heads.
        nodes = (paired, turned, product, real, node)
        return {"x": paired.args[0], "freqs": freqs, "style": "interleaved", "nodes": nodes}
    return None


def _partial(node: fx.Node) -> dict[str, Any] | None:
    """``cat([gs.rope(x[..., :r]), x[..., r:]])``."""
    if (parts := _two_parts(node)) is None or parts[2] != "half" or not is_gs(parts[0], "rope"):
        return None
    rotated, rest, _ = parts
    head, tail = last_dim_slice(rotated.args[0]), last_dim_slice(rest)
    if head is None or tail is None or head[0] is not tail[0]:
        return None
    width, rotary = shape(head[0])[-1], shape(rotated)[-1]
    if head[1:] != (0, rotary, 1) or tail[1:] != (rotary, width, 1):
        return None
    return {"x": head[0], "rotated": rotated, "nodes": (rotated, node)}


_FORMS: tuple[Callable[[fx.Node], dict[str, Any] | None], ...] = (
    _rotation_sum,
    _rotation_parts,
    _rotation_complex,
    _partial,
)


def pattern(node: fx.Node) -> Match | None:
    for form in _FORMS:
        if (found := form(node)) is not None:
            return Match(node, found["nodes"], found)
    return None


def _result(match: Match) -> tuple[fx.Node, fx.Node]:
    """``(input, last node)`` with the casts around the rotation included where the result has the input's dtype."""
    node, x = match.root, strip_cast(match["x"])
    if not same_shape(shape(x), shape(node)):
        x = match["x"]
    if dtype(node) == dtype(x):
        return x, node
    user = only_user(node)
    if user is not None and is_cast(user) and dtype(user) == dtype(x):
        return x, user
    return match["x"], node


def _heads_axis(table: fx.Node, x: fx.Node) -> int | None:
    """Which axis of a table that broadcasts against x [1, H, T, D] or [1, T, H, D] stands for the heads; -1: none."""
    tokens = next((axis for axis in (1, 2) if not isinstance(shape(x)[axis], int)), None)
    sizes = (1,) * (4 - rank(table)) + tuple(shape(table))
    if tokens is None or len(sizes) != 4 or sizes[0] != 1 or not same_size(sizes[tokens], shape(x)[tokens]):
        return None
    heads = 3 - tokens
    return heads if sizes[heads] == 1 else None


def check(match: Match, ctx: PassContext) -> str | None:
    if "rotated" in match.captures:
        return None if only_user(match["rotated"]) is match.root else "the rotated part is used elsewhere too"
    x, last = _result(match)
    if match["style"] not in ("half", "interleaved", "interleaved_to_half"):
        return f"columns go from {match['style'].replace('_to_', ' to ')} layout, which gs.rope does not write"
    if rank(last) != 4 or shape(last)[0] != 1:
        return f"the rotated tensor is {list(shape(last))}, neither [1, H, T, D] nor [1, T, H, D]"
    if not same_shape(shape(x), shape(last)) and reshape_arg(shape(last)) is None:
        return f"{list(shape(x))} cannot be reshaped to {list(shape(last))}"
    if dtype(x) != dtype(last) or dtype(x) not in FLOATS:
        return f"the input is {dtype(x)}, the result {dtype(last)}"
    tables = (match["freqs"],) if "freqs" in match.captures else (match["cos"], match["sin"])
    for table in tables:
        if _heads_axis(table, last) is None:
            return f"the table {list(shape(table))} does not give one row a token of {list(shape(last))}"
    return None


def _table(ctx: PassContext, table: fx.Node, x: fx.Node) -> fx.Node:
    """The table as [1, T, C]."""
    heads = _heads_axis(table, x)
    assert heads is not None
    if rank(table) == 4:
        if is_op(table, aten.unsqueeze.default) and table.args[1] == heads:
            return table.args[0]
        return ctx.emit(aten.squeeze.dim, table, heads)
    return table if rank(table) == 3 else ctx.emit(aten.unsqueeze.default, table, 0)


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    op = torch.ops.gs.rope.default
    if "rotated" in match.captures:
        _, cos, sin, style, heads_first = match["rotated"].args
        return {match.root: ctx.emit(op, match["x"], cos, sin, style, heads_first)}
    x, last = _result(match)
    style = match["style"]
    with ctx.graph.inserting_before(last):
        if not same_shape(shape(x), shape(last)):
            x = ctx.emit(aten.reshape.default, x, reshape_arg(shape(last)))
        if "freqs" in match.captures:
            heads = _heads_axis(match["freqs"], x)
            turns = ctx.emit(aten.view_as_real.default, _table(ctx, match["freqs"], x))
            tables = [ctx.emit(aten.select.int, turns, rank(turns) - 1, part) for part in (0, 1)]
        else:
            heads = _heads_axis(match["cos"], x)
            tables = [_table(ctx, match[name], x) for name in ("cos", "sin")]
        if "freqs" in match.captures or "narrow" in match.captures:
            tables = [_widened(ctx, table, style) for table in tables]
        wide = dtype(match["x"])
        if wide != dtype(x):  # the products were formed in the wider dtype: keep that
            tables = [t if dtype(t) == wide else ctx.emit(aten.to.dtype, t, wide) for t in tables]
        return {last: ctx.emit(op, x, *tables, style, heads == 1)}


def _widened(ctx: PassContext, table: fx.Node, style: str) -> fx.Node:
    """A table of one value a pair, as one value a column of the result."""
    if style == "interleaved":
        return ctx.emit(aten.repeat_interleave.self_int, table, 2, rank(table) - 1)
    return ctx.emit(aten.cat.default, [table, table], rank(table) - 1)


PASS = Pass("rope", replacement, pattern=pattern, check=check, tier="approximate", tolerance=4.0)
