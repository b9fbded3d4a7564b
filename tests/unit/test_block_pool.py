"""The pool against a simple model of it: one list in eviction order, and how many hold each block."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import SCRATCH_BLOCK, BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share and give back in any order, a cache keeps and drops, and all make mistakes."""

    @initialize(num_blocks=st.integers(1, 12))
    def make_pool(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.pool.on_evict = self.on_evict
        self.num_blocks = num_blocks
        self.leases: list[list[int]] = []
        self.empty = list(range(1, num_blocks + 1))
        self.cached: list[int] = []
        self.kept: set[int] = set()
        self.evicted: list[int] = []

    def on_evict(self, block: int) -> None:
        self.evicted.append(block)

    @property
    def holders(self) -> Counter[int]:
        return Counter(block for lease in self.leases for block in lease)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.empty) + len(self.cached)))
        order = self.empty + self.cached

        lease = self.pool.take(count)

        assert lease == order[:count]
        assert self.evicted == self.cached[: max(0, count - len(self.empty))]
        self.kept -= set(self.evicted)
        self.evicted.clear()
        self.empty, self.cached = self.empty[count:], self.cached[max(0, count - len(self.empty)) :]
        self.leases.append(lease)

    @precondition(lambda self: self.holders or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted({*self.holders, *self.cached})), unique=True))

        self.pool.share(blocks)

        self.cached = [block for block in self.cached if block not in blocks]
        self.leases.append(blocks)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))

        self.pool.give_back(lease)

        released = [block for block in reversed(lease) if block not in self.holders]
        self.cached += [block for block in released if block in self.kept]
        self.empty += [block for block in released if block not in self.kept]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.holders)))

        self.pool.keep(block)

        self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept)))

        self.pool.drop(block)

        self.kept.remove(block)
        if block in self.cached:
            self.cached.remove(block)
            self.empty.append(block)

    @rule(excess=st.integers(1, 5))
    def taking_too_many_is_refused_and_changes_nothing(self, excess: int) -> None:
        with pytest.raises(RuntimeError, match="wanted"):
            self.pool.take(self.pool.num_free + excess)

    @rule(data=st.data())
    def touching_what_nobody_holds_is_refused(self, data: st.DataObject) -> None:
        stranger = data.draw(st.sampled_from(sorted(set(range(-1, self.num_blocks + 2)) - set(self.holders))))

        with pytest.raises(RuntimeError, match="is not held"):
            self.pool.give_back([stranger])
        with pytest.raises(RuntimeError, match="is not held"):
            self.pool.keep(stranger)
        if stranger not in self.cached:
            with pytest.raises(RuntimeError, match="neither held nor kept"):
                self.pool.share([stranger])
            with pytest.raises(RuntimeError, match="is not kept"):
                self.pool.drop(stranger)

    @invariant()
    def the_counts_are_those_of_the_model(self) -> None:
        holders = self.holders
        assert self.pool.num_held == len(holders)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == len(self.empty) + len(self.cached)
        assert self.pool.num_free + self.pool.num_held == self.num_blocks
        assert all(self.pool.is_held(block) == (block in holders) for block in range(self.num_blocks + 1))
        assert not self.evicted


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_the_scratch_block_is_never_handed_out() -> None:
    pool = BlockPool(5)

    assert SCRATCH_BLOCK not in pool.take(5)


def test_a_block_that_was_given_back_is_the_last_to_be_taken_again() -> None:
    pool = BlockPool(4)
    first, *_ = taken = pool.take(2)

    pool.give_back(taken)

    assert first not in pool.take(2)


def test_a_block_given_back_twice_in_one_call_is_refused() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)

    with pytest.raises(RuntimeError, match=f"block {block} was given back but is not held"):
        pool.give_back([block, block])


def test_kept_blocks_are_reused_after_all_others_and_the_end_of_a_chain_before_its_beginning() -> None:
    pool = BlockPool(4)
    first, second, _ = chain = pool.take(3)
    pool.keep(first)
    pool.keep(second)

    pool.give_back(chain)

    assert pool.num_cached == 2
    assert pool.take(4)[2:] == [second, first]


def test_a_kept_block_that_is_shared_again_is_the_last_to_be_evicted() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    for block in blocks:
        pool.keep(block)
        pool.give_back([block])
    oldest, _ = blocks

    pool.share([oldest])
    pool.give_back([oldest])

    assert pool.take(2) == [blocks[1], oldest]


def test_a_shared_block_is_free_when_its_last_holder_has_given_it_back() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.share(blocks)

    pool.give_back(blocks)
    assert pool.num_free == 0
    pool.give_back(blocks)

    assert pool.num_free == 1
