"""Rotary position embedding (Su et al. 2021, section 3.4) on a given cos/sin table."""

from __future__ import annotations

import torch
from torch import Tensor

from graphserve.kernels.registry import register

STYLES = ("half", "interleaved", "interleaved_to_half")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Rotate the first C columns of ``x [..., D]``; ``cos`` and ``sin`` ``[..., C]`` broadcast against x.

    Tables hold one value per *column*, in the layout of the result. ``half`` pairs column i with i + C/2,
    ``interleaved`` pairs 2i with 2i + 1, ``interleaved_to_half`` reads pairs (2i, 2i + 1) and writes the results to
    columns i and i + C/2 (DeepSeek). Columns from C on pass through. Products are formed in the wider of the
    two dtypes, the result is rounded to ``x.dtype``.

    Raises:
        ValueError: unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"rope style {style!r} is unknown: use one of {', '.join(STYLES)}")
    rotary = cos.shape[-1]
    head, rest = x[..., :rotary], x[..., rotary:]
    if style == "interleaved":
        partner = torch.stack((-head[..., 1::2], head[..., 0::2]), dim=-1).flatten(-2)
    else:
        if style == "interleaved_to_half":
            head = torch.cat((head[..., 0::2], head[..., 1::2]), dim=-1)
        first, second = head[..., : rotary // 2], head[..., rotary // 2 :]
        partner = torch.cat((-second, first), dim=-1)
    rotated = (head * cos + partner * sin).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rope(x: Tensor, cos: Tensor, sin: Tensor, style: str, heads_first: bool) -> Tensor:
    """Rotate ``x [1, H, T, D]`` (``heads_first``) or ``[1, T, H, D]`` by ``cos``/``sin [1, T, C]``; same shape back."""
    axis = 1 if heads_first else 2
    return rotate(x, cos.unsqueeze(axis), sin.unsqueeze(axis), style).contiguous()


def _fake(x: Tensor, cos: Tensor, sin: Tensor, style: str, heads_first: bool) -> Tensor:
    return x.new_empty(x.shape)


register("rope(Tensor x, Tensor cos, Tensor sin, str style, bool heads_first) -> Tensor", rope, _fake)
