"""Who is next among those that never ran."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.fair_queue import MAX_SETTLED, FairQueue
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams


def sequence(arrival: int, tenant: str = "", *, priority: int = 0, num_prompt: int = 10, max_tokens: int = 10) -> Sequence:
    prompt = (5,) * num_prompt
    request = GenerationRequest(
        request_id=str(arrival),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        tenant=tenant,
        priority=priority,
    )
    return Sequence(request=request, arrival=arrival, token_ids=list(prompt))


def queue_of(*sequences: Sequence, num_slots: int = 2, num_cache_tokens: int = 10_000) -> FairQueue:
    queue = FairQueue(num_slots=num_slots, num_cache_tokens=num_cache_tokens)
    for each in sequences:
        queue.add(each)
    return queue


def admit(queue: FairQueue) -> Sequence:
    head = queue.head()
    assert head is not None
    queue.admit(head)
    return head


def end(queue: FairQueue, admitted: Sequence, *, num_output: int) -> None:
    admitted.token_ids += [7] * num_output
    queue.settle(admitted)


def next_tenant(queue: FairQueue) -> str:
    head = queue.head()
    assert head is not None
    return head.request.tenant


def turns(queue: FairQueue, count: int) -> str:
    """The tenants of the next `count` sequences."""
    return "".join(admit(queue).request.tenant for _ in range(count))


def test_within_a_tenant_the_higher_priority_goes_first_and_then_the_older() -> None:
    queue = queue_of(sequence(0), sequence(1, priority=1), sequence(2), sequence(3, priority=1), sequence(4, priority=-1))

    assert [admit(queue).arrival for _ in range(5)] == [1, 3, 0, 2, 4]
    assert queue.head() is None


def test_the_tenant_that_would_be_done_first_goes_first_as_a_whole() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(6)), *(sequence(n, "b") for n in range(6, 9)))

    assert turns(queue, 9) == "bbbaaaaaa"


def test_priority_is_worth_nothing_against_another_tenant() -> None:
    queue = queue_of(sequence(0, "a"), sequence(1, "a"), sequence(2, "b", priority=9), sequence(3, "b", priority=9))

    assert turns(queue, 4) == "aabb"


def test_what_is_to_do_is_counted_in_tokens_of_prompt_and_output() -> None:
    queue = queue_of(*(sequence(n, "a", num_prompt=10, max_tokens=60) for n in range(2)), *(sequence(n, "b") for n in range(4, 10)))

    assert turns(queue, 8) == "bbbbbbaa"


def test_what_was_not_used_is_refunded_at_the_end() -> None:
    queue = queue_of(sequence(0, "a", max_tokens=1000))
    first = admit(queue)
    for each in (sequence(1, "a"), *(sequence(n, "b") for n in range(2, 5))):
        queue.add(each)
    assert next_tenant(queue) == "b"

    end(queue, first, num_output=5)

    assert turns(queue, 4) == "abbb"


def test_a_limit_counts_for_no_more_than_others_gave_lately() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(3)))
    for _ in range(3):
        end(queue, admit(queue), num_output=10)

    for each in (sequence(3, "b", max_tokens=5000), sequence(4, "a"), sequence(5, "a", max_tokens=5000), sequence(6, "a", max_tokens=3)):
        queue.add(each)

    assert {each.arrival: each.num_foreseen_tokens for each in queue} == {3: 20, 4: 20, 5: 20, 6: 13}


def test_what_a_sequence_takes_beyond_what_was_foreseen_is_charged_as_it_comes() -> None:
    queue = queue_of(sequence(0, "a"))
    end(queue, admit(queue), num_output=10)
    queue.add(sequence(1, "a", max_tokens=500))
    endless = admit(queue)
    endless.token_ids += [7] * 300
    queue.add(sequence(2, "b"))
    queue.add(sequence(3, "a"))

    assert next_tenant(queue) == "b"
    assert endless.num_foreseen_tokens == 310


def test_a_tenant_gets_no_credit_for_the_time_it_was_away() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(20)), sequence(20, "b"))
    for admitted in [admit(queue) for _ in range(10)]:
        end(queue, admitted, num_output=10)

    for n in range(30, 45):
        queue.add(sequence(n, "b"))

    assert turns(queue, 6) == "aaaaaa", "what it has to do now is more than the rest of the other"


def test_who_was_served_ahead_of_its_part_begins_at_its_end_when_it_comes_back() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(20)), *(sequence(n, "b") for n in range(20, 29)))
    for _ in range(9):
        end(queue, admit(queue), num_output=10)

    for n in range(30, 42):
        queue.add(sequence(n, "b"))

    assert turns(queue, 3) == "aaa", "9 and 12 of the one end after 20 of the other"


def test_a_newcomer_does_not_wait_for_what_others_hold_in_advance() -> None:
    queue = queue_of(*(sequence(n, "a", max_tokens=990) for n in range(20)))
    for _ in range(4):
        admit(queue)

    for n in range(20, 30):
        queue.add(sequence(n, "b", max_tokens=990))

    assert turns(queue, 10) == "bbbbbbbbbb"


def test_after_a_lull_all_begin_alike() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(10)))
    for _ in range(10):
        end(queue, admit(queue), num_output=10)

    for each in (sequence(10, "b"), sequence(11, "b"), sequence(12, "b"), sequence(13, "a"), sequence(14, "a")):
        queue.add(each)

    assert turns(queue, 5) == "aabbb"


def test_a_tenant_whose_end_moves_away_goes_first_once_it_is_late() -> None:
    queue = queue_of(*(sequence(n, "large") for n in range(100)), num_slots=4)
    num_turns = []

    for n in range(100, 400):  # there is always another one with less to do
        queue.add(sequence(n, f"tenant {n}"))
        queue.add(sequence(1000 + n, "large"))
        admitted = admit(queue)
        num_turns += [n] * (admitted.request.tenant == "large")
        end(queue, admitted, num_output=10)
        queue.advance_clock()

    assert 100 <= num_turns[0] <= 140, "its part has paid for four of its sequences"
    assert max(after - before for before, after in pairwise(num_turns)) <= 60


def test_one_that_yielded_pays_for_what_it_has_not_received() -> None:
    queue = queue_of(sequence(0, "a"), sequence(1, "a"))
    first = admit(queue)
    first.token_ids += [7] * 4
    finish = queue._tenants["a"].finish

    queue.take_back(first)

    assert (queue._tenants["a"].backlog, queue._tenants["a"].finish) == (6 + 20, finish)
    assert admit(queue) is first
    end(queue, first, num_output=6)
    assert queue._tenants["a"].finish == finish


def test_one_that_leaves_the_queue_costs_its_tenant_nothing() -> None:
    gone = sequence(0, "a", max_tokens=1000)
    queue = queue_of(gone, sequence(1, "a"), sequence(2, "b"))

    queue.remove(gone)

    assert (len(queue), [each.arrival for each in queue]) == (2, [1, 2])
    assert turns(queue, 2) == "ab"


def test_tenants_that_are_through_leave_nothing_behind() -> None:
    queue = queue_of()

    for n in range(1000):
        queue.add(sequence(n, f"tenant {n}"))
        end(queue, admit(queue), num_output=n % 10)

    assert len(queue._tenants) < 5


def test_names_without_end_are_not_all_remembered_while_somebody_always_waits() -> None:
    queue = queue_of(*(sequence(n, "large", max_tokens=900) for n in range(500)), sequence(500, "heavy", max_tokens=5000))
    heavy = admit(queue)
    end(queue, heavy, num_output=5000)

    for n in range(501, 2500):
        queue.add(sequence(n, f"tenant {n}"))
        end(queue, admit(queue), num_output=n % 10)

    assert len(queue._tenants) < MAX_SETTLED + 20
    assert "heavy" in queue._tenants, "who received most has most to gain from being forgotten"


EVENTS = st.lists(
    st.tuples(st.sampled_from("aabc"), st.integers(1, 30), st.integers(1, 30), st.integers(0, 4), st.floats(0, 1)), min_size=2, max_size=60
)


@given(events=EVENTS)
def test_the_clock_stands_where_equal_sharing_would_have_as_much_to_do_as_there_really_is(
    events: list[tuple[str, int, int, int, float]],
) -> None:
    queue = queue_of(num_slots=3)
    running: list[Sequence] = []

    for n, (tenant, num_prompt, max_tokens, num_admitted, share) in enumerate(events):
        before = queue._clock
        queue.add(sequence(n, tenant, num_prompt=num_prompt, max_tokens=max_tokens))
        running += [admit(queue) for _ in range(min(num_admitted, len(queue)))]
        for each in running:
            each.token_ids += [7] * min(2, each.max_len - each.num_tokens)
        while running and (running[0].num_tokens == running[0].max_len or share > 0.7):
            queue.settle(running.pop(0))
            share = 0.0
        queue.advance_clock()

        tenants = queue._tenants.values()
        num_open = sum(each.backlog for each in tenants) + sum(each.num_foreseen_tokens - each.num_tokens for each in running)
        num_ahead = sum(max(0, each.finish - queue._clock) for each in tenants)
        assert queue._clock >= before
        assert num_ahead <= num_open + len(tenants)


@pytest.mark.parametrize("num_slots", [1, 4])
@given(lengths=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1)), min_size=2, max_size=60))
def test_nobody_who_waits_all_the_time_falls_far_behind_equal_sharing(num_slots: int, lengths: list[tuple[str, int, int, float]]) -> None:
    queue = queue_of(
        *(
            sequence(n, tenant, num_prompt=num_prompt, max_tokens=max_tokens)
            for n, (tenant, num_prompt, max_tokens, _) in enumerate(lengths)
        ),
        num_slots=num_slots,
    )
    received = {"a": 0, "b": 0}
    running: list[Sequence] = []

    while {each.request.tenant for each in queue} == {"a", "b"}:
        running.append(admit(queue))
        if len(running) == num_slots:
            done = running.pop(0)
            *_, share = lengths[done.arrival]
            end(queue, done, num_output=int(share * done.request.sampling.max_tokens))
            received[done.request.tenant] += done.num_tokens
        queue.advance_clock()

        assert abs(received["a"] - received["b"]) <= 2 * 60 * (2 * num_slots + 1)
