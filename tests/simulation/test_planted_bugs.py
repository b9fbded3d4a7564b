"""Every planted bug breaks an invariant of the simulated world within a few seeds; without one, none does."""

import pytest
from planted_bugs import BUGS, Change, planted
from world import simulate

pytestmark = pytest.mark.timeout(600)  # a rare bug takes 30 seeds, which is seconds, but not on a machine that is busy otherwise

MAX_SEEDS = 100  # most bugs need one or two
SYMPTOMS = (AssertionError, RuntimeError, LookupError, ValueError)  # anything else is a mistake in the planting


def is_caught(seed: int) -> bool:
    try:
        simulate(seed)
    except SYMPTOMS:
        return True
    return False


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    with planted(name):
        assert any(is_caught(seed) for seed in range(MAX_SEEDS))


def test_a_bug_is_gone_after_its_context() -> None:
    changes: list[Change] = [change for changes in BUGS.values() for change in changes]
    before = [vars(change.owner)[change.function] for change in changes]

    for name in BUGS:
        with planted(name):
            assert [vars(change.owner)[change.function] for change in changes] != before

    assert [vars(change.owner)[change.function] for change in changes] == before
