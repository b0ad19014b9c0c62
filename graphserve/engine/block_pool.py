"""The pool of KV cache blocks: which are free, and how many owners each of the others has."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0


class BlockPool:
    """Hands out block ids ``1 .. num_blocks - 1``; block 0 is the null block.

    The null block is never handed out or freed. Padding tokens write to it, and it fills block-table places whose
    tokens no query can see any more.

    Invariant: a block is in the free queue exactly if its reference count is 0 (see :meth:`check`). All operations
    are O(1) a block.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, "a pool needs the null block and at least one more"
        self.num_blocks = num_blocks
        self._free = deque(range(1, num_blocks))
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - 1

    @property
    def num_in_use(self) -> int:
        return self.num_usable - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks with one owner each. The caller has checked :attr:`num_free`."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} are free"
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add an owner to a block in use."""
        assert self._ref_counts[block] > 0, f"block {block} is free and cannot be shared"
        self._ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Drop one owner of each block; blocks without owners go to the end of the free queue. Null is ignored."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} was freed twice"
            self._ref_counts[block] = count
            if count == 0:
                self._free.append(block)

    def check(self, owners: Iterable[int] | None = None) -> None:
        """Assert the invariants; with ``owners`` (every block id in every block table), that counts match them."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free queue"
        assert NULL_BLOCK not in free and self._ref_counts[NULL_BLOCK] == 0, "the null block was handed out"
        for block in range(1, self.num_blocks):
            assert (self._ref_counts[block] == 0) == (block in free), f"block {block}: free queue and count disagree"
        if owners is not None:
            counts = [0] * self.num_blocks
            for block in owners:
                if block != NULL_BLOCK:
                    counts[block] += 1
            assert counts == self._ref_counts, "reference counts differ from the block tables"
