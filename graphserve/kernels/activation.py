"""Elementwise activations and the gated product of GLU layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.kernels.quantize import fake_quantized_rows, quantize_rows
from graphserve.kernels.registry import register

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "none": lambda x: x.clone(),
}


def apply_activation(x: Tensor, act: str) -> Tensor:
    """Apply the activation called ``act`` elementwise, rounding once to ``x.dtype`` (``none`` copies).

    Raises:
        ValueError: the name is not one of :data:`ACTIVATIONS`.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is unknown: use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act](x)


def activation(x: Tensor, act: str) -> Tensor:
    """``act(x)`` for ``x [*, I]``; result contiguous in ``x.dtype``."""
    return apply_activation(x, act).contiguous()


def act_mul(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) * up`` for ``[*, I]`` tensors (columns of one merged buffer are allowed); rounds after each step."""
    return (apply_activation(gate, act) * up).contiguous()


def act_mul_quant(gate: Tensor, up: Tensor, act: str, dtype: str) -> tuple[Tensor, Tensor]:
    """:func:`act_mul` quantized by row: ``[*, I]`` in ``dtype`` (int8 or float8_e4m3fn) and scales ``[*, 1]``."""
    return quantize_rows(act_mul(gate, up, act), dtype)


def _fake_act_mul_quant(gate: Tensor, up: Tensor, act: str, dtype: str) -> tuple[Tensor, Tensor]:
    return fake_quantized_rows(gate, dtype)


def _fake_activation(x: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_act_mul(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape)


register("activation(Tensor x, str act) -> Tensor", activation, _fake_activation)
register("act_mul(Tensor gate, Tensor up, str act) -> Tensor", act_mul, _fake_act_mul)
register(
    "act_mul_quant(Tensor gate, Tensor up, str act, str dtype) -> (Tensor, Tensor)", act_mul_quant, _fake_act_mul_quant
)
