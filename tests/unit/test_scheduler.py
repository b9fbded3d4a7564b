"""Who computes how many tokens, first told as sentences, then in random histories on a device that checks every block it reads.

Who is next among tenants, and who makes way for whom, is told in `test_fairness.py`.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import add, commit, scheduler_of, sequence_of, step

from engine.prefix_cache import PrefixCache
from engine.scheduler import MAX_PREEMPTIONS, MAX_YIELDS, Schedule, ScheduledTokens
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams


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


def test_waiting_sequences_start_in_the_order_they_came() -> None:
    scheduler = scheduler_of(budget=16)
    for arrival, length in enumerate((6, 6, 9, 2)):
        add(scheduler, arrival, length)

    assert step(scheduler) == {0: 6, 1: 6, 2: 4}
    assert step(scheduler) == {0: 1, 1: 1, 2: 5, 3: 2}


def test_the_smaller_tenant_starts_first_and_within_a_tenant_the_higher_priority() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    for arrival in range(4):
        add(scheduler, arrival, 2, max_tokens=1, tenant="a", priority=arrival // 2)
    for arrival in range(4, 6):
        add(scheduler, arrival, 2, max_tokens=1, tenant="b")

    assert [*(next(iter(step(scheduler))) for _ in range(6))] == [4, 5, 2, 3, 0, 1]


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


def test_a_prompt_takes_the_blocks_of_all_its_tokens_and_then_one_at_a_time() -> None:
    scheduler = scheduler_of(budget=8)
    sequence = add(scheduler, 0, 15)

    assert [(step(scheduler), len(sequence.block_ids))[1] for _ in range(4)] == [4, 4, 4, 5]


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


def test_what_is_scheduled_counts_as_computed_and_its_token_as_pending() -> None:
    scheduler = scheduler_of(budget=4)
    sequence = add(scheduler, 0, 6)

    first, second, third = (scheduler.schedule().items for _ in range(3))

    assert first == (ScheduledTokens(sequence, 0, 4, False),)
    assert second == (ScheduledTokens(sequence, 4, 2, True),)
    assert third == (ScheduledTokens(sequence, 6, 1, True),)  # the token that the second step chooses
    assert (sequence.num_computed_tokens, len(sequence.token_ids)) == (7, 6)


def test_a_sequence_whose_pending_token_is_its_last_is_not_scheduled_again() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 3, max_tokens=2)
    first, second = scheduler.schedule(), scheduler.schedule()
    commit(scheduler, first)

    assert scheduler.schedule().items == ()

    commit(scheduler, second)
    assert not scheduler.has_work


def test_a_sequence_that_needs_the_host_skips_a_step_and_the_others_do_not() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 3).needs_host = True
    add(scheduler, 1, 3)

    steps = []
    in_flight = scheduler.schedule()
    for _ in range(4):
        launched = scheduler.schedule()
        commit(scheduler, in_flight)
        in_flight = launched
        steps.append([item.sequence.arrival for item in launched.items])

    assert steps == [[1], [0, 1], [1], [0, 1]]


def test_a_prompt_without_output_chooses_no_token() -> None:
    scheduler = scheduler_of()
    sequence = add(scheduler, 0, 5, max_tokens=0)

    assert scheduler.schedule().items == (ScheduledTokens(sequence, 0, 5, False),)
    assert scheduler.schedule().items == ()


def test_when_blocks_run_out_the_youngest_gives_way_and_heads_the_queue() -> None:
    scheduler = scheduler_of(num_blocks=3)
    add(scheduler, 0, 4)
    middle, young = add(scheduler, 1, 4), add(scheduler, 2, 4)

    assert step(scheduler) == {0: 4, 1: 4, 2: 4}
    assert step(scheduler) == {0: 1}  # all three need a second block: 0 takes the one of 2, 1 finds nobody younger
    assert scheduler.waiting == (middle, young)
    assert [sequence.num_preemptions for sequence in (*scheduler.running, middle, young)] == [0, 1, 1]


def test_who_gave_way_computes_again_only_what_the_cache_has_lost() -> None:
    scheduler = scheduler_of(num_blocks=4)
    old, young = add(scheduler, 0, 8), add(scheduler, 1, 7)
    step(scheduler)
    step(scheduler)

    assert young.num_preemptions == 1
    assert (young.num_computed_tokens, list(young.block_ids), young.slot) == (0, [], None)
    assert young.num_tokens == 8

    scheduler.remove(old)
    assert step(scheduler) == {1: 4}  # the block that was not full had to go


def test_who_gave_way_starts_before_newcomers_of_whatever_priority() -> None:
    scheduler = scheduler_of(num_blocks=4)
    old, _ = add(scheduler, 0, 8), add(scheduler, 1, 7)
    step(scheduler)
    step(scheduler)
    add(scheduler, 2, 1, priority=5)

    assert step(scheduler) == {0: 1}

    scheduler.remove(old)
    assert list(step(scheduler)) == [1, 2]


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


class CountingCache(PrefixCache):
    """Counts the lookups."""

    num_lookups = 0

    def lookup(self, sequence: Sequence) -> list[int]:
        self.num_lookups += 1
        return super().lookup(sequence)


def test_who_does_not_fit_is_looked_up_again_only_when_there_are_more_blocks() -> None:
    scheduler = scheduler_of(num_blocks=30, budget=200)
    scheduler.cache = cache = CountingCache(scheduler.pool, block_size=4)
    old, middle = add(scheduler, 0, 20, max_tokens=40), add(scheduler, 1, 20, max_tokens=40)
    step(scheduler)
    add(scheduler, 2, 100)
    cache.num_lookups = 0

    for _ in range(9):
        step(scheduler)
    assert cache.num_lookups == 1

    scheduler.remove(middle)
    step(scheduler)
    step(scheduler)
    assert cache.num_lookups == 2

    scheduler.remove(old)
    assert step(scheduler) == {2: 100}


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
    for _ in range(24):
        step(scheduler)
    assert victim.is_over
    assert victim.num_preemptions == MAX_PREEMPTIONS


def test_a_sequence_is_told_when_it_gets_a_slot_and_only_then() -> None:
    scheduler = scheduler_of()
    sequence = add(scheduler, 0, 4)

    assert [scheduler.schedule().admitted for _ in range(2)] == [(sequence,), ()]


def test_with_nothing_to_do_nothing_is_scheduled() -> None:
    schedule = scheduler_of().schedule()

    assert schedule.items == schedule.admitted == ()


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = scheduler_of(budget=100)
    add(scheduler, 0, 10, first=0)
    step(scheduler)
    sequence = add(scheduler, 1, 12, first=0)

    assert step(scheduler) == {0: 1, 1: 4}
    assert (sequence.num_shared_tokens, sequence.num_cached_tokens) == (8, 8)
    assert (scheduler.cache.num_lookup_tokens, scheduler.cache.num_hit_tokens) == (22, 8)


def test_choices_of_one_prompt_share_its_blocks_in_the_very_step_that_computes_them() -> None:
    scheduler = scheduler_of(budget=100)
    choices = [add(scheduler, arrival, 11, first=0) for arrival in range(3)]

    assert step(scheduler) == {0: 11, 1: 3, 2: 3}
    assert len({tuple(choice.block_ids[:2]) for choice in choices}) == 1
    assert scheduler.pool.num_held == 2 + 3


def test_a_prompt_that_is_known_to_its_end_computes_its_last_token_and_writes_to_no_shared_block() -> None:
    scheduler = scheduler_of(budget=100)
    add(scheduler, 0, 8, first=0)
    sequence = add(scheduler, 1, 8, first=0)

    assert step(scheduler) == {0: 8, 1: 1}
    assert (sequence.num_shared_tokens, sequence.num_cached_tokens, len(sequence.block_ids)) == (8, 7, 2)

    step(scheduler)
    assert sequence.block_ids[2] != scheduler.running[0].block_ids[2]


def test_generated_blocks_are_found_by_who_goes_on_from_them() -> None:
    scheduler = scheduler_of()
    talk = add(scheduler, 0, 5, first=0, max_tokens=8)
    while scheduler.has_work:
        step(scheduler)
    scheduler.add(sequence_of(1, (*talk.token_ids, 1, 2)))

    assert step(scheduler) == {1: 3}  # 13 tokens are 3 full blocks, the last token was never computed


def test_found_blocks_that_nobody_holds_count_as_taken_when_admitting() -> None:
    scheduler = scheduler_of(num_blocks=10, budget=100)
    known = add(scheduler, 0, 24, first=0)
    step(scheduler)
    scheduler.remove(known)
    add(scheduler, 1, 4)
    add(scheduler, 2, 20)
    step(scheduler)
    assert scheduler.pool.num_free == 4

    add(scheduler, 3, 24, first=0)
    assert 3 not in step(scheduler)


def test_the_prefix_that_a_failed_sequence_computed_is_not_found() -> None:
    scheduler = scheduler_of()
    failed = add(scheduler, 0, 9, first=0)
    step(scheduler)

    scheduler.remove(failed, discard=True)
    add(scheduler, 1, 9, first=0)

    assert step(scheduler) == {1: 9}


def test_one_that_fails_after_it_gave_way_is_forgotten_by_the_cache_too() -> None:
    scheduler = scheduler_of(num_blocks=4)
    old, young = add(scheduler, 0, 8), add(scheduler, 1, 7, first=500)
    step(scheduler)
    step(scheduler)
    assert young.num_preemptions == 1

    scheduler.remove(young, discard=True)
    scheduler.remove(old)

    add(scheduler, 2, 7, first=500)
    assert step(scheduler) == {2: 7}


# Random histories. The device below keeps, per place of a block, the whole text up to it: what equal prefixes share and others do not.

END = 0  # a token
SALTS = st.sampled_from(["", "", "x"])
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=12)


def next_token(text: list[int]) -> int:
    return hash(tuple(text)) % 6


def solo(sequence: Sequence) -> list[int]:
    """All tokens of a sequence that nobody disturbs."""
    text = list(sequence.request.prompt_token_ids)
    while len(text) < sequence.max_len and (len(text) == sequence.num_prompt_tokens or text[-1] != END):
        text.append(next_token(text))
    return text


class Device:
    """Writes, then reads, then chooses, as a step does, and checks that every sequence sees its own text and nothing else."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.places: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.texts: dict[Sequence, list[int]] = {}  # with the tokens that the host does not know yet

    def launch(self, schedule: Schedule) -> None:
        for item in schedule.items:
            self.texts.setdefault(item.sequence, list(item.sequence.token_ids))
            self._write(item)
        for item in schedule.items:
            self._read(item)
        for item in schedule.items:
            if item.chooses_token:
                text = self.texts[item.sequence]
                assert item.start + item.num_tokens == len(text), "a token was chosen in the middle of the text"
                text.append(next_token(text))

    def _write(self, item: ScheduledTokens) -> None:
        for position in range(item.start, item.start + item.num_tokens):
            if position >= item.sequence.num_shared_tokens:
                self.places[self._place(item.sequence, position)] = self._content(item.sequence, position)

    def _read(self, item: ScheduledTokens) -> None:
        for position in range(item.start + item.num_tokens):
            assert self.places[self._place(item.sequence, position)] == self._content(item.sequence, position)

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self.block_size], position % self.block_size

    def _content(self, sequence: Sequence, position: int) -> tuple[str, tuple[int, ...]]:
        return sequence.request.cache_salt, tuple(self.texts[sequence][: position + 1])


