"""RMSNorm and LayerNorm, alone and fused with the residual add before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.kernels.registry import register


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_fp32: bool) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Args:
        x: ``[*, D]``, any float dtype; the mean of squares is taken in fp32.
        weight: ``[D]`` or None for no scale.
        eps: added to the mean of squares.
        offset: added to the weight (1.0 for Gemma's zero-centred weights).
        weight_fp32: False rounds the normed value to ``x.dtype`` before the scale (Llama), True scales in fp32 and
            rounds once (Gemma). The two differ in bf16 only.

    Returns:
        ``[*, D]`` in ``x.dtype``.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if weight_fp32:
        return (normed * (offset + weight.float())).to(x.dtype)
    scale = weight + offset if offset else weight
    return (scale * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_fp32: bool
) -> tuple[Tensor, Tensor]:
    """``residual + x`` rounded to ``x.dtype``, and its RMSNorm; both ``[*, D]``, normed first."""
    total = residual + x
    return rms_norm(total, weight, eps, offset, weight_fp32), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension of ``x [*, D]`` with optional ``weight [D]`` and ``bias [D]``."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``residual + x`` rounded to ``x.dtype``, and its LayerNorm; both ``[*, D]``, normed first."""
    total = residual + x
    return layer_norm(total, weight, bias, eps), total


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_twice(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


register("rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool weight_fp32) -> Tensor", rms_norm, _like)
register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool weight_fp32)"
    " -> (Tensor, Tensor)",
    add_rms_norm,
    _like_twice,
)
register("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", layer_norm, _like)
register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    add_layer_norm,
    _like_twice,
)
