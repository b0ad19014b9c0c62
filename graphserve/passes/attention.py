"""Attention gets its paged cache: keys and values are written, then read by block.

    q = gs.rope(norm(heads(x))); k = gs.rope(norm(heads(y))); v = heads(z)
    gs.attention_trace(q, k, v, ...)          (cos and sin gathered from one table, norms optional)
        →  q' = gs.rope_kv_write(x, y, z, cos_table, sin_table, positions, norms, kv_k, kv_v, slot_mapping, ...)
           gs.paged_attention(q', kv_k, kv_v, block_table, query_start_loc, seq_lens, ...)

    any other q, k, v
        →  gs.kv_write(k, v, kv_k, kv_v, slot_mapping); gs.paged_attention(q, ...)

A layer whose k and v are the very tensors that an earlier layer attended to reads that layer's cache and writes none.
Each attention node registers its :class:`CacheSpec` with the context, in graph order.

Legal for any q, k, v of one request's tokens; layers that share a cache must keep the same keys. Approximate: attention
sums in another order, and the rotation as ``rope.py`` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, dtype, is_gs, is_op, is_weight, rank, shape
from graphserve.plan.schema import CacheSpec


@dataclass(frozen=True)
class Heads:
    """How one of q, k, v comes about: a source, then an optional norm, then an optional rotation.

    ``source`` is [1, T, H*D], or [1, T, H, D] / [1, H, T, D] (``heads_first``) when it is no plain split into heads.
    """

    source: fx.Node
    heads: int
    dim: int
    heads_first: bool
    norm: fx.Node | None = None
    rope: fx.Node | None = None


def read_heads(node: fx.Node, steps: bool) -> Heads:
    """Walks up from [1, H, T, D] over transposes and, if ``steps``, one rotation and one norm above it."""
    heads, dim = int(shape(node)[1]), int(shape(node)[3])
    heads_first, norm, rope = True, None, None
    while True:
        if is_op(node, aten.transpose.int) and node.args[1:3] == (1, 2):
            heads_first = not heads_first
        elif steps and is_gs(node, "rope") and rope is None and norm is None and node.args[4] == heads_first:
            rope = node
        elif steps and is_gs(node, "rms_norm") and norm is None and is_weight(node.args[1]):
            norm = node
        else:
            break
        node = node.args[0]
    if not heads_first and is_op(node, aten.reshape.default) and rank(node.args[0]) == 3:
        merged: Any = node.args[0]
        if shape(merged)[0] == 1 and shape(merged)[-1] == heads * dim:
            return Heads(merged, heads, dim, False, norm, rope)
    return Heads(node, heads, dim, heads_first, norm, rope)


def find(graph: fx.Graph) -> Iterator[Match]:
    traced = [node for node in graph.nodes if is_gs(node, "attention_trace")]
    written: dict[tuple[Any, Any], int] = {}
    # Which layers share is decided on the graph as it was: a replacement changes q, k and v.
    shared = [written.setdefault((node.args[1], node.args[2]), i) for i, node in enumerate(traced)]
    for index, node in enumerate(traced):
        yield Match(node, (node,), {"index": index, "writer": shared[index]})


def _spec(node: fx.Node, shared_with: int | None) -> CacheSpec:
    _, k, v, _, _, _, window, chunk = node.args[:8]
    kv_dtype = str(dtype(k)).removeprefix("torch.")
    heads, k_dim, v_dim = (int(s) for s in (shape(k)[1], shape(k)[3], shape(v)[3]))
    return CacheSpec(heads, k_dim, v_dim, kv_dtype, window or None, chunk or None, shared_with)


def check(match: Match, ctx: PassContext) -> str | None:
    q, k, v = match.root.args[:3]
    if len(ctx.cache_layers) != match["index"]:
        return f"an earlier layer has no cache, so layer {match['index']} cannot get its own"
    if not dtype(q) == dtype(k) == dtype(v):
        return f"q, k and v are {dtype(q)}, {dtype(k)} and {dtype(v)}"
    if shape(q)[0] != 1:
        return f"q has {shape(q)[0]} batch rows, not 1"
    if int(shape(q)[1]) % int(shape(k)[1]) or shape(k)[1] != shape(v)[1]:
        return f"{shape(q)[1]} query heads do not divide among {shape(k)[1]} key and {shape(v)[1]} value heads"
    if match["writer"] != match["index"]:
        source, own = ctx.cache_layers[match["writer"]], _spec(match.root, None)
        if (source.window, source.chunk) != (own.window, own.chunk):
            return f"it reads the cache of layer {match['writer']}, which keeps other keys (window {source.window})"
    return None


def why_not_fused(q: Heads, k: Heads) -> str | None:
    """Why norm, rotation and write cannot be one op, or None."""
    if q.rope is None and k.rope is None and q.norm is None:
        return "q and k are neither normed nor rotated"
    if (q.rope is None) != (k.rope is None) or (q.norm is None) != (k.norm is None):
        return "q and k are treated differently"
    if q.rope is not None and k.rope is not None:
        if q.rope.args[1:] != k.rope.args[1:]:
            return "q and k are rotated by different tables"
        for table in q.rope.args[1:3]:
            if not is_gs(table, "embedding") or not is_weight(table.args[1]):
                return f"{table} is not gathered from a position table"
            if table.args[0].meta.get("gs_input") != "positions":
                return f"{table} is gathered by something other than the positions"
    if q.norm is not None and k.norm is not None and q.norm.args[2:] != k.norm.args[2:]:
        return "q and k are normed with different constants"
    return None


def _rows(ctx: PassContext, part: Heads) -> fx.Node:
    """[T, H, D], a view; the lowering makes it contiguous where its strides are none that a kernel takes."""
    node = ctx.emit(aten.transpose.int, part.source, 1, 2) if part.heads_first else part.source
    return ctx.emit(aten.reshape.default, node, [-1, part.heads, part.dim])


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    node, gs = match.root, torch.ops.gs
    q, k, v, sinks, _, scale, window, chunk, softcap, causal = node.args
    writer = match["writer"]
    layer = ctx.add_cache_layer(_spec(node, writer if writer != match["index"] else None))
    kv_k, kv_v = ctx.cache_inputs(writer)
    block_table, slot_mapping = ctx.group_inputs(writer)
    if writer != layer:
        queries = _rows(ctx, read_heads(q, steps=False))
    else:
        heads_q, heads_k = (read_heads(part, steps=True) for part in (q, k))
        if why_not_fused(heads_q, heads_k) is None:
            heads_v = read_heads(v, steps=False)
            queries = _fused_write(ctx, heads_q, heads_k, heads_v, kv_k, kv_v, slot_mapping)
        else:
            queries, keys, values = (_rows(ctx, read_heads(part, steps=False)) for part in (q, k, v))
            ctx.emit(gs.kv_write.default, keys, values, kv_k, kv_v, slot_mapping)
    starts, lens = ctx.step_input("query_start_loc"), ctx.step_input("seq_lens")
    cache = (kv_k, kv_v, block_table, starts, lens)
    rule = (sinks, None, scale, window, chunk, softcap, causal)
    out = ctx.emit(gs.paged_attention.default, queries, *cache, *rule)
    heads, v_dim = shape(node)[2:]
    return {node: ctx.emit(aten.reshape.default, out, [1, -1, heads, v_dim])}


def _fused_write(
    ctx: PassContext, q: Heads, k: Heads, v: Heads, kv_k: fx.Node, kv_v: fx.Node, slot_mapping: fx.Node
) -> fx.Node:
    cos = sin = None
    style = "half"
    if q.rope is not None:
        cos, sin = (table.args[1] for table in q.rope.args[1:3])
        style = q.rope.args[3]
    q_norm = q.norm.args[1] if q.norm is not None else None
    k_norm = k.norm.args[1] if k.norm is not None else None
    constants = q.norm.args[2:] if q.norm is not None else (0.0, 0.0, False)
    positions = ctx.emit(aten.reshape.default, ctx.step_input("positions"), [-1])
    rows = [_rows(ctx, part) for part in (q, k, v)]
    norms = (q_norm, k_norm)
    return ctx.emit(
        torch.ops.gs.rope_kv_write.default,
        *rows, cos, sin, positions, *norms, kv_k, kv_v, slot_mapping, *constants, style,
    )  # fmt: skip


PASS = Pass("attention", replacement, find=find, check=check, tier="approximate", tolerance=8.0)
