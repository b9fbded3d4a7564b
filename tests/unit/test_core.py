"""The step loop on a runner that checks every step and answers by hashing the whole context: any mistake changes the tokens."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scripted_requests import GREEDY, request
from scripted_runner import (
    EOS,
    NUM_TOP,
    POISON,
    VOCAB_SIZE,
    Clock,
    check_conservation,
    engine_config,
    expected,
    joined,
    run_until_idle,
    scripted_core,
)

from engine.batch import StepKind
from engine.errors import RequestError
from engine.scheduler import MAX_PREEMPTIONS
from engine.types import FinishReason, GenerationRequest, SamplingParams, TokenDelta

TOKENS = st.integers(0, VOCAB_SIZE - 2)
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.75]),
    top_p=st.sampled_from([1.0, 0.5]),
    top_k=st.integers(0, VOCAB_SIZE + 2),
    seed=st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.sampled_from([0, 1, 6, 12, 20]),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(TOKENS, max_size=3).map(tuple),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-1.5, 2.0]), max_size=2),
    logprobs=st.none() | st.integers(0, NUM_TOP),
    prompt_logprobs=st.none() | st.integers(0, NUM_TOP),
    allowed_token_ids=st.sampled_from([(), (), (), tuple(range(3, 60))]),
    bad_words=st.just(()) | st.lists(st.lists(TOKENS, min_size=1, max_size=2).map(tuple), max_size=30).map(tuple),
)


class CoreMachine(RuleBasedStateMachine):
    """Requests come, go and time out at any moment, in an engine that may be far too small for them."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(5, 16),
        max_num_seqs=st.sampled_from([6, 4, 2, 1]),
        budget=st.sampled_from([24, 8, 5, 1]),
    )
    def make_core(self, block_size: int, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        self.config = engine_config(
            num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=40
        )
        self.limit = min(40, num_blocks * block_size)
        self.clock = Clock()
        self.core, self.runner = scripted_core(self.config, clock=self.clock)
        self.open: dict[str, GenerationRequest] = {}
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.num_requests = 0
        self.has_launched = False  # in the last step

    @rule(
        prompts=st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=4),
        sampling=SAMPLINGS,
        patience_s=st.sampled_from([None, None, 0, 2, 6]),
    )
    def submit(self, prompts: list[list[int]], sampling: SamplingParams, patience_s: int | None) -> None:
        deadline_s = None if patience_s is None else self.clock.now_s + patience_s
        for choice, prompt in enumerate(prompts):
            prompt = prompt[: self.limit]
            fitting = replace(sampling, max_tokens=min(sampling.max_tokens, self.limit - len(prompt)))
            self.accept(request(self.next_id(), *prompt, sampling=fitting, choice=choice, deadline_s=deadline_s))

    def next_id(self) -> str:
        self.num_requests += 1
        return str(self.num_requests)

    def accept(self, new: GenerationRequest) -> None:
        self.core.submit(new)
        self.open[new.request_id] = new

    @rule(num_prompt=st.integers(1, 60))
    def submit_one_that_can_never_fit(self, num_prompt: int) -> None:
        max_tokens = max(0, self.limit + 1 - num_prompt)

        with pytest.raises(RequestError, match="exceed the limit"):
            self.core.submit(request("x", *[5] * num_prompt, sampling=replace(GREEDY, max_tokens=max_tokens)))

    @precondition(lambda self: self.num_requests % 5 == 4)
    @rule(prompt=st.lists(TOKENS, max_size=2), place=st.integers(0, 2))
    def submit_one_that_fails(self, prompt: list[int], place: int) -> None:
        prompt.insert(place, POISON)
        self.accept(request(self.next_id(), *prompt, sampling=replace(GREEDY, max_tokens=2, prompt_logprobs=1)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def submit_a_second_time(self, data: st.DataObject) -> None:
        with pytest.raises(RequestError, match="already running"):
            self.core.submit(self.open[data.draw(st.sampled_from(sorted(self.open)))])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.open)))

        self.core.abort(request_id)

        del self.open[request_id]
        check_conservation(self.core)

    @rule(number=st.integers(0, 50))
    def abort_one_that_is_gone(self, number: int) -> None:
        if str(number) not in self.open:
            self.core.abort(str(number))

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @rule(count=st.integers(1, 8))
    def take_steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        num_batches = len(self.runner.batches)
        had_running = self.core.scheduler.running[:1]
        preemptions = [sequence.num_preemptions for sequence in had_running]

        deltas = self.core.step()

        for delta in deltas:
            assert delta.request_id in self.open, "a delta after the end or after an abort"
            self.deltas.setdefault(delta.request_id, []).append(delta)
            if delta.finish_reason:
                self.check_end(self.open.pop(delta.request_id))
        new_batches = self.runner.batches[num_batches:]
        assert all(
            0 < sum(item.num_tokens for item in batch.items) <= self.config.scheduler.max_num_batched_tokens for batch in new_batches
        )
        assert new_batches or self.has_launched or not self.core.has_work, "a step with work neither launched nor collected"
        self.has_launched = bool(new_batches)
        assert [sequence.num_preemptions for sequence in had_running] == preemptions, "the oldest gave way"
        assert all(each.num_preemptions <= MAX_PREEMPTIONS for each in (*self.core.scheduler.running, *self.core.scheduler.waiting))
        assert all(each.deadline_s is None or each.deadline_s > self.clock.now_s for each in self.open.values())
        check_conservation(self.core)

    def check_end(self, ended: GenerationRequest) -> None:
        result, wanted = joined(self.deltas[ended.request_id]), expected(ended)
        if result.finish_reason is FinishReason.DEADLINE:
            assert ended.deadline_s is not None
            assert ended.deadline_s <= self.clock.now_s
            assert result.token_ids == wanted.token_ids[: len(result.token_ids)]
            assert result.prompt_logprobs == wanted.prompt_logprobs[: len(result.prompt_logprobs)]
        elif wanted.finish_reason is FinishReason.ERROR:
            assert (result.finish_reason, result.token_ids) == (FinishReason.ERROR, ())
        else:
            assert result == wanted

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(3000):
            if not self.core.has_work:
                break
            self.step()
        assert not self.open, "an accepted request never ended"
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)


CoreMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestCore = CoreMachine.TestCase


def test_a_request_gets_its_tokens_one_per_step_and_one_end() -> None:
    core, _ = scripted_core(engine_config())
    core.submit(request("a"))

    deltas = run_until_idle(core)["a"]

    assert [len(delta.token_ids) for delta in deltas] == [1] * 8
    assert joined(deltas) == expected(request("a"))


def test_the_next_step_is_launched_before_the_last_one_is_read() -> None:
    core, runner = scripted_core(engine_config())
    core.submit(request("a"))

    assert core.step() == []
    launched, first = len(runner.batches), core.step()

    assert launched == 1
    assert len(runner.batches) == 2
    assert joined(first).token_ids == expected(request("a")).token_ids[:1]


def test_a_sequence_that_ends_by_length_is_given_no_step_too_many() -> None:
    core, runner = scripted_core(engine_config())
    core.submit(request("a"))

    run_until_idle(core)

    assert len(runner.batches) == 8


def test_what_is_computed_for_a_sequence_that_ended_by_its_token_is_thrown_away() -> None:
    core, runner = scripted_core(engine_config())
    core.submit(request("a", sampling=end_at(3)))
    core.submit(request("b"))

    deltas = run_until_idle(core)

    assert sum(item.sequence.request.request_id == "a" for batch in runner.batches for item in batch.items) == 4
    assert joined(deltas["a"]).token_ids == expected(request("a")).token_ids[:3]
    assert joined(deltas["b"]) == expected(request("b"))


def test_a_sequence_that_needs_the_host_between_two_tokens_takes_every_second_step() -> None:
    core, runner = scripted_core(engine_config())
    core.submit(request("a"))
    core.submit(request("b"))
    core.scheduler.waiting[0].needs_host = True

    deltas = run_until_idle(core)

    steps = [{item.sequence.request.request_id for item in batch.items} for batch in runner.batches]
    assert steps[:4] == [{"a", "b"}, {"b"}, {"a", "b"}, {"b"}]
    assert [joined(deltas[name]) for name in "ab"] == [expected(request(name)) for name in "ab"]


def test_a_prefix_that_was_computed_before_is_not_computed_again() -> None:
    core, runner = scripted_core(engine_config(max_num_batched_tokens=64))
    first, longer = request("a", *range(3, 23)), request("b", *range(3, 33))

    deltas: list[dict[str, list[TokenDelta]]] = []
    for each in (first, longer, first):
        core.submit(each)
        deltas.append(run_until_idle(core))

    assert [each["ab"[n % 2]][-1].num_cached_tokens for n, each in enumerate(deltas)] == [0, 20, 19]
    assert [batch.items[0].num_tokens for batch in runner.batches if batch.items[0].start < 20] == [20, 1]
    assert joined(deltas[1]["b"]) == expected(longer)
    assert joined(deltas[2]["a"]) == expected(first)


