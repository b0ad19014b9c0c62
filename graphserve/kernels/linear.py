"""Dense linear layer, the weight stored as ``[out, in]``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphserve.kernels.registry import register


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: ``x [*, K]``, ``weight [N, K]``, ``bias [N]``, result ``[*, N]`` in ``x.dtype``.

    Cost for M rows: ``2*M*N*K`` FLOPs, ``N*K`` weight elements read once.
    """
    return F.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``residual + linear(x)`` for ``residual [*, N]``, each of the two rounded to ``x.dtype``."""
    return residual + F.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear, _fake)
register("linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor", linear_add, _fake)
