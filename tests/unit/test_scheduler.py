"""Who computes how many tokens, told as sentences. Random histories are in `test_core.py`."""

from engine.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.scheduler import MAX_PREEMPTIONS, Schedule, Scheduler
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams

BLOCK_SIZE = 4


def scheduler_of(*, num_blocks: int = 100, max_num_seqs: int = 8, budget: int = 16) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=200)
    return Scheduler(config, BlockPool(num_blocks), block_size=BLOCK_SIZE)


def add(scheduler: Scheduler, arrival: int, num_prompt: int, *, max_tokens: int = 20) -> Sequence:
    """Queue a sequence; `arrival` is its age and name."""
    prompt = tuple(range(num_prompt))
    request = GenerationRequest(request_id=str(arrival), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))
    sequence = Sequence(request=request, arrival=arrival, token_ids=list(prompt))
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[int, int]:
    """Schedule and compute: every sequence that is through gets another token. Tokens computed by arrival, in schedule order."""
    schedule = scheduler.schedule()
    compute(schedule)
    return {item.sequence.arrival: item.num_tokens for item in schedule.items}


def compute(schedule: Schedule) -> None:
    for item in schedule.items:
        item.sequence.num_computed_tokens += item.num_tokens
        if not item.sequence.num_remaining_tokens:
            item.sequence.token_ids.append(7)


def test_a_waiting_sequence_starts_in_the_step_after_it_came() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 5)

    assert step(scheduler) == {0: 5}
    assert step(scheduler) == {0: 1}


def test_a_long_prompt_is_read_in_chunks_of_the_budget() -> None:
    scheduler = scheduler_of(budget=16)
    add(scheduler, 0, 40)

    assert [step(scheduler) for _ in range(4)] == [{0: 16}, {0: 16}, {0: 8}, {0: 1}]


def test_single_tokens_go_before_a_prompt_and_the_prompt_takes_the_rest() -> None:
    scheduler = scheduler_of(budget=16)
    add(scheduler, 0, 3)
    step(scheduler)
    add(scheduler, 1, 40)

    assert [step(scheduler) for _ in range(4)] == [{0: 1, 1: 15}, {0: 1, 1: 15}, {0: 1, 1: 10}, {0: 1, 1: 1}]


def test_an_older_prompt_does_not_hold_up_younger_single_tokens() -> None:
    scheduler = scheduler_of(budget=16)
    old = add(scheduler, 0, 60)
    young = add(scheduler, 1, 3)
    for sequence in (old, young):  # as if both had been let in before
        sequence.slot = scheduler._free_slots.pop()
        scheduler.running.append(sequence)
    scheduler._waiting.clear()
    young.num_computed_tokens = 2
    young.block_ids.extend(scheduler.pool.take(1))

    assert step(scheduler) == {1: 1, 0: 15}


def test_waiting_sequences_start_in_the_order_they_came() -> None:
    scheduler = scheduler_of(budget=16)
    for arrival, length in enumerate((6, 6, 9, 2)):
        add(scheduler, arrival, length)

    assert step(scheduler) == {0: 6, 1: 6, 2: 4}
    assert step(scheduler) == {0: 1, 1: 1, 2: 5, 3: 2}


def test_no_more_run_than_there_are_slots() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    first, *_ = [add(scheduler, arrival, 2) for arrival in range(3)]

    assert step(scheduler) == {0: 2, 1: 2}

    scheduler.remove(first)
    assert step(scheduler) == {1: 1, 2: 2}


def test_with_a_budget_below_the_number_of_slots_everybody_who_runs_still_moves() -> None:
    scheduler = scheduler_of(budget=3, max_num_seqs=8)
    for arrival in range(6):
        add(scheduler, arrival, 4)

    for _ in range(20):
        assert len(step(scheduler)) == len(scheduler.running) <= 3


def test_blocks_are_taken_as_tokens_need_them() -> None:
    scheduler = scheduler_of()
    sequence = add(scheduler, 0, 7)

    assert [(step(scheduler), len(sequence.block_ids))[1] for _ in range(4)] == [2, 2, 3, 3]


