"""The router of a mixture of experts: scores, choice of the best experts, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from graphserve.kernels.registry import register

SCORES = ("softmax", "sigmoid", "none")
NORMALIZE = ("none", "sum", "softmax", "sigmoid")


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scores: str,
    normalize: str,
    eps: float,
    min_sum: float,
    scale: float,
    num_groups: int,
    top_groups: int,
    group_top: int,
    dtype: str,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` of E experts for each row.

    Args:
        logits: ``[N, E]``, any float dtype; everything is computed in fp32.
        bias: ``[E]`` or None, added to the scores for the choice alone, not for the weights (DeepSeek-V3).
        top_k: experts a row.
        scores: ``softmax`` or ``sigmoid`` of the logits, or ``none`` for the logits themselves.
        normalize: what makes the chosen scores weights: ``sum`` divides by their sum, ``softmax`` and ``sigmoid`` are
            taken of them, ``none`` leaves them.
        eps: added to that sum.
        min_sum: the sum is at least this.
        scale: factor of the weights.
        num_groups: 1, or the number of groups of E/num_groups neighbours that compete first.
        top_groups: groups that stay.
        group_top: a group's rank is the sum of so many of its best choices.
        dtype: of the weights.

    Returns:
        Weights ``[N, top_k]`` in ``dtype`` and expert ids ``[N, top_k]`` int64, best first. Which of two equal choices
        is taken is not defined.

    Raises:
        ValueError: ``scores`` or ``normalize`` is unknown.
    """
    if scores not in SCORES or normalize not in NORMALIZE:
        raise ValueError(f"scores={scores!r}, normalize={normalize!r}: use one of {SCORES} and one of {NORMALIZE}")
    wide = logits.float()
    score = wide.softmax(-1) if scores == "softmax" else wide.sigmoid() if scores == "sigmoid" else wide
    choice = score if bias is None else score + bias.float()
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        ranks = grouped.topk(group_top, dim=-1).values.sum(-1)
        kept = torch.zeros_like(ranks, dtype=torch.bool).scatter(-1, ranks.topk(top_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    ids = choice.topk(top_k, dim=-1).indices
    weights = score.gather(-1, ids)
    if normalize == "softmax":
        weights = weights.softmax(-1)
    elif normalize == "sigmoid":
        weights = weights.sigmoid()
    elif normalize == "sum":
        weights = weights / (weights.sum(-1, keepdim=True) + eps).clamp(min=min_sum)
    return (weights * scale).to(getattr(torch, dtype)), ids


def _fake(logits: Tensor, bias: Tensor | None, top_k: int, *arguments: object) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=getattr(torch, str(arguments[-1]))), logits.new_empty(shape, dtype=torch.int64)


register(
    "route(Tensor logits, Tensor? bias, int top_k, str scores, str normalize, float eps, float min_sum, float scale,"
    " int num_groups, int top_groups, int group_top, str dtype) -> (Tensor, Tensor)",
    route,
    _fake,
)
