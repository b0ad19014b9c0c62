"""Block tables: which blocks hold a request's keys and values, per cache group.

A group with a sliding window or with chunked attention gives blocks back as soon as no later query can see them; their
places in the table then hold the null block. All groups draw on one :class:`BlockPool`, and a block belongs to one
group at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from graphserve.engine.block_pool import NULL_BLOCK, BlockPool
from graphserve.engine.request import Request
from graphserve.plan.schema import CacheGroup
from graphserve.runtime.kv_pool_size import max_blocks_in_group


def first_visible_token(group: CacheGroup, position: int) -> int:
    """The oldest position that a query at ``position`` or later can see in ``group``."""
    first = 0
    if group.window is not None:
        first = max(first, position - group.window + 1)
    if group.chunk is not None:
        first = max(first, position // group.chunk * group.chunk)
    return first


class KVCacheManager:
    """Gives blocks to requests and takes them back.

    Invariant: a request's table in each group is either empty or covers its first ``num_scheduled_tokens`` tokens, and
    every entry is null (no later query sees that block) or a block whose only use is this entry. Blocks are given back
    by what has been computed, never by what is still being computed.
    """

    def __init__(self, groups: Sequence[CacheGroup], pool: BlockPool, block_size: int) -> None:
        self.groups = tuple(groups)
        self.pool = pool
        self.block_size = block_size

    def num_blocks_for(self, num_tokens: int, num_new_tokens: int) -> int:
        """Most blocks that a request of ``num_tokens`` holds at a time, computed ``num_new_tokens`` a step."""
        return sum(max_blocks_in_group(g, num_tokens, num_new_tokens, self.block_size) for g in self.groups)

    def allocate(self, request: Request, num_new_tokens: int) -> bool:
        """Extend the tables by the next ``num_new_tokens`` tokens; False, with nothing changed, if blocks lack."""
        if not request.block_tables:
            request.block_tables = [array("i") for _ in self.groups]
            request.num_retired_blocks = [0] * len(self.groups)
        needed = -(-(request.num_scheduled_tokens + num_new_tokens) // self.block_size)
        missing = [max(0, needed - len(table)) for table in request.block_tables]
        if sum(missing) > self.pool.num_free:
            return False
        for table, count in zip(request.block_tables, missing, strict=True):
            if count:
                table.extend(self.pool.allocate(count))
        return True

    def retire(self, request: Request) -> None:
        """Give back blocks no later query can see. Call when ``num_computed_tokens`` has grown: the steps that wrote
        and read those blocks are over."""
        for index, group in enumerate(self.groups):
            if group.window is None and group.chunk is None:
                continue
            table = request.block_tables[index]
            start = request.num_retired_blocks[index]
            end = first_visible_token(group, request.num_computed_tokens) // self.block_size
            if end > start:
                self.pool.free(table[start:end])
                table[start:end] = array("i", [NULL_BLOCK]) * (end - start)
                request.num_retired_blocks[index] = end

    def free(self, request: Request) -> None:
        """Give all blocks of a request back."""
        for table in request.block_tables:
            self.pool.free(table)
        request.block_tables = []
        request.num_retired_blocks = []

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the invariants over all living requests (any that holds blocks must be among them)."""
        owners: list[int] = []
        for request in requests:
            if not request.block_tables:
                continue
            for group, table in zip(self.groups, request.block_tables, strict=True):
                owners.extend(table)
                assert len(table) * self.block_size >= request.num_scheduled_tokens, "a table is too short"
                visible_from = first_visible_token(group, request.num_computed_tokens) // self.block_size
                assert NULL_BLOCK not in table[visible_from:], "a visible place holds the null block"
        used = [block for block in owners if block != NULL_BLOCK]
        assert len(used) == len(set(used)), "a block stands in two places"
        self.pool.check(owners)