def test_a_sequence_that_leaves_gives_back_its_blocks_and_its_slot_at_once() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    sequence = add(scheduler, 0, 7)
    step(scheduler)

    scheduler.remove(sequence)

    assert scheduler.pool.num_held == 0
    assert not scheduler.has_work
    add(scheduler, 1, 1)
    assert step(scheduler) == {1: 1}


def test_a_waiting_sequence_leaves_from_anywhere_in_the_queue() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    _, second, third = (add(scheduler, arrival, 2) for arrival in range(3))
    step(scheduler)

    scheduler.remove(second)

    assert scheduler.waiting == (third,)


def test_when_blocks_run_out_the_youngest_gives_way_and_heads_the_queue() -> None:
    scheduler = scheduler_of(num_blocks=3)
    add(scheduler, 0, 4)
    middle, young = add(scheduler, 1, 4), add(scheduler, 2, 4)

    assert step(scheduler) == {0: 4, 1: 4, 2: 4}
    assert step(scheduler) == {0: 1}  # all three need a second block: 0 takes the one of 2, 1 finds nobody younger
    assert scheduler.waiting == (middle, young)
    assert [sequence.num_preemptions for sequence in (*scheduler.running, middle, young)] == [0, 1, 1]


def test_who_gave_way_starts_anew_from_its_first_token_with_all_it_has_generated() -> None:
    scheduler = scheduler_of(num_blocks=4)
    old, young = add(scheduler, 0, 8), add(scheduler, 1, 7)
    step(scheduler)
    step(scheduler)

    assert young.num_preemptions == 1
    assert (young.num_computed_tokens, list(young.block_ids), young.slot) == (0, [], None)
    assert young.num_tokens == 8

    scheduler.remove(old)
    assert step(scheduler) == {1: 8}


def test_nobody_is_let_in_during_the_step_that_preempted() -> None:
    scheduler = scheduler_of(num_blocks=4)
    add(scheduler, 0, 8)
    add(scheduler, 1, 7)
    add(scheduler, 2, 1)
    step(scheduler)

    assert step(scheduler) == {0: 1}


def test_a_prompt_waits_until_all_of_it_fits_not_only_its_first_chunk() -> None:
    scheduler = scheduler_of(num_blocks=10, budget=8)
    old = add(scheduler, 0, 20)
    add(scheduler, 1, 24)
    for _ in range(3):
        step(scheduler)

    assert step(scheduler) == {0: 1}

    scheduler.remove(old)
    assert step(scheduler) == {1: 8}


def test_a_sequence_that_needs_the_whole_pool_runs_once_it_is_alone() -> None:
    scheduler = scheduler_of(num_blocks=200, budget=1000)
    small = add(scheduler, 0, 1)
    add(scheduler, 1, 796, max_tokens=4)

    assert step(scheduler) == {0: 1}

    scheduler.remove(small)
    assert step(scheduler) == {1: 796}


def test_a_few_blocks_stay_free_when_others_run() -> None:
    scheduler = scheduler_of(num_blocks=200, budget=1000)
    add(scheduler, 0, 4)
    add(scheduler, 1, 4 * 198)

    assert step(scheduler) == {0: 4}


def test_who_gave_way_too_often_waits_until_it_never_has_to_again() -> None:
    scheduler = scheduler_of(num_blocks=10)
    old, victim = add(scheduler, 0, 4, max_tokens=12), add(scheduler, 1, 4, max_tokens=24)
    victim.num_preemptions = MAX_PREEMPTIONS

    assert step(scheduler) == {0: 4}  # 4 blocks for the old one at its end and 7 for the other are more than 10

    scheduler.remove(old)
    add(scheduler, 2, 4)
    step(scheduler)
    for _ in range(23):
        step(scheduler)
    assert victim.num_preemptions == MAX_PREEMPTIONS


def test_a_sequence_is_told_when_it_gets_a_slot_and_only_then() -> None:
    scheduler = scheduler_of()
    sequence = add(scheduler, 0, 4)

    admitted = []
    for _ in range(2):
        schedule = scheduler.schedule()
        admitted.append(schedule.admitted)
        compute(schedule)

    assert admitted == [(sequence,), ()]


def test_with_nothing_to_do_nothing_is_scheduled() -> None:
    schedule = scheduler_of().schedule()

    assert schedule.items == schedule.admitted == ()
