"""Scores arrive in runs of any length and are kept in full blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prompt_scores import BlockScores, ScoreCollector

BLOCK_SIZE = 4


def scores(first: int, end: int) -> BlockScores:
    """Those of the positions from `first` to `end`; every number tells its position."""
    positions = np.arange(first, end)
    return BlockScores.of(
        targets=positions.astype(np.int32),
        chosen=-positions.astype(np.float32),
        top_ids=np.stack([positions, positions + 100], axis=1).astype(np.int32),
        top=np.stack([-positions, -positions - 1], axis=1).astype(np.float32),
    )


def assert_is(block: BlockScores, first: int) -> None:
    wanted = scores(first, first + BLOCK_SIZE)
    assert [block.entry(place, 2) for place in range(len(block))] == [wanted.entry(place, 2) for place in range(BLOCK_SIZE)]


@given(lens=st.lists(st.integers(1, 11), max_size=12))
def test_runs_of_any_length_give_the_same_blocks(lens: list[int]) -> None:
    collector = ScoreCollector(BLOCK_SIZE)
    ends = np.cumsum(lens).tolist()

    full = [block for end, length in zip(ends, lens, strict=True) for block in collector.add(end - length, scores(end - length, end))]

    assert [index for index, _ in full] == list(range(sum(lens) // BLOCK_SIZE))
    for index, block in full:
        assert_is(block, index * BLOCK_SIZE)


def test_a_prompt_that_is_computed_again_from_its_middle_gives_whole_blocks_only() -> None:
    collector = ScoreCollector(BLOCK_SIZE)
    collector.add(0, scores(0, 6))

    assert collector.add(3, scores(3, 7)) == []
    ((index, block),) = collector.add(7, scores(7, 9))

    assert index == 1
    assert_is(block, 4)


def test_a_block_does_not_keep_the_step_that_it_came_from_alive() -> None:
    step = scores(0, 64)

    ((_, block),) = ScoreCollector(BLOCK_SIZE).add(0, step[:BLOCK_SIZE])

    assert not np.shares_memory(block.targets, step.targets)


@pytest.mark.parametrize("num_top", [0, 1, 2])
def test_an_entry_holds_as_many_top_tokens_as_are_asked_for(num_top: int) -> None:
    entry = scores(8, 12).entry(2, num_top)

    assert (entry.token_id, entry.logprob) == (10, -10.0)
    assert entry.top == ((10, -10.0), (110, -11.0))[:num_top]
