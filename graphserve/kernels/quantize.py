"""Rows as int8 or fp8 with one scale each, chosen from the row's largest value (symmetric, dynamic)."""

from __future__ import annotations

import torch
from torch import Tensor

from graphserve.kernels.quantized_types import QUANTIZED_MAX, SMALLEST_ABSMAX
from graphserve.kernels.registry import register


def quantize_rows(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Quantize each row of the last dimension.

    Args:
        x: ``[*, D]``, any float dtype.
        dtype: ``int8`` or ``float8_e4m3fn``.

    Returns:
        ``[*, D]`` in ``dtype``, rounded to the nearest even, and fp32 scales ``[*, 1]``: ``x ~ q * scale``.

    Raises:
        ValueError: unknown dtype.
    """
    if dtype not in QUANTIZED_MAX:
        raise ValueError(f"quantized dtype {dtype!r} is unknown: use one of {', '.join(QUANTIZED_MAX)}")
    limit = QUANTIZED_MAX[dtype]
    wide = x.float()
    absmax = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    # A number divided by a tensor would be its reciprocal times the number, rounded twice: kernels divide once.
    scaled = (wide * (torch.full_like(absmax, limit) / absmax)).clamp(-limit, limit)
    quantized = scaled.round().to(torch.int8) if dtype == "int8" else scaled.to(torch.float8_e4m3fn)
    return quantized.contiguous(), absmax / limit


def fake_quantized_rows(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Empty results of :func:`quantize_rows`, for the shape functions of ops that end in it."""
    return x.new_empty(x.shape, dtype=getattr(torch, dtype)), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


register("quantize_rows(Tensor x, str dtype) -> (Tensor, Tensor)", quantize_rows, fake_quantized_rows)