class SchedulerMachine(RuleBasedStateMachine):
    """Tenants send, change their minds and fail while the engine runs one step ahead in a pool that may be far too small."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(5, 16),
        max_num_seqs=st.sampled_from([6, 4, 2, 1]),
        budget=st.sampled_from([24, 8, 5, 1]),
    )
    def make_scheduler(self, block_size: int, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        self.scheduler = scheduler_of(num_blocks=num_blocks, max_num_seqs=max_num_seqs, budget=budget, block_size=block_size)
        self.limit = min(40, num_blocks * block_size)
        self.device = Device(block_size)
        self.in_flight: Schedule | None = None
        self.open: list[Sequence] = []
        self.num_sequences = 0

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=4),
        max_tokens=st.sampled_from([0, 1, 6, 12, 20]),
        num_output=st.sampled_from([0, 0, 0, 3]),
        tenant=st.sampled_from("ab"),
        priority=st.integers(0, 1),
        salt=SALTS,
        needs_host=st.sampled_from([False, False, True]),
    )
    def submit(
        self, prompts: list[list[int]], max_tokens: int, num_output: int, tenant: str, priority: int, salt: str, needs_host: bool
    ) -> None:
        for prompt in prompts:
            prompt = prompt[: self.limit]
            request = GenerationRequest(
                request_id="",
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=min(max_tokens, self.limit - len(prompt))),
                tenant=tenant,
                priority=priority,
                cache_salt=salt,
            )
            sequence = Sequence(request=request, arrival=self.num_sequences, token_ids=prompt, needs_host=needs_host)
            whole = solo(sequence)
            sequence.token_ids = whole[: max(len(prompt), min(len(prompt) + num_output, len(whole) - 1))]  # as if begun elsewhere
            self.num_sequences += 1
            self.open.append(sequence)
            self.scheduler.add(sequence)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), is_sound=st.booleans())
    def abort(self, data: st.DataObject, is_sound: bool) -> None:
        self.end(data.draw(st.sampled_from(self.open)), is_sound=is_sound)

    def end(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        self.scheduler.remove(sequence, discard=not is_sound)
        sequence.is_over = True
        self.open.remove(sequence)

    @rule(num_steps=st.integers(1, 8))
    def take_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()
            self.check()

    def step(self) -> None:
        pending = {sequence: sequence.num_pending_tokens for sequence in self.open}
        oldest = self.scheduler.running[:1]
        preemptions = [sequence.num_preemptions for sequence in oldest]

        schedule = self.scheduler.schedule()

        assert schedule.items or self.in_flight or not self.open, "work is pending, and nothing is done"
        assert sum(item.num_tokens for item in schedule.items) <= self.scheduler.config.max_num_batched_tokens
        assert [sequence.num_preemptions for sequence in oldest] == preemptions, "the oldest gave way"
        assert len({item.sequence for item in schedule.items}) == len(schedule.items)
        for item in schedule.items:
            assert item.num_tokens > 0
            assert item.sequence in self.scheduler.running
            assert item.start + item.num_tokens == item.sequence.num_computed_tokens
            assert not (item.sequence.needs_host and pending[item.sequence])
            assert item.start + item.num_tokens < item.sequence.max_len + (not item.sequence.request.sampling.max_tokens)
        assert not any(pending[sequence] for sequence in schedule.admitted), "let in before its token is known"
        self.check_writers(schedule)
        self.device.launch(schedule)
        self.check()
        self.commit()
        self.in_flight = schedule if schedule.items else None

    def check_writers(self, schedule: Schedule) -> None:
        """A written block has one holder, but for those who found it in this very step."""
        for item in schedule.items:
            first = max(item.start, item.sequence.num_shared_tokens) // self.scheduler.block_size
            written = set(item.sequence.block_ids[first : -(-(item.start + item.num_tokens) // self.scheduler.block_size)])
            for other in self.scheduler.running:
                if other is not item.sequence:
                    assert other in schedule.admitted or not written & set(other.block_ids)
                    assert not written & set(other.block_ids[other.num_shared_tokens // self.scheduler.block_size :])

    def commit(self) -> None:
        for item in self.in_flight.items if self.in_flight else ():
            sequence = item.sequence
            if sequence.is_over:
                continue
            if item.chooses_token:
                sequence.token_ids.append(self.device.texts[sequence][len(sequence.token_ids)])
                sequence.num_pending_tokens -= 1
            is_through = item.chooses_token or (item.start + item.num_tokens == sequence.max_len == sequence.num_prompt_tokens)
            if is_through and (sequence.token_ids[-1] == END or len(sequence.token_ids) == sequence.max_len):
                assert sequence.token_ids == solo(sequence)
                self.end(sequence)

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler, pool = self.scheduler, self.scheduler.pool
        running, waiting = scheduler.running, scheduler.waiting
        held = {block for sequence in running for block in sequence.block_ids}
        owned = [block for sequence in running for block in sequence.block_ids[sequence.num_shared_tokens // scheduler.block_size :]]
        assert pool.num_free + pool.num_held == pool.num_blocks
        assert pool.num_held == len(held)
        assert pool.num_cached <= pool.num_free
        assert len(set(owned)) == len(owned), "a block is written by two"
        assert not any(sequence.block_ids or sequence.slot is not None for sequence in waiting)
        assert not any(sequence.num_computed_tokens or sequence.num_shared_tokens for sequence in waiting)
        assert len({sequence.slot for sequence in running} - {None}) == len(running) <= scheduler.config.max_num_seqs
        assert len(running) + len(waiting) == len({*running, *waiting}) == len(self.open), "someone stands in two queues, or in none"
        assert len(waiting) == scheduler.num_waiting
        ranks = [sequence.rank for sequence in (*running, *waiting) if sequence.rank is not None]
        assert ranks == sorted(ranks), "a younger one overtook"
        assert all(sequence.num_preemptions <= MAX_PREEMPTIONS and sequence.num_yields <= MAX_YIELDS for sequence in self.open)
        assert all(len(sequence.block_ids) * scheduler.block_size >= sequence.num_computed_tokens for sequence in running)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.open:
                break
            self.step()
        assert not self.open, "somebody never finished"
        assert self.scheduler.pool.num_held == 0
        assert not self.scheduler.has_work


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestScheduler = SchedulerMachine.TestCase
