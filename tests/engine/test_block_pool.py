import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphserve.engine.block_pool import NULL_BLOCK, BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Owners take, share and give back blocks in any order; a plain list of owned ids is the model."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(9)
        self.owned: list[int] = []

    @rule(count=st.integers(0, 8))
    def allocate(self, count):
        if count <= self.pool.num_free:
            blocks = self.pool.allocate(count)
            assert not set(blocks) & set(self.owned) and NULL_BLOCK not in blocks
            self.owned += blocks

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(self.owned))
        self.pool.share(block)
        self.owned.append(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        block = data.draw(st.sampled_from(self.owned))
        self.owned.remove(block)
        self.pool.free([block, NULL_BLOCK])

    @invariant()
    def counts_match_the_owners(self):
        self.pool.check(self.owned)
        assert self.pool.num_in_use == len(set(self.owned))


TestPool = PoolMachine.TestCase


def test_freed_blocks_are_reused_oldest_first():
    pool = BlockPool(4)
    a, b, c = pool.allocate(3)
    pool.free([b])
    pool.free([a, c])
    assert pool.allocate(3) == [b, a, c]


def test_wrong_use_is_noticed():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.free([block])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([block])
    with pytest.raises(AssertionError, match="is free and cannot be shared"):
        pool.share(block)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 are free"):
        pool.allocate(3)
    with pytest.raises(AssertionError, match="reference counts differ"):
        pool.check([2])
