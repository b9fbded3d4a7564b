"""How tenants share the engine: what waiting costs them beside others, and who makes way for whom."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import pytest
from scheduling import add, commit, scheduler_of, step

from engine.scheduler import MAX_YIELDS, Schedule, Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One sequence: who sends it in which step, and how much it really gives."""

    tenant: str
    at: int
    num_output: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Waits:
    """Steps from arrival to the first token, and to the end, of one tenant's sequences."""

    first: list[int]
    end: list[int]


def visits(tenant: str, number: int, *, at: Callable[[int], int] = lambda index: 0, max_tokens: int | None = None) -> list[Visit]:  # noqa: ARG005
    """Sequences of 10 tokens of prompt and 20 to 59 of output."""
    return [
        Visit(tenant=tenant, at=at(index), num_output=20 + index % 40, max_tokens=max_tokens or 20 + index % 40) for index in range(number)
    ]


def waits(scheduler: Scheduler, crowd: list[Visit]) -> dict[str, Waits]:
    """Let all of them come and end, one step ahead; what each tenant waited."""
    coming = sorted(crowd, key=lambda visit: visit.at)
    came: list[Visit] = []
    found = {visit.tenant: Waits([], []) for visit in crowd}
    in_flight: Schedule | None = None
    now = 0
    while len(came) < len(coming) or scheduler.has_work:
        while len(came) < len(coming) and coming[len(came)].at <= now:
            visit = coming[len(came)]
            add(scheduler, len(came), 10, max_tokens=visit.max_tokens, tenant=visit.tenant)
            came.append(visit)
        launched = scheduler.schedule()
        for item in in_flight.items if in_flight else ():
            sequence, visit = item.sequence, came[item.sequence.arrival]
            if not item.chooses_token or sequence.is_over:
                continue
            sequence.token_ids.append(7)
            sequence.num_pending_tokens -= 1
            num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
            if num_output == 1:
                found[visit.tenant].first.append(now - visit.at)
            if num_output == visit.num_output:
                found[visit.tenant].end.append(now - visit.at)
                sequence.is_over = True
                scheduler.remove(sequence)
        in_flight = launched
        now += 1
    return found


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


