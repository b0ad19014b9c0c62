"""Linear layers on int8 or fp8 weights with one scale a row, and the two steps that make such a weight.

The weight is quantized like the rows of an activation (:mod:`graphserve.kernels.quantize`): a scale for each output
channel. Both scales are factors of whole sums, so that the product itself runs on the quantized values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphserve.kernels.quantize import quantize_rows
from graphserve.kernels.registry import register


def quantize_weight(weight: Tensor, dtype: str) -> Tensor:
    """``weight [N, K]`` in ``dtype`` (int8 or float8_e4m3fn), quantized by row."""
    return quantize_rows(weight, dtype)[0]


def weight_scale(weight: Tensor, dtype: str) -> Tensor:
    """The fp32 scales ``[N]`` of :func:`quantize_weight`."""
    return quantize_rows(weight, dtype)[1].reshape(-1)


def linear_w8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``(x @ weight.T) * scale + bias`` in fp32, result ``[*, N]`` in ``x.dtype``.

    Args:
        x: ``[*, K]``, a float dtype.
        weight: ``[N, K]`` int8 or float8_e4m3fn.
        scale: ``[N]`` fp32.
        bias: ``[N]`` or None.
    """
    return _finish(x.float() @ weight.float().t(), scale, bias).to(x.dtype)


def linear_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: str
) -> Tensor:
    """``(x @ weight.T) * x_scale * weight_scale + bias``; the sum over K is exact for int8, fp32 for fp8.

    Args:
        x: ``[*, K]`` int8 or float8_e4m3fn.
        x_scale: ``[*, 1]`` fp32.
        weight: ``[N, K]`` in x's dtype.
        weight_scale: ``[N]`` fp32.
        bias: ``[N]`` or None.
        dtype: of the result ``[*, N]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype != torch.int8:
        product = rows.float() @ weight.float().t()
    elif x.device.type == "cpu":
        product = torch._int_mm(rows, weight.t()).float()
    else:
        product = (rows.double() @ weight.double().t()).float()  # sums of products of bytes are exact in fp64
    product = product.reshape(*x.shape[:-1], weight.shape[0]) * x_scale
    return _finish(product, weight_scale, bias).to(getattr(torch, dtype))


def _finish(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return product * scale if bias is None else product * scale + bias.float()


def _fake_weight(weight: Tensor, dtype: str) -> Tensor:
    return weight.new_empty(weight.shape, dtype=getattr(torch, dtype))


def _fake_scale(weight: Tensor, dtype: str) -> Tensor:
    return weight.new_empty(weight.shape[:1], dtype=torch.float32)


def _fake_w8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=getattr(torch, dtype))


register("quantize_weight(Tensor weight, str dtype) -> Tensor", quantize_weight, _fake_weight)
register("weight_scale(Tensor weight, str dtype) -> Tensor", weight_scale, _fake_scale)
register("linear_w8(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", linear_w8, _fake_w8)
register(
    "linear_w8a8(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str dtype) -> Tensor",
    linear_w8a8,
    _fake_w8a8,
)
