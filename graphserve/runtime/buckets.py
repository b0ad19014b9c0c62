"""Sizes to which steps are padded, so that few distinct shapes reach the device.

Few shapes mean that bindings, captured graphs and compiled kernels are reused; the price is the padding's work.
"""

from __future__ import annotations

from bisect import bisect_left

SMALL_ROW_BUCKETS = (1, 2, 4, 8)
ROW_STEP = 8
TOKEN_STEP = 8
MAX_PADDED_TOKENS = 512


class Buckets:
    """Maps counts to padded counts.

    Rows (sequences, and logits rows): 1, 2, 4, 8, then steps of 8 up to ``max_rows``. Tokens of a step that is not pure
    decode: multiples of ``token_step`` up to ``max_padded_tokens``; above, the padding would buy little and nothing is
    padded. Pure decode steps use the row buckets for their tokens.

    Args:
        max_rows: the largest row bucket, reached exactly; counts above it are padded to a multiple of 8.
        is_enabled: False leaves every count as it is.
    """

    def __init__(
        self,
        max_rows: int,
        is_enabled: bool = True,
        token_step: int = TOKEN_STEP,
        max_padded_tokens: int = MAX_PADDED_TOKENS,
    ) -> None:
        rows = [*SMALL_ROW_BUCKETS, *range(2 * ROW_STEP, max_rows, ROW_STEP)]
        self.row_buckets = (*(b for b in rows if b < max_rows), max_rows)
        self.is_enabled = is_enabled
        self._token_step = token_step
        self._max_padded_tokens = max_padded_tokens

    def rows(self, count: int) -> int:
        """Padded number of rows, at least 1."""
        count = max(count, 1)
        if not self.is_enabled:
            return count
        if count > self.row_buckets[-1]:
            return -(-count // ROW_STEP) * ROW_STEP
        return self.row_buckets[bisect_left(self.row_buckets, count)]

    def tokens(self, count: int) -> int:
        """Padded number of tokens of a step with a prefill in it."""
        if not self.is_enabled or count > self._max_padded_tokens:
            return count
        return min(-(-count // self._token_step) * self._token_step, max(count, self._max_padded_tokens))
