"""RMSNorm and LayerNorm, alone and fused with the residual add before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.kernels.quantize import fake_quantized_rows, quantize_rows
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


def norm_add(
    x: Tensor, weight: Tensor | None, residual: Tensor, eps: float, offset: float, weight_fp32: bool
) -> Tensor:
    """``residual + rms_norm(x)`` rounded to ``x.dtype`` (a norm after the sublayer, as in OLMo 2)."""
    return residual + rms_norm(x, weight, eps, offset, weight_fp32)


def norm_add_rms_norm(
    x: Tensor,
    post_weight: Tensor | None,
    residual: Tensor,
    weight: Tensor | None,
    post_eps: float,
    eps: float,
    offset: float,
    weight_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """Gemma's sandwich: the norm after one sublayer, the residual add, and the norm before the next one.

    Args:
        x: ``[*, D]``, the sublayer's output.
        post_weight: ``[D]`` or None, of the norm of ``x``.
        residual: ``[*, D]``.
        weight: ``[D]`` or None, of the norm of the sum.
        post_eps: of the first norm.
        eps: of the second.
        offset: of both, see :func:`rms_norm`.
        weight_fp32: of both.

    Returns:
        The normed sum and the sum (rounded to ``x.dtype`` before it is normed), both ``[*, D]``.
    """
    total = norm_add(x, post_weight, residual, post_eps, offset, weight_fp32)
    return rms_norm(total, weight, eps, offset, weight_fp32), total


def rms_norm_quant(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_fp32: bool, dtype: str
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` quantized by row: ``[*, D]`` in ``dtype`` (int8 or float8_e4m3fn) and scales ``[*, 1]``."""
    return quantize_rows(rms_norm(x, weight, eps, offset, weight_fp32), dtype)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_fp32: bool, dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm` with its normed result quantized by row: quantized, scales ``[*, 1]``, sum."""
    normed, total = add_rms_norm(x, residual, weight, eps, offset, weight_fp32)
    return *quantize_rows(normed, dtype), total


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


def _fake_rms_norm_quant(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return fake_quantized_rows(x, str(arguments[-1]))


def _fake_add_rms_norm_quant(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    return *fake_quantized_rows(x, str(arguments[-1])), _like(x)


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
register(
    "norm_add(Tensor x, Tensor? weight, Tensor residual, float eps, float offset, bool weight_fp32) -> Tensor",
    norm_add,
    _like,
)
register(
    "norm_add_rms_norm(Tensor x, Tensor? post_weight, Tensor residual, Tensor? weight, float post_eps, float eps,"
    " float offset, bool weight_fp32) -> (Tensor, Tensor)",
    norm_add_rms_norm,
    _like_twice,
)
register(
    "rms_norm_quant(Tensor x, Tensor? weight, float eps, float offset, bool weight_fp32, str dtype)"
    " -> (Tensor, Tensor)",
    rms_norm_quant,
    _fake_rms_norm_quant,
)
register(
    "add_rms_norm_quant(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool weight_fp32,"
    " str dtype) -> (Tensor, Tensor, Tensor)",
    add_rms_norm_quant,
    _fake_add_rms_norm_quant,
)
