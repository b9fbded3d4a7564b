"""The pool against a simple model of it: who holds which block."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import SCRATCH_BLOCK, BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Holders take and give back in any order, and make mistakes."""

    @initialize(num_blocks=st.integers(1, 20))
    def make_pool(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.leases: list[list[int]] = []

    @property
    def held(self) -> list[int]:
        return [block for lease in self.leases for block in lease]

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.num_blocks - len(self.held)))

        lease = self.pool.take(count)

        assert len(lease) == count
        assert not set(lease) & set(self.held)
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.leases) - 1))

        self.pool.give_back(self.leases.pop(index))

    @rule(excess=st.integers(1, 5))
    def taking_too_many_is_refused_and_changes_nothing(self, excess: int) -> None:
        with pytest.raises(RuntimeError, match="wanted"):
            self.pool.take(self.pool.num_free + excess)

    @rule(data=st.data())
    def giving_back_what_nobody_holds_is_refused(self, data: st.DataObject) -> None:
        strangers = sorted(set(range(self.num_blocks + 2)) - set(self.held))

        with pytest.raises(RuntimeError, match="is not held"):
            self.pool.give_back([data.draw(st.sampled_from(strangers))])

    @invariant()
    def every_block_is_free_or_held_by_one(self) -> None:
        held = self.held
        assert self.pool.num_held == len(held) == len(set(held))
        assert self.pool.num_free + self.pool.num_held == self.num_blocks
        assert all(1 <= block <= self.num_blocks for block in held)


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
