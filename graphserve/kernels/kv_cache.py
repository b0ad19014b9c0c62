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
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps, offset, weight_fp32)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, offset, weight_fp32)
    if cos_table is not None and sin_table is not None:
        cos, sin = cos_table[positions].unsqueeze(1), sin_table[positions].unsqueeze(1)
        q, k = rotate(q, cos, sin, style), rotate(k, cos, sin, style)
    kv_write(k, v, kv_k, kv_v, slot_mapping)
    return q.clone(memory_format=torch.contiguous_format)


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
