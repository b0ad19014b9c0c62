"""Attention over the paged KV cache: prefill, decode and mixed batches in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphserve.kernels.attention_parts import AttentionShape
from graphserve.kernels.quantize import fake_quantized_rows, quantize_rows
from graphserve.kernels.registry import register


def visible_keys(query_positions: Tensor, key_positions: Tensor, window: int, chunk: int, causal: bool) -> Tensor:
    """The attention rule as a boolean ``[Q, K]``: which keys a query may see (True = visible).

    ``causal``: j <= i. ``window``: i - j < window (for a bidirectional rule, \\|i - j\\| < window).
    ``chunk``: j // chunk == i // chunk.
    """
    i, j = query_positions[:, None], key_positions[None, :]
    visible = (j <= i) if causal else torch.ones_like(i >= j)
    if window:
        visible = visible & ((i - j).abs() < window)
    if chunk:
        visible = visible & (i // chunk == j // chunk)
    return visible


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    causal: bool,
) -> Tensor:
    """Attention of one sequence in fp32 with the whole score matrix in memory, twice at most.

    Args:
        q: ``[Q, Hq, Dk]``.
        k: ``[K, Hkv, Dk]``, keys of positions 0..K-1; query head h reads key head ``h // (Hq / Hkv)``.
        v: ``[K, Hkv, Dv]``.
        query_positions: ``[Q]``.
        sinks: ``[Hq]`` logits of one extra key with value zero, or None.
        alibi: ``[Hq]`` slopes; ``slope * (j - i)`` is added to a score (Press et al. 2021), or None.
        scale: factor of q.k, before the soft cap.
        window: see :func:`visible_keys`; 0 for none.
        chunk: see :func:`visible_keys`; 0 for none.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        causal: see :func:`visible_keys`.

    Returns:
        ``[Q, Hq, Dv]`` fp32; a query that sees no key gets zeros.
    """
    groups = q.shape[1] // k.shape[1]
    key_positions = torch.arange(k.shape[0], device=k.device)
    grouped = q.float().unflatten(1, (-1, groups))  # [Q, Hkv, groups, Dk]: query heads that share a key head
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k.float()).flatten(0, 1).mul_(scale)  # [Hq, Q, K]
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    if alibi is not None:
        scores.addcmul_(alibi.float()[:, None, None], (key_positions[None, :] - query_positions[:, None]).float())
    scores.masked_fill_(~visible_keys(query_positions, key_positions, window, chunk, causal), float("-inf"))
    if sinks is not None:
        extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, extra), dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num_(0.0)[..., : k.shape[0]].unflatten(0, (-1, groups))
    result = torch.einsum("hgqk,khd->hgqd", weights, v.float())  # heads first: in another order it copies the weights
    return result.flatten(0, 1).transpose(0, 1)


def paged_attention(
    q: Tensor,
    kv_k: Tensor,
    kv_v: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    causal: bool,
) -> Tensor:
    """Attention of every query token over its own sequence's cached keys and values (already written).

    Query j of sequence s stands at position ``seq_lens[s] - query_len[s] + j``. This reference gathers each context,
    by parts of :class:`~graphserve.kernels.attention_parts.AttentionShape`, and is the oracle of the generated kernels,
    which do not gather.

    Args:
        q: ``[T, Hq, Dk]``.
        kv_k: ``[num_blocks, Hkv, block_size, Dk]``.
        kv_v: ``[num_blocks, Hkv, block_size, Dv]``.
        block_table: ``[S, B]`` int32, blocks of each sequence in order.
        query_start_loc: ``[S + 1]`` int32, first token of each sequence.
        seq_lens: ``[S]`` int32, context length after this step.
        sinks: see :func:`attend`, like every argument from here on.
        alibi: see :func:`attend`.
        scale: see :func:`attend`.
        window: see :func:`attend`.
        chunk: see :func:`attend`.
        softcap: see :func:`attend`.
        causal: see :func:`attend`.

    Returns:
        ``[T, Hq*Dv]`` in ``q.dtype``; zeros for tokens from ``query_start_loc[-1]`` on.
    """
    where = (block_table, query_start_loc, seq_lens)
    rule = (scale, window, chunk, softcap, causal)
    return _attend_paged(q, kv_k, kv_v, *where, 1.0, 1.0, q.dtype, sinks, alibi, *rule)


def paged_attention_quant(
    q: Tensor,
    kv_k: Tensor,
    kv_v: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """:func:`paged_attention` over a quantized cache, with a quantized result, or both.

    Args:
        q: see :func:`paged_attention`, like every argument that is not named here.
        kv_k: as there; float8_e4m3fn where ``k_scale`` is given: a key is ``k_scale`` times what is stored.
        kv_v: as ``kv_k``, with ``v_scale``.
        block_table: as there.
        query_start_loc: as there.
        seq_lens: as there.
        sinks: as there.
        alibi: as there.
        k_scale: ``[1]`` fp32, or None.
        v_scale: ``[1]`` fp32, or None.
        out_scale: ``[1]`` fp32, or None: what is stored is the result divided by it, saturated and rounded.
        scale: as there.
        window: as there.
        chunk: as there.
        softcap: as there.
        causal: as there.
        out_dtype: float8_e4m3fn or int8 with ``out_scale``, else q's dtype.

    Returns:
        ``[T, Hq*Dv]`` in ``out_dtype``.
    """
    k_factor = 1.0 if k_scale is None else k_scale.item()
    v_factor = 1.0 if v_scale is None else v_scale.item()
    where = (block_table, query_start_loc, seq_lens)
    rule = (scale, window, chunk, softcap, causal)
    out = _attend_paged(q, kv_k, kv_v, *where, k_factor, v_factor, torch.float32, sinks, alibi, *rule)
    if out_scale is None:
        return out.to(out_dtype)
    out = out / out_scale
    if out_dtype == torch.int8:
        return out.clamp(-128, 127).round().to(torch.int8)
    limit = torch.finfo(out_dtype).max
    return out.clamp(-limit, limit).to(out_dtype)


def _attend_paged(
    q: Tensor,
    kv_k: Tensor,
    kv_v: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    k_factor: float,
    v_factor: float,
    dtype: torch.dtype,
    sinks: Tensor | None,
    alibi: Tensor | None,
    *rule: Any,
) -> Tensor:
    """``[T, Hq*Dv]`` in ``dtype``, key heads and queries of each sequence by parts."""
    shape = AttentionShape(q.shape[1], kv_k.shape[1], kv_k.shape[3], kv_v.shape[3])
    groups = shape.num_heads // shape.num_kv_heads
    out = torch.zeros((q.shape[0], shape.num_heads, shape.v_dim), dtype=dtype, device=q.device)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for s, seq_len in enumerate(lens):
        first, last = starts[s], starts[s + 1]
        if first == last:
            continue
        blocks = block_table[s, : -(-seq_len // kv_k.shape[2])].long()
        positions = torch.arange(seq_len - (last - first), seq_len, device=q.device)
        part = shape.part(last - first, seq_len)
        for kv_head in range(0, shape.num_kv_heads, part.num_kv_heads):
            kv_heads = slice(kv_head, kv_head + part.num_kv_heads)
            heads = slice(kv_heads.start * groups, kv_heads.stop * groups)
            k = _context(kv_k[:, kv_heads], blocks, k_factor)[:seq_len]
            v = _context(kv_v[:, kv_heads], blocks, v_factor)[:seq_len]
            of_heads = (None if sinks is None else sinks[heads], None if alibi is None else alibi[heads])
            parts = (x.split(part.num_queries) for x in (q[first:last, heads], positions, out[first:last, heads]))
            for queries, where, result in zip(*parts, strict=True):
                result.copy_(attend(queries, k, v, where, *of_heads, *rule))
            del k, v  # before those of the next heads are made
    return out.flatten(1)


def _context(cache: Tensor, blocks: Tensor, factor: float) -> Tensor:
    """``[len(blocks) * block_size, H, D]`` fp32 of a cache ``[num_blocks, H, block_size, D]``."""
    rows = cache[blocks].transpose(1, 2).float().flatten(0, 1)
    return rows if factor == 1.0 else rows.mul_(factor)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    causal: bool,
) -> Tensor:
    """Attention of whole sequences that lie one behind the other, without a cache (encoders).

    Args:
        q: ``[T, Hq, Dk]``; may be a column slice, like k and v.
        k: ``[T, Hkv, Dk]``.
        v: ``[T, Hkv, Dv]``.
        query_start_loc: ``[S + 1]`` int32, first token of each sequence.
        sinks: see :func:`attend`, like every argument from here on.
        alibi: see :func:`attend`.
        scale: see :func:`attend`.
        window: see :func:`attend`.
        chunk: see :func:`attend`.
        softcap: see :func:`attend`.
        causal: see :func:`attend`.

    Returns:
        ``[T, Hq*Dv]`` in ``q.dtype``; zeros for tokens from ``query_start_loc[-1]`` on.
    """
    out = q.new_zeros((q.shape[0], q.shape[1] * v.shape[2]))
    starts = query_start_loc.tolist()
    for first, last in zip(starts, starts[1:], strict=False):
        if first == last:
            continue
        positions = torch.arange(last - first, device=q.device)
        rule = (positions, sinks, alibi, scale, window, chunk, softcap, causal)
        out[first:last] = attend(q[first:last], k[first:last], v[first:last], *rule).flatten(1).to(q.dtype)
    return out


def paged_attention_quant_rows(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """:func:`paged_attention` followed by :func:`graphserve.kernels.quantize.quantize_rows`.

    Args:
        q: as in :func:`paged_attention`, like all further arguments but the last.
        rest: the last one is the quantized dtype, ``int8`` or ``float8_e4m3fn``.

    Returns:
        ``[T, Hq*Dv]`` quantized by rows, and fp32 scales ``[T, 1]``.
    """
    *arguments, dtype = rest
    return quantize_rows(paged_attention(q, *arguments), dtype)


def _fake(q: Tensor, kv_k: Tensor, kv_v: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] * kv_v.shape[3]))


register(
    "paged_attention(Tensor q, Tensor kv_k, Tensor kv_v, Tensor block_table, Tensor query_start_loc, Tensor seq_lens,"
    " Tensor? sinks, Tensor? alibi, float scale, int window, int chunk, float softcap, bool causal) -> Tensor",
    paged_attention,
    _fake,
)


def _fake_quant(q: Tensor, kv_k: Tensor, kv_v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] * kv_v.shape[3]), dtype=rest[-1])


def _fake_packed(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] * v.shape[2]))


register(
    "paged_attention_quant(Tensor q, Tensor kv_k, Tensor kv_v, Tensor block_table, Tensor query_start_loc,"
    " Tensor seq_lens, Tensor? sinks, Tensor? alibi, Tensor? k_scale, Tensor? v_scale, Tensor? out_scale,"
    " float scale, int window, int chunk, float softcap, bool causal, ScalarType out_dtype) -> Tensor",
    paged_attention_quant,
    _fake_quant,
)
register(
    "paged_attention_quant_rows(Tensor q, Tensor kv_k, Tensor kv_v, Tensor block_table, Tensor query_start_loc,"
    " Tensor seq_lens, Tensor? sinks, Tensor? alibi, float scale, int window, int chunk, float softcap, bool causal,"
    " str dtype) -> (Tensor, Tensor)",
    paged_attention_quant_rows,
    lambda q, kv_k, kv_v, *rest: fake_quantized_rows(_fake(q, kv_k, kv_v), rest[-1]),
)
register(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor query_start_loc, Tensor? sinks, Tensor? alibi,"
    " float scale, int window, int chunk, float softcap, bool causal) -> Tensor",
    packed_attention,
    _fake_packed,
)
