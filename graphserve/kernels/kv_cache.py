"""Writing keys and values into the paged cache, alone and fused with the norm and rotation before it.

One layer's cache is ``kv_k [num_blocks, Hkv, block_size, Dk]`` and ``kv_v [..., Dv]``, strided views into the pool
whose inner three dimensions are contiguous. ``slot = block * block_size + offset``. Block 0 is the null block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphserve.kernels.norm import rms_norm
from graphserve.kernels.registry import register
from graphserve.kernels.rope import rotate


def kv_write(k: Tensor, v: Tensor, kv_k: Tensor, kv_v: Tensor, slot_mapping: Tensor) -> None:
    """Store ``k [T, Hkv, Dk]`` and ``v [T, Hkv, Dv]`` at ``slot_mapping [T]``; changes ``kv_k`` and ``kv_v``."""
    block_size = kv_k.shape[2]
    block = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offset = slot_mapping - block * block_size
    kv_k[block, :, offset] = k.to(kv_k.dtype)
    kv_v[block, :, offset] = v.to(kv_v.dtype)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_table: Tensor | None,
    sin_table: Tensor | None,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    kv_k: Tensor,
    kv_v: Tensor,
    slot_mapping: Tensor,
    eps: float,
    offset: float,
    weight_fp32: bool,
    style: str,
) -> Tensor:
    """Norm q and k per head, rotate both, store k and v, return q.

    Args:
        q: ``[T, Hq, D]``; may be a column slice (row stride larger than Hq*D), like k and v.
        k: ``[T, Hkv, D]``.
        v: ``[T, Hkv, Dv]``.
        cos_table: ``[L, C]``, one row a position, one value a column of the result; None for no rotation.
        sin_table: as ``cos_table``.
        positions: ``[T]`` int64 rows of the tables.
        q_norm: ``[D]`` RMSNorm weight for each query head, None for no norm.
        k_norm: the same for keys.
        kv_k: ``[num_blocks, Hkv, block_size, D]``, changed at the slots.
        kv_v: ``[num_blocks, Hkv, block_size, Dv]``, changed at the slots.
        slot_mapping: ``[T]`` int64.
        eps: of both norms.
        offset: added to both norm weights.
        weight_fp32: see :func:`graphserve.kernels.norm.rms_norm`.
        style: see :func:`graphserve.kernels.rope.rotate`.

    Returns:
        ``[T, Hq, D]`` in ``q.dtype``, contiguous.
    """
    q, k = _prepared(q, k, cos_table, sin_table, positions, q_norm, k_norm, eps, offset, weight_fp32, style)
    kv_write(k, v, kv_k, kv_v, slot_mapping)
    return q.clone(memory_format=torch.contiguous_format)


def _prepared(
    q: Tensor,
    k: Tensor,
    cos_table: Tensor | None,
    sin_table: Tensor | None,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float,
    weight_fp32: bool,
    style: str,
) -> tuple[Tensor, Tensor]:
    """Queries and keys after norm and rotation."""
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps, offset, weight_fp32)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, offset, weight_fp32)
    if cos_table is not None and sin_table is not None:
        cos, sin = cos_table[positions].unsqueeze(1), sin_table[positions].unsqueeze(1)
        q, k = rotate(q, cos, sin, style), rotate(k, cos, sin, style)
    return q, k


def quantize_for_cache(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x`` divided by ``scale [1]`` fp32 (None for 1), saturated to ``dtype``'s limits (fp8) and rounded to it."""
    limit = torch.finfo(dtype).max
    wide = x.float() if scale is None else x.float() / scale
    return wide.clamp(-limit, limit).to(dtype)


def kv_write_quant(
    k: Tensor,
    v: Tensor,
    kv_k: Tensor,
    kv_v: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """:func:`kv_write` into an fp8 cache: what is stored is ``k / k_scale`` and ``v / v_scale``, saturated."""
    k, v = quantize_for_cache(k, k_scale, kv_k.dtype), quantize_for_cache(v, v_scale, kv_v.dtype)
    # Indexed stores are not implemented for fp8; bytes are.
    kv_write(k.view(torch.uint8), v.view(torch.uint8), kv_k.view(torch.uint8), kv_v.view(torch.uint8), slot_mapping)


def rope_kv_write_quant(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_table: Tensor | None,
    sin_table: Tensor | None,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    kv_k: Tensor,
    kv_v: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    eps: float,
    offset: float,
    weight_fp32: bool,
    style: str,
) -> Tensor:
    """:func:`rope_kv_write` into an fp8 cache, see :func:`kv_write_quant` for ``k_scale`` and ``v_scale``."""
    q, k = _prepared(q, k, cos_table, sin_table, positions, q_norm, k_norm, eps, offset, weight_fp32, style)
    kv_write_quant(k, v, kv_k, kv_v, slot_mapping, k_scale, v_scale)
    return q.clone(memory_format=torch.contiguous_format)


def _fake_kv_write_quant(k: Tensor, *_: object) -> None:
    return None


def _fake_kv_write(k: Tensor, v: Tensor, kv_k: Tensor, kv_v: Tensor, slot_mapping: Tensor) -> None:
    return None


def _fake_rope_kv_write(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


register(
    "kv_write(Tensor k, Tensor v, Tensor(a!) kv_k, Tensor(b!) kv_v, Tensor slot_mapping) -> ()",
    kv_write,
    _fake_kv_write,
)
register(
    "rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor? cos_table, Tensor? sin_table, Tensor positions,"
    " Tensor? q_norm, Tensor? k_norm, Tensor(a!) kv_k, Tensor(b!) kv_v, Tensor slot_mapping,"
    " float eps, float offset, bool weight_fp32, str style) -> Tensor",
    rope_kv_write,
    _fake_rope_kv_write,
)
register(
    "kv_write_quant(Tensor k, Tensor v, Tensor(a!) kv_k, Tensor(b!) kv_v, Tensor slot_mapping, Tensor? k_scale,"
    " Tensor? v_scale) -> ()",
    kv_write_quant,
    _fake_kv_write_quant,
)
register(
    "rope_kv_write_quant(Tensor q, Tensor k, Tensor v, Tensor? cos_table, Tensor? sin_table, Tensor positions,"
    " Tensor? q_norm, Tensor? k_norm, Tensor(a!) kv_k, Tensor(b!) kv_v, Tensor slot_mapping, Tensor? k_scale,"
    " Tensor? v_scale, float eps, float offset, bool weight_fp32, str style) -> Tensor",
    rope_kv_write_quant,
    _fake_rope_kv_write,
)