def p90(values: list[int]) -> int:
    return sorted(values)[len(values) * 9 // 10]


def assert_at_most_doubled(beside: Waits, alone: Waits) -> None:
    for found, wanted in ((beside.first, alone.first), (beside.end, alone.end)):
        assert len(found) == len(wanted)
        assert mean(found) <= 2 * mean(wanted)
        assert p90(found) <= 2 * p90(wanted)


@pytest.mark.parametrize("later", [0, 100])
@pytest.mark.parametrize("num_small", [4, 6, 8, 12, 16, 24, 40])  # of 8 slots
def test_a_tenant_that_sends_ten_times_as_much_at_most_doubles_the_waiting_of_another(num_small: int, later: int) -> None:
    small = visits("small", num_small, at=lambda _: later)
    large = visits("large", 10 * num_small)

    alone = waits(scheduler_of(budget=64), small)["small"]
    alone_large = waits(scheduler_of(budget=64), large)["large"]
    beside = waits(scheduler_of(budget=64), small + large)

    assert_at_most_doubled(beside["small"], alone)
    assert max(beside["large"].end) <= 1.15 * max(alone_large.end), "a tenth more is to be done"
    assert mean(beside["large"].end) <= 1.25 * mean(alone_large.end)


@pytest.mark.parametrize("num_small", [4, 12, 40])
@pytest.mark.parametrize(("small_limit", "large_limit"), [(1500, None), (None, 1500), (1500, 1500)])
def test_a_limit_far_above_what_is_used_changes_nothing(num_small: int, small_limit: int | None, large_limit: int | None) -> None:
    small = visits("small", num_small, at=lambda _: 100, max_tokens=small_limit)
    large = visits("large", 10 * num_small, max_tokens=large_limit)

    alone = waits(scheduler_of(budget=64, num_blocks=4000), small)["small"]
    beside = waits(scheduler_of(budget=64, num_blocks=4000), small + large)["small"]

    assert_at_most_doubled(beside, alone)


def test_a_tenant_within_its_share_does_not_wait() -> None:
    small = visits("small", 50, at=lambda index: 12 * index)
    large = visits("large", 500, at=lambda index: index)

    alone = waits(scheduler_of(budget=64), small)["small"]
    beside = waits(scheduler_of(budget=64), small + large)["small"]

    assert max(beside.first) <= max(alone.first) + 1
    assert mean(beside.end) <= 1.05 * mean(alone.end)


def test_bursts_that_fill_all_slots_again_and_again_hardly_wait() -> None:
    small = visits("small", 48, at=lambda index: 120 + 120 * (index // 8))
    large = visits("large", 480, at=lambda index: index // 2)

    alone = waits(scheduler_of(budget=64), small)["small"]
    beside = waits(scheduler_of(budget=64), small + large)["small"]

    assert_at_most_doubled(beside, alone)


@pytest.mark.parametrize("num_small", [6, 12, 24])
def test_a_pool_in_which_somebody_is_always_preempted_is_shared_as_well(num_small: int) -> None:
    small = visits("small", num_small, at=lambda _: 100)
    large = visits("large", 10 * num_small)

    alone = waits(scheduler_of(budget=64, num_blocks=50), small)["small"]
    scheduler = scheduler_of(budget=64, num_blocks=50)
    beside = waits(scheduler, small + large)["small"]

    assert scheduler.num_preemptions > 2 * num_small
    assert_at_most_doubled(beside, alone)


@pytest.mark.parametrize("keeps_sending", [False, True])
@pytest.mark.parametrize("gap", [24, 20, 16])  # steps; 8 slots can do a burst in 20
def test_new_tenants_without_end_do_not_starve_a_large_one(gap: int, keeps_sending: bool) -> None:
    scheduler = scheduler_of(budget=64)
    starts = [0]
    arrivals = count()
    for now in range(3000):
        if now == 0 or (keeps_sending and now % 10 == 0):
            for _ in range(2 if keeps_sending else 300):
                add(scheduler, next(arrivals), 2, max_tokens=38, tenant="large")
        if now % gap == 0:
            for _ in range(4):
                add(scheduler, next(arrivals), 2, max_tokens=38, tenant=f"new in step {now}")
        schedule = scheduler.schedule()
        starts += [now for each in schedule.admitted if each.request.tenant == "large"]
        commit(scheduler, schedule)

    assert max(after - before for before, after in zip(starts, [*starts[1:], 3000], strict=True)) <= 400


def test_two_tenants_that_send_too_much_receive_alike_and_hardly_disturb_each_other() -> None:
    scheduler = scheduler_of(budget=64)
    arrivals = count()
    received = {"a": 0, "b": 0}
    yields = 0
    for now in range(3000):
        if now % 5 == 0:
            add(scheduler, next(arrivals), 10, max_tokens=20 + now % 40, tenant="ab"[now // 5 % 2])
        if now % 7 == 0:
            add(scheduler, next(arrivals), 10, max_tokens=20 + now % 40, tenant="ab"[now // 7 % 2])
        schedule = scheduler.schedule()
        for item in schedule.items:
            received[item.sequence.request.tenant] += 1
        yields += sum(each.num_yields > 0 for each in schedule.admitted)
        commit(scheduler, schedule)

    assert abs(received["a"] - received["b"]) <= 0.1 * received["a"]
    assert yields <= 0.1 * next(arrivals)


def test_a_small_burst_takes_all_slots_but_that_of_the_oldest() -> None:
    scheduler = scheduler_of(budget=64)
    for arrival in range(20):
        add(scheduler, arrival, 10, tenant="large")
    step(scheduler)
    step(scheduler)
    for arrival in range(20, 28):
        add(scheduler, arrival, 5, first=500 + 20 * arrival, tenant="small")

    step(scheduler)
    step(scheduler)

    assert sorted(each.arrival for each in scheduler.running) == [0, *range(20, 27)]
    assert [each.arrival for each in scheduler.waiting[:7]] == [1, 2, 3, 4, 5, 6, 7], "who yielded goes before those that came later"


def test_a_tenant_without_a_place_gets_one_when_its_part_has_paid_for_it_and_keeps_it() -> None:
    scheduler = scheduler_of(num_blocks=400, max_num_seqs=4, budget=64)
    for arrival in range(4):
        add(scheduler, arrival, 10, max_tokens=900, tenant="first")
    step(scheduler)
    for arrival in range(4, 30):
        add(scheduler, arrival, 10, first=500 + 20 * arrival, max_tokens=290, tenant="second")

    steps = [(step(scheduler), [each.request.tenant for each in scheduler.running])[1] for _ in range(400)]

    start = steps.index(["first"] * 3 + ["second"])
    assert 145 <= start <= 155, "half of 4 tokens a step have paid for 300"
    assert steps[start:].count(steps[start]) == len(steps[start:]), "until one is through, and then again"


def test_preempted_sequences_of_a_large_tenant_wait_for_their_turn() -> None:
    scheduler = scheduler_of(num_blocks=30, budget=64)
    large = [add(scheduler, arrival, 14, first=100 * arrival, max_tokens=60, tenant="large") for arrival in range(8)]
    while not any(each.num_preemptions for each in large):
        step(scheduler)
    small = add(scheduler, 8, 10, first=5000, max_tokens=4, tenant="small")

    step(scheduler)
    step(scheduler)

    assert small.slot is not None
    assert scheduler.running[0] is large[0]
    assert not any(each.slot is None and each.rank is not None for each in large), "nobody stands before the others for ever"


def test_a_tenant_that_fills_the_pool_yields_blocks_to_one_that_runs_nothing() -> None:
    scheduler = scheduler_of(num_blocks=61, budget=256)
    for arrival in range(6):
        add(scheduler, arrival, 38, first=100 * arrival, max_tokens=200, tenant="large")
    step(scheduler)
    small = add(scheduler, 6, 30, first=900, max_tokens=2, tenant="small")

    step(scheduler)

    assert small.slot is not None
    assert {each.num_yields for each in scheduler.waiting} <= {0, 1}


def test_nobody_yields_a_slot_while_a_prompt_takes_every_token_that_its_heir_would_need() -> None:
    scheduler = scheduler_of(num_blocks=400, max_num_seqs=4, budget=16)
    large = [add(scheduler, arrival, 2, first=50 * arrival, max_tokens=300, tenant="large") for arrival in range(3)]
    step(scheduler)
    add(scheduler, 3, 100, first=500, max_tokens=2, tenant="small")
    step(scheduler)
    add(scheduler, 4, 2, first=900, max_tokens=2, tenant="small")

    for _ in range(4):
        step(scheduler)

    assert [each.num_yields for each in large] == [0, 0, 0]


def test_nobody_yields_where_that_would_not_make_enough_room() -> None:
    scheduler = scheduler_of(num_blocks=60, max_num_seqs=3, budget=64)
    large = [add(scheduler, arrival, 60, first=100 * arrival, max_tokens=20, tenant="large") for arrival in range(3)]
    for _ in range(4):
        step(scheduler)
    add(scheduler, 3, 200, first=900, max_tokens=2, tenant="small")

    step(scheduler)

    assert [each.num_yields for each in large] == [0, 0, 0]


def test_one_sequence_yields_a_bounded_number_of_times_and_the_oldest_never() -> None:
    scheduler = scheduler_of(max_num_seqs=2, budget=64)
    old, young = add(scheduler, 0, 10, max_tokens=500, tenant="large"), add(scheduler, 1, 10, max_tokens=500, tenant="large")
    step(scheduler)

    for arrival in range(2, 9):
        visitor = add(scheduler, arrival, 10, first=500 * arrival, max_tokens=5, tenant="small")
        for _ in range(3):
            step(scheduler)
        if visitor.slot is not None:
            scheduler.remove(visitor)
            step(scheduler)

    assert (old.num_yields, young.num_yields) == (0, MAX_YIELDS)
    assert young.slot is not None
