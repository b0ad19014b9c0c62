"""Sizes to which steps are padded, so that few distinct shapes reach the device.

Few shapes mean that bindings, captured graphs and compiled kernels are reused; the price is the padding's work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from graphserve.errors import ConfigError

SMALL_ROW_BUCKETS = (1, 2, 4, 8)
ROW_STEP = 8
TOKEN_STEP = 8
MAX_PADDED_TOKENS = 512
MAX_CAPTURED_ROWS = 256

# A graph is captured for each size, so these are fewer than multiples of eight; a GPU pays little for the padding,
# because below some hundred tokens it waits for the weights.
CAPTURED_TOKENS = (8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
CAPTURED_MIXED_ROWS = (8, 32, 128)


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
        self.row_buckets: tuple[int, ...] = (*(b for b in rows if b < max_rows), max_rows)
        self.is_enabled = is_enabled
        self._token_step = token_step
        self._max_padded_tokens = max_padded_tokens

    def rows(self, count: int) -> int:
        """Padded number of rows of a pure decode step, at least 1."""
        count = max(count, 1)
        if not self.is_enabled:
            return count
        if count > self.row_buckets[-1]:
            return -(-count // ROW_STEP) * ROW_STEP
        return self.row_buckets[bisect_left(self.row_buckets, count)]

    def mixed_rows(self, count: int) -> int:
        """Padded number of rows of a step with a prefill in it, at least 1."""
        return self.rows(count)

    def tokens(self, count: int) -> int:
        """Padded number of tokens of a step with a prefill in it."""
        if not self.is_enabled or count > self._max_padded_tokens:
            return count
        return min(-(-count // self._token_step) * self._token_step, max(count, self._max_padded_tokens))

    def largest_step(self, max_num_seqs: int, max_num_tokens: int, max_rows: int) -> tuple[int, int, int]:
        """Tokens, logits rows and sequences that no padded step within these counts exceeds."""
        num_seqs = max(self.rows(max_num_seqs), self.mixed_rows(max_num_seqs))
        num_rows = max(num_seqs, self.rows(max_rows), self.mixed_rows(max_rows))
        # A step with a prefill has more tokens than sequences, padding included.
        return max(self.tokens(num_seqs + 1), self.tokens(max_num_tokens)), num_rows, num_seqs


class CaptureBuckets(Buckets):
    """Buckets of a device that captures a graph for each size.

    Args:
        max_rows: most sequences of a step.
        decode_sizes: sequences of the decode steps that are captured, None for 1, 2, 4, 8, then steps of 8 up to 256.
            Those above ``max_rows`` are left out, and the largest is at most ``max_rows``, which is added where the
            list is the default one. Steps with more sequences are padded to multiples of 8 and not captured.

    Raises:
        ConfigError: a size is not positive.
    """

    def __init__(self, max_rows: int, decode_sizes: Sequence[int] | None = None) -> None:
        super().__init__(max_rows)
        if decode_sizes is None:
            sizes = [size for size in self.row_buckets if size <= MAX_CAPTURED_ROWS]
        else:
            sizes = sorted({size for size in decode_sizes if size <= max_rows})
            if any(size < 1 for size in decode_sizes):
                raise ConfigError(f"decode sizes {list(decode_sizes)} are not allowed: each must be at least 1")
        self.row_buckets = self.decode_sizes = tuple(sizes)
        self._mixed_rows = (*(rows for rows in CAPTURED_MIXED_ROWS if rows < max_rows), max_rows)

    def rows(self, count: int) -> int:
        """Padded number of rows of a pure decode step, at least 1."""
        if not self.row_buckets:
            return max(count, 1)
        return super().rows(count)

    def mixed_rows(self, count: int) -> int:
        """Padded number of rows of a step with a prefill in it: few sizes, because they multiply those of tokens."""
        place = bisect_left(self._mixed_rows, count)
        return self._mixed_rows[place] if place < len(self._mixed_rows) else -(-count // ROW_STEP) * ROW_STEP

    def tokens(self, count: int) -> int:
        """Padded number of tokens of a step with a prefill in it; larger ones than 512 are not padded."""
        place = bisect_left(CAPTURED_TOKENS, count)
        return CAPTURED_TOKENS[place] if place < len(CAPTURED_TOKENS) else count

    def is_captured(self, num_tokens: int, num_rows: int, num_seqs: int) -> bool:
        """Whether steps of this size are captured; others launch the same plan eagerly."""
        if num_tokens == num_rows == num_seqs:
            return num_tokens in self.decode_sizes
        return num_tokens in CAPTURED_TOKENS and num_rows in self._mixed_rows and num_seqs in self._mixed_rows