def test_other_salts_share_nothing() -> None:
    core, _ = scripted_core(engine_config(max_num_batched_tokens=64))
    for salt in ("", "one", "two"):
        core.submit(replace(request("a" + salt, *range(3, 23)), cache_salt=salt))

        assert joined(run_until_idle(core)["a" + salt]) == expected(replace(request("a" + salt, *range(3, 23)), cache_salt=salt))
    assert core.cache.num_hit_tokens == 0


def test_a_scored_prompt_is_answered_from_what_its_blocks_gave_before() -> None:
    core, runner = scripted_core(engine_config(max_num_batched_tokens=8))
    scored = request("a", *range(3, 23), sampling=replace(GREEDY, max_tokens=1, prompt_logprobs=3))
    core.submit(scored)
    cold = joined(run_until_idle(core)["a"])
    num_batches = len(runner.batches)

    core.submit(scored)
    warm = joined(run_until_idle(core)["a"])

    assert warm == cold == expected(scored)
    assert [[item.num_tokens for item in batch.items] for batch in runner.batches[num_batches:]] == [[4]]


def test_only_steps_that_compute_a_score_use_the_program_that_does() -> None:
    core, runner = scripted_core(engine_config(max_num_batched_tokens=64))
    scored = request("a", *range(3, 22), sampling=replace(GREEDY, max_tokens=4, prompt_logprobs=3))
    for _ in range(2):
        core.submit(scored)
        assert joined(run_until_idle(core)["a"]).prompt_logprobs == expected(scored).prompt_logprobs

    assert [batch.kind for batch in runner.batches] == [StepKind.SCORE, *[StepKind.GREEDY] * 3] * 2


def test_a_block_that_was_never_scored_is_no_hit_for_a_prompt_that_is() -> None:
    core, _ = scripted_core(engine_config(max_num_batched_tokens=64))
    core.submit(request("a", *range(3, 23)))
    run_until_idle(core)
    scored = request("b", *range(3, 23), sampling=replace(GREEDY, max_tokens=0, prompt_logprobs=0))

    core.submit(scored)

    assert joined(run_until_idle(core)["b"]) == expected(scored)


def test_a_generation_goes_on_behind_what_another_engine_gave() -> None:
    whole = expected(request("a", sampling=replace(GREEDY, presence_penalty=0.5, prompt_logprobs=1)))
    core, _ = scripted_core(engine_config())
    core.submit(
        request("a", sampling=replace(GREEDY, presence_penalty=0.5, prompt_logprobs=1)),
        output_token_ids=whole.token_ids[:5],
        num_scored_tokens=2,
    )

    rest = joined(run_until_idle(core)["a"])

    assert (rest.token_ids, rest.prompt_logprobs, rest.finish_reason) == (whole.token_ids[5:], (), whole.finish_reason)


@pytest.mark.parametrize(("max_tokens", "num_given"), [(8, 8), (8, 9), (0, 1)])
def test_a_generation_that_has_all_its_tokens_already_is_refused(max_tokens: int, num_given: int) -> None:
    core, _ = scripted_core(engine_config())

    with pytest.raises(RequestError, match="there already"):
        core.submit(request("a", sampling=replace(GREEDY, max_tokens=max_tokens)), output_token_ids=(5,) * num_given)


def test_company_does_not_change_a_request_and_aborts_leave_no_block_held() -> None:
    core, _ = scripted_core(engine_config(max_num_seqs=64, max_num_batched_tokens=48, num_blocks=400))
    requests = [
        request(str(n), *range(1, 2 + n % 30), sampling=replace(GREEDY, temperature=float(n % 2), seed=n, max_tokens=20)) for n in range(64)
    ]
    for each in requests:
        core.submit(each)
    early = [delta for _ in range(12) for delta in core.step()]

    for each in requests[::2]:
        core.abort(each.request_id)
    late = run_until_idle(core)

    assert core.stats().num_blocks_used == 0
    assert not any(each.request_id in late for each in requests[::2])
    for each in requests[1::2]:
        deltas = [delta for delta in early if delta.request_id == each.request_id] + late.get(each.request_id, [])
        assert joined(deltas) == expected(each)


def test_a_long_prompt_is_read_beside_running_sequences_that_keep_their_pace() -> None:
    core, _ = scripted_core(engine_config(max_num_batched_tokens=8))
    core.submit(request("short", sampling=replace(GREEDY, max_tokens=20)))
    core.step()
    core.submit(request("long", *range(1, 41)))

    steps = [{delta.request_id for delta in core.step()} for _ in range(8)]

    assert steps == [{"short"}] * 6 + [{"short", "long"}] * 2


