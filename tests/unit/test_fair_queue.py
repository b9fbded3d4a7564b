"""Who is next among those that never ran."""

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


def queue_of(*sequences: Sequence) -> FairQueue:
    queue = FairQueue()
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


def turns(queue: FairQueue, count: int) -> str:
    """The tenants of the next `count` sequences."""
    return "".join(admit(queue).request.tenant for _ in range(count))


def test_within_a_tenant_the_higher_priority_goes_first_and_then_the_older() -> None:
    queue = queue_of(sequence(0), sequence(1, priority=1), sequence(2), sequence(3, priority=1), sequence(4, priority=-1))

    assert [admit(queue).arrival for _ in range(5)] == [1, 3, 0, 2, 4]
    assert queue.head() is None


def test_tenants_take_turns_however_many_each_has_waiting() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(6)), *(sequence(n, "b") for n in range(6, 9)))

    assert turns(queue, 9) == "abababaaa"


def test_priority_is_worth_nothing_against_another_tenant() -> None:
    queue = queue_of(sequence(0, "a"), sequence(1, "a"), sequence(2, "b", priority=9), sequence(3, "b", priority=9))

    assert turns(queue, 4) == "abab"


def test_turns_are_counted_in_tokens_of_prompt_and_output() -> None:
    queue = queue_of(*(sequence(n, "a", num_prompt=10, max_tokens=30) for n in range(4)), *(sequence(n, "b") for n in range(4, 12)))

    assert turns(queue, 9) == "abbabbabb"


def test_what_was_not_used_is_refunded_at_the_end() -> None:
    queue = queue_of(*(sequence(n, "a", max_tokens=1000) for n in range(3)), *(sequence(n, "b") for n in range(3, 6)))
    first = admit(queue)

    end(queue, first, num_output=5)

    assert turns(queue, 3) == "bab"  # 15 tokens of a are less than the 20 of b's first one


def test_a_tenant_gets_no_credit_for_the_time_it_was_away() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(20)), sequence(20, "b"))
    for admitted in [admit(queue) for _ in range(10)]:
        end(queue, admitted, num_output=10)

    for n in range(30, 36):
        queue.add(sequence(n, "b"))

    assert turns(queue, 6) in ("ababab", "bababa")


def test_a_newcomer_does_not_wait_for_what_others_hold_in_advance() -> None:
    queue = queue_of(*(sequence(n, "a", max_tokens=990) for n in range(20)))
    for _ in range(4):
        admit(queue)

    for n in range(20, 30):
        queue.add(sequence(n, "b", max_tokens=990))

    assert turns(queue, 6) == "bbbbab"  # until both have as many running


def test_a_newcomer_after_a_lull_starts_level_with_who_was_served_last() -> None:
    queue = queue_of(*(sequence(n, "a") for n in range(10)))
    for _ in range(10):
        end(queue, admit(queue), num_output=10)

    queue.add(sequence(10, "b"))
    queue.add(sequence(11, "b"))
    queue.add(sequence(12, "a"))
    queue.add(sequence(13, "a"))

    assert turns(queue, 4) == "baba"


def test_one_that_leaves_the_queue_costs_its_tenant_nothing() -> None:
    gone = sequence(0, "a", max_tokens=1000)
    queue = queue_of(gone, sequence(1, "a"), sequence(2, "b"))

    queue.remove(gone)

    assert (len(queue), [each.arrival for each in queue]) == (2, [1, 2])
    assert turns(queue, 2) == "ab"


def test_tenants_that_are_through_leave_nothing_behind() -> None:
    queue = FairQueue()

    for n in range(1000):
        queue.add(sequence(n, f"tenant {n}"))
        end(queue, admit(queue), num_output=n % 10)

    assert len(queue._tenants) < 5


def test_names_without_end_are_not_all_remembered_while_somebody_always_waits() -> None:
    queue = queue_of(sequence(0, "heavy", max_tokens=500), *(sequence(n, f"tenant {n}") for n in range(1, 9)))
    end(queue, admit(queue), num_output=500)

    for n in range(9, 2000):
        queue.add(sequence(n, f"tenant {n}"))
        end(queue, admit(queue), num_output=n % 10)

    assert len(queue._tenants) < MAX_SETTLED + 20
    assert queue._tenants["heavy"].charge == 510, "who received most has most to gain from being forgotten"


@pytest.mark.parametrize("num_slots", [1, 4])
@given(lengths=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1)), min_size=2, max_size=60))
def test_tenants_that_wait_all_the_time_receive_alike(num_slots: int, lengths: list[tuple[str, int, int, float]]) -> None:
    queue = queue_of(
        *(
            sequence(n, tenant, num_prompt=num_prompt, max_tokens=max_tokens)
            for n, (tenant, num_prompt, max_tokens, _) in enumerate(lengths)
        )
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

        assert abs(received["a"] - received["b"]) <= 60 * (num_slots + 1)
