"""Rows of logits and sampling parameters, and checks of what is drawn from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graphserve.runtime.step_input import sampling_keys


def random_scores(generator: torch.Generator, rows: int, vocab: int) -> Tensor:
    """Float32 ``[rows, vocab]`` of all kinds: peaked, flat, with ties, constant, mostly suppressed, far apart."""
    scale = 10.0 ** (torch.rand(rows, 1, generator=generator) * 3 - 1.5)
    scores = torch.randn(rows, vocab, generator=generator) * scale
    kind = torch.randint(0, 6, (rows, 1), generator=generator)
    scores = torch.where(kind == 0, scores.round(), scores)
    scores = torch.where(kind == 1, (scores * 2).round() / 64 + 7, scores)
    scores = torch.where(kind == 2, scores[:, :1].expand_as(scores), scores)
    hidden = torch.rand(rows, vocab, generator=generator) < 0.9
    hidden[:, 0] = False
    return torch.where((kind == 3) & hidden, -torch.inf, scores)


def random_limits(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """top_k int64, top_p float32 and log_min_p float32 of each row, each often off."""

    def pick(values: list[float]) -> Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (rows,), generator=generator)]

    top_k = pick([0, 0, 0, 1, 2, 5, 40, vocab - 1, vocab, vocab + 9]).clamp(min=0).long()
    top_p = pick([1.0, 1.0, 1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 2**-24])
    return top_k, top_p, pick([0.0, 0.0, 0.0, 0.0, 1e-30, 0.001, 0.05, 0.3, 1.0]).log()


def keys_of(rows: int, position: int = 0) -> Tensor:
    """int32 ``[rows, 2]``: the keys of seeds 0, 1, ... at one position."""
    return torch.from_numpy(sampling_keys(list(range(rows)), [position] * rows).view("int32"))


def kept_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Reference in float64: probabilities ``[vocab]`` after temperature, min-p, top-k and top-p; ties are kept."""
    probs = torch.softmax(logits.double() / temperature, -1)
    probs[probs < probs.max() * min_p] = 0
    if top_k:
        probs[probs < probs.sort(descending=True).values[min(top_k, len(probs)) - 1]] = 0
    probs /= probs.sum()
    if top_p < 1:
        ordered = probs.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered
        probs[probs < ordered[int((before < top_p).sum()) - 1]] = 0
    return probs / probs.sum()


def assert_distribution(tokens: list[int], probs: Tensor) -> None:
    """Chi-square test that tokens are drawn from ``probs``; cells that expect fewer than 5 draws are pooled."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs))
    assert counts[probs == 0].sum() == 0, "a token was drawn that is cut off"
    expected = probs * counts.sum()
    big = expected >= 5
    observed, wanted = counts[big].double(), expected[big]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    cells = int(big.sum())
    rest_observed, rest_wanted = float(counts[~big].sum()), float(expected[~big].sum())
    if rest_wanted >= 5:
        statistic += (rest_observed - rest_wanted) ** 2 / rest_wanted
        cells += 1
    freedom = max(cells - 1, 1)
    # Mean `freedom`, standard deviation sqrt(2 freedom): fixed seeds, so this passes always or never.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), f"chi-square {statistic:.1f} with {freedom} degrees"