def test_a_preempted_sequence_resumes_with_the_same_tokens() -> None:
    core, _ = scripted_core(engine_config(num_blocks=6))
    requests = [
        request(name, *range(3, 10), sampling=replace(GREEDY, temperature=0.5, seed=n, max_tokens=12)) for n, name in enumerate("ab")
    ]
    for each in requests:
        core.submit(each)

    deltas = run_until_idle(core)

    assert core.stats().num_preemptions > 0
    assert [joined(deltas[each.request_id]) for each in requests] == [expected(each) for each in requests]


def test_a_prompt_read_twice_is_scored_once() -> None:
    core, _ = scripted_core(engine_config(num_blocks=8, max_num_batched_tokens=8))
    scored = request("b", *range(3, 20), sampling=replace(GREEDY, max_tokens=8, prompt_logprobs=2))
    core.submit(request("a", sampling=replace(GREEDY, max_tokens=20)))
    core.submit(scored)

    deltas = run_until_idle(core)

    assert core.stats().num_preemptions > 0
    assert len(joined(deltas["b"]).prompt_logprobs) == 16
    assert joined(deltas["b"]) == expected(scored)


def test_preemptions_of_one_sequence_are_bounded_however_tight_the_pool() -> None:
    core, _ = scripted_core(engine_config(num_blocks=16, block_size=1, max_num_seqs=6, max_num_batched_tokens=6, max_model_len=16))
    sequences = []
    for n in range(12):
        core.submit(request(str(n), n + 3, sampling=replace(GREEDY, max_tokens=12)))
        sequences.append(core.scheduler.waiting[-1])

    run_until_idle(core)

    assert core.stats().num_preemptions > 0
    assert max(sequence.num_preemptions for sequence in sequences) <= MAX_PREEMPTIONS


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(60, 5), (65, 0), (1, 64)])
def test_a_request_that_can_never_fit_is_refused_with_the_counts(num_prompt: int, max_tokens: int) -> None:
    core, _ = scripted_core(engine_config(max_model_len=64))

    with pytest.raises(RequestError, match=f"{num_prompt} prompt tokens and {max_tokens} output tokens exceed the limit of 64"):
        core.submit(request("a", *[5] * num_prompt, sampling=replace(GREEDY, max_tokens=max_tokens)))
    assert not core.has_work


def test_a_request_that_just_fits_the_context_or_the_pool_runs_to_its_end() -> None:
    for config in (engine_config(max_model_len=64), engine_config(max_model_len=100, num_blocks=16)):
        core, _ = scripted_core(config)
        core.submit(request("a", *[5] * 60, sampling=replace(GREEDY, max_tokens=4)))

        assert joined(run_until_idle(core)["a"]).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("refused", "cause"),
    [
        (GenerationRequest(request_id="a", prompt_token_ids=(), sampling=GREEDY), "the prompt has no tokens"),
        (request("a", 1, VOCAB_SIZE), "prompt holds token ids from 1 to 97, the vocabulary has 0 to 96"),
        (request("a", 1, -1), "prompt holds token ids from -1 to 1"),
        (request("a", sampling=replace(GREEDY, stop_token_ids=(VOCAB_SIZE,))), "stop_token_ids holds"),
        (request("a", sampling=replace(GREEDY, logit_bias={-1: 1.0})), "logit_bias holds"),
    ],
)
def test_ids_outside_the_vocabulary_and_empty_prompts_are_refused(refused: GenerationRequest, cause: str) -> None:
    core, _ = scripted_core(engine_config())

    with pytest.raises(RequestError, match=cause):
        core.submit(refused)
    assert not core.has_work


def test_an_id_may_be_used_again_once_its_request_ended() -> None:
    core, _ = scripted_core(engine_config())

    for _ in range(2):
        core.submit(request("a"))
        assert joined(run_until_idle(core)["a"]) == expected(request("a"))


def test_max_tokens_zero_reads_the_prompt_scores_it_and_ends_without_a_token() -> None:
    core, _ = scripted_core(engine_config(max_num_batched_tokens=8))
    scored = request("a", *range(3, 23), sampling=replace(GREEDY, max_tokens=0, prompt_logprobs=1))
    core.submit(scored)

    deltas = run_until_idle(core)["a"]

    assert [len(delta.prompt_logprobs) for delta in deltas] == [8, 8, 3]
    assert joined(deltas) == expected(scored)


