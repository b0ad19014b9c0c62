"""What every implementation of sampling agrees on, without torch: the hash behind its noise, and its constants."""

from __future__ import annotations

from typing import Any

GROUP = 128  # neighbouring tokens whose largest score stands beside the scores
INVALID_TOKEN = -1  # "token" of a row whose logits allow none
# Mass of the most likely token. Sums over 2**20 tokens stay below 2**60, and what is rounded away (less than 2**-40 of
# the largest for each token) is at most 2**-22 of a row of 2**18 tokens.
UNIT_MASS = 2**40


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
