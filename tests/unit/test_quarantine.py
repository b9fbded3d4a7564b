"""Who is tried, in what order, and who is convicted; and over random worlds, that nobody is wronged and nobody escapes."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.quarantine import MAX_DEATHS, Quarantine


def after_deaths(*request_ids: str) -> Quarantine:
    """A quarantine in which these have just become suspects."""
    quarantine = Quarantine()
    for _ in range(MAX_DEATHS):
        assert quarantine.engine_died(cleared=(), not_cleared=request_ids) is None
    return quarantine


def test_one_death_makes_nobody_a_suspect():
    quarantine = Quarantine()

    quarantine.engine_died(cleared=(), not_cleared=["a", "b"])

    assert not quarantine.is_active
    assert quarantine.next_group() == []


def test_deaths_that_are_not_in_a_row_do_not_add_up():
    quarantine = Quarantine()

    for _ in range(5):
        quarantine.engine_died(cleared=(), not_cleared=["a"])
        quarantine.engine_died(cleared=["a"], not_cleared=())

    assert not quarantine.is_active


def test_a_death_without_the_request_counts_neither_way():
    quarantine = Quarantine()

    quarantine.engine_died(cleared=(), not_cleared=["a"])
    quarantine.engine_died(cleared=(), not_cleared=["b"])
    assert not quarantine.is_active
    quarantine.engine_died(cleared=(), not_cleared=["a"])

    assert quarantine.next_group() == ["a"]


def test_after_the_second_death_in_a_row_the_suspects_are_tried_in_halves():
    quarantine = Quarantine()
    quarantine.engine_died(cleared=(), not_cleared=["a", "b", "c"])
    quarantine.engine_died(cleared=(), not_cleared=["a", "b", "c", "new"])

    assert quarantine.next_group() == ["a", "b"]
    assert quarantine.next_group() == [], "one group at a time"
    quarantine.clear("a")
    assert quarantine.next_group() == []
    quarantine.forget("b")
    assert quarantine.next_group() == ["c"]
    quarantine.clear("c")
    assert not quarantine.is_active


def test_a_death_splits_the_group_on_trial_as_far_as_it_was_not_cleared():
    quarantine = after_deaths(*"abcdefgh")
    assert quarantine.next_group() == list("abcd")

    quarantine.engine_died(cleared=["b"], not_cleared=["a", "c", "d"])

    groups = []
    while group := quarantine.next_group():
        groups.append(group)
        for request_id in group:
            quarantine.clear(request_id)
    assert groups == [["a", "c"], ["d"], list("efgh")]


def test_a_suspect_that_dies_alone_is_convicted_and_nobody_else():
    quarantine = after_deaths("a", "b")
    assert quarantine.next_group() == ["a"]

    convicted = quarantine.engine_died(cleared=(), not_cleared=["a"])

    assert convicted == "a"
    assert quarantine.next_group() == ["b"]


def test_one_that_dies_beside_cleared_ones_is_tried_again_alone_first():
    quarantine = after_deaths("a", "b")
    quarantine.next_group()
    quarantine.clear("a")
    assert quarantine.next_group() == ["b"]

    assert quarantine.engine_died(cleared=["a"], not_cleared=["b"]) is None

    assert quarantine.next_group() == ["b"]
    assert quarantine.engine_died(cleared=(), not_cleared=["b"]) == "b"
    assert not quarantine.is_active


def test_one_that_dies_where_others_have_ended_before_is_not_yet_convicted():
    quarantine = after_deaths("a", "b")
    quarantine.next_group()
    quarantine.forget("a")
    quarantine.next_group()

    assert quarantine.engine_died(cleared=(), not_cleared=["b"]) is None
    quarantine.next_group()
    assert quarantine.engine_died(cleared=(), not_cleared=["b"]) == "b"


def test_one_that_was_cleared_before_it_died_alone_is_innocent():
    quarantine = after_deaths("a")
    quarantine.next_group()

    assert quarantine.engine_died(cleared=["a"], not_cleared=()) is None
    assert not quarantine.is_active


def test_a_suspect_that_is_over_is_tried_no_more():
    quarantine = after_deaths(*"abcd")
    quarantine.forget("c")
    quarantine.next_group()
    quarantine.forget("a")
    quarantine.clear("b")

    assert quarantine.next_group() == ["d"]


def test_a_death_between_two_trials_changes_nothing():
    quarantine = after_deaths(*"ab")

    quarantine.engine_died(cleared=(), not_cleared=())

    assert quarantine.next_group() == ["a"]


@dataclass
class World:
    """Engines that die by poison at its first computation, and now and then for no reason of any request's."""

    poison: frozenset[str]
    lengths: dict[str, int]  # clearings that a request takes to end: its progress survives the engine
    kills: list[int]  # in life i, after how many rounds the machine takes the engine; 0: not at all
    quarantine: Quarantine = field(default_factory=Quarantine)
    convicted: list[str] = field(default_factory=list)
    num_lives: int = 0
    num_kills: int = 0

    def run(self) -> None:
        while self.lengths:
            self.num_lives += 1
            assert self.num_lives < 10_000
            self.live()

    def live(self) -> None:
        """One engine, from readiness to its death or until nothing is left."""
        kill_after = self.kills.pop() if self.kills else 0
        not_cleared: list[str] = []
        cleared: list[str] = []
        num_rounds = 0
        while self.lengths:
            not_cleared += self.submissions(not_cleared + cleared)
            num_rounds += 1
            is_kill = num_rounds == kill_after and len(not_cleared + cleared) > 1  # else nobody could tell it from a conviction
            self.num_kills += is_kill
            if is_kill or self.poison & {*not_cleared, *cleared}:
                if (convicted := self.quarantine.engine_died(cleared=cleared, not_cleared=not_cleared)) is not None:
                    self.convicted.append(convicted)
                    del self.lengths[convicted]
                return
            self.progress(not_cleared, cleared)

    def submissions(self, had: list[str]) -> list[str]:
        group = self.quarantine.next_group() if self.quarantine.is_active else []
        return group if self.quarantine.is_active else [request_id for request_id in self.lengths if request_id not in had]

    def progress(self, not_cleared: list[str], cleared: list[str]) -> None:
        """Everything the engine has comes a clearing further; what is complete ends."""
        for request_id in list(self.quarantine.on_trial):
            self.quarantine.clear(request_id)
        cleared += not_cleared
        not_cleared.clear()
        for request_id in list(cleared):
            self.lengths[request_id] -= 1
            if not self.lengths[request_id]:
                del self.lengths[request_id]
                cleared.remove(request_id)
                self.quarantine.forget(request_id)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    names = [f"r{number}" for number in range(draw(st.integers(1, 24)))]
    return World(
        poison=draw(st.frozensets(st.sampled_from(names), max_size=6)),
        lengths={name: draw(st.integers(1, 5)) for name in names},
        kills=draw(st.lists(st.integers(0, 4), max_size=20)),
    )


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_every_poison_is_convicted_no_innocent_is_and_the_number_of_lives_is_bounded(world: World):
    num_requests = len(world.lengths)

    world.run()

    assert sorted(world.convicted) == sorted(world.poison)
    splits = math.ceil(math.log2(num_requests)) + 2  # of the halves, one more alone, the conviction
    assert world.num_lives <= 1 + world.num_kills + MAX_DEATHS + len(world.poison) * (splits + MAX_DEATHS)
    assert not world.quarantine.is_active


@pytest.mark.parametrize("place", [0, 13, 31])
def test_one_poison_among_32_costs_at_most_eight_deaths(place: int):
    names = [str(number) for number in range(32)]
    world = World(poison=frozenset({names[place]}), lengths=dict.fromkeys(names, 3), kills=[])

    world.run()

    assert world.convicted == [names[place]]
    assert world.num_lives - 1 <= MAX_DEATHS + 5 + 1
