"""Gumbel noise as a stateless hash of a row's key and a token id: the one definition, for torch and for Triton.

The argmax of ``logit + g`` with independent Gumbel noise ``g`` is a draw from the softmax (Gumbel 1954; Maddison et al.
2014). Noise that is a function of (key, token id) needs no generator state, so a row's draw cannot depend on the rows
beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hash_bits(ids: Any, first: Any, second: Any) -> Any:
    """31 random bits for each token id, from the two words of a row's key.

    murmur3's 32-bit finalizer, with the second word mixed in between, so that rows whose first words differ by a
    multiple of the token stride still share no noise. Only int32 operators that wrap around, so that the same text
    works on torch and numpy arrays and as the body of a Triton function.
    """
    h = ids * -1640531535 + first  # 0x9E3779B1, the golden ratio
    h = h ^ ((h >> 16) & 0xFFFF)  # int32 shifts copy the sign bit
    h = h * -2048144789  # 0x85EBCA6B
    h = h ^ second
    h = h ^ ((h >> 13) & 0x7FFFF)
    h = h * -1028477387  # 0xC2B2AE35
    h = h ^ ((h >> 16) & 0xFFFF)
    return (h >> 1) & 0x7FFFFFFF


def gumbel_noise(ids: Tensor, keys: Tensor) -> Tensor:
    """Standard Gumbel noise, a function of each (key, token id) alone.

    Args:
        ids: int32 ``[rows or 1, n]`` token ids.
        keys: int32 ``[rows, 2]``.

    Returns:
        float32 ``[rows, n]``.
    """
    bits = hash_bits(ids, keys[:, :1], keys[:, 1:])
    # u in (0, 1) with full relative precision near 0, where -log1p(-u) is small and the winners of a race lie. The
    # upper bound keeps u below 1 in float32.
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return -(-torch.log1p(-u)).log()
