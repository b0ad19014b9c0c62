"""Token embedding: rows of a table by id."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphserve.kernels.registry import register


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """``ids [*]`` int64 and ``weight [V, H]`` give ``[*, H]`` in ``weight.dtype``; ids must lie in ``0..V-1``."""
    return F.embedding(ids, weight)


def _fake(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


register("embedding(Tensor ids, Tensor weight) -> Tensor", embedding, _fake)