def test_max_tokens_zero_without_scores_is_one_delta() -> None:
    core, _ = scripted_core(engine_config(max_num_batched_tokens=8))
    core.submit(request("a", *range(3, 23), sampling=replace(GREEDY, max_tokens=0)))

    assert run_until_idle(core)["a"] == [TokenDelta(request_id="a", finish_reason=FinishReason.LENGTH)]


def end_at(count: int, **changes: object) -> SamplingParams:
    """Greedy sampling whose only stop id is the token that would come as number `count`."""
    return replace(GREEDY, stop_token_ids=(expected(request("a")).token_ids[count - 1],), **changes)


def test_a_stop_id_ends_the_generation_and_is_its_last_token() -> None:
    core, _ = scripted_core(engine_config())
    core.submit(request("a", sampling=end_at(3)))

    result = joined(run_until_idle(core)["a"])

    assert (result.token_ids, result.finish_reason) == (expected(request("a")).token_ids[:3], FinishReason.STOP)


def test_before_min_tokens_no_end_token_comes() -> None:
    core, _ = scripted_core(engine_config())
    stopping = request("a", sampling=end_at(3, min_tokens=5))
    core.submit(stopping)

    result = joined(run_until_idle(core)["a"])

    assert result == expected(stopping)
    assert len(result.token_ids) >= 5


def test_the_end_token_is_told_to_the_device_unless_it_is_ignored() -> None:
    core, runner = scripted_core(engine_config())
    told: list[tuple[int, ...]] = []
    runner.reset_slot, reset = (
        lambda slot, sampling, ends, **tokens: (told.append(ends), reset(slot, sampling, ends, **tokens))[1],
        runner.reset_slot,
    )
    core.submit(request("a", sampling=replace(GREEDY, ignore_eos=False, stop_token_ids=(9,))))
    core.submit(request("b", sampling=replace(GREEDY, ignore_eos=True, stop_token_ids=(9,))))

    run_until_idle(core)

    assert told == [(EOS, 9), (9,)]


def test_a_running_and_a_waiting_request_end_when_their_time_is_up() -> None:
    clock = Clock()
    core, _ = scripted_core(engine_config(max_num_seqs=1), clock=clock)
    core.submit(request("runs", deadline_s=5.0))
    core.submit(request("waits", deadline_s=4.0))
    core.submit(request("has time", deadline_s=50.0))
    core.step()
    clock.now_s = 5.0

    ended = core.step()

    assert [(delta.request_id, delta.finish_reason) for delta in ended[:2]] == [
        ("runs", FinishReason.DEADLINE),
        ("waits", FinishReason.DEADLINE),
    ]
    assert joined([*ended[2:], *run_until_idle(core)["has time"]]) == expected(request("has time"))


def test_a_later_request_with_an_earlier_deadline_is_not_forgotten() -> None:
    clock = Clock()
    core, _ = scripted_core(engine_config(), clock=clock)
    core.submit(request("a", deadline_s=50.0))
    core.submit(request("b", deadline_s=1.0))
    clock.now_s = 1.0

    assert core.step()[0] == TokenDelta(request_id="b", finish_reason=FinishReason.DEADLINE)


def test_logits_that_are_not_finite_end_their_own_sequence_alone() -> None:
    core, _ = scripted_core(engine_config())
    core.submit(request("bad", 5, POISON))
    core.submit(request("good"))

    deltas = run_until_idle(core)

    assert deltas["bad"] == [TokenDelta(request_id="bad", finish_reason=FinishReason.ERROR)]
    assert joined(deltas["good"]) == expected(request("good"))
    assert core.pool.num_held == 0


def test_prompt_scores_that_are_not_finite_end_their_sequence_even_when_no_token_is_chosen() -> None:
    core, _ = scripted_core(engine_config())
    core.submit(request("bad", 5, POISON, 6, sampling=replace(GREEDY, max_tokens=0, prompt_logprobs=0)))

    assert run_until_idle(core)["bad"] == [TokenDelta(request_id="bad", finish_reason=FinishReason.ERROR)]


def test_a_step_without_work_does_nothing() -> None:
    core, runner = scripted_core(engine_config())

    assert core.step() == []
    assert runner.batches == []


def test_stats_tell_who_runs_who_waits_and_what_is_held() -> None:
    core, _ = scripted_core(engine_config(max_num_seqs=1))
    core.submit(request("a"))
    core.submit(request("b"))
    core.step()

    stats = core.stats()

    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used, stats.num_blocks, stats.num_steps) == (1, 1, 1, 64, 1)
