"""The step loop under constraints: grammars, allowed tokens and bad words, whose masks depend on the last token."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from llguidance import LLMatcher
from scripted_requests import GREEDY, request
from scripted_runner import (
    EOS,
    VOCAB_SIZE,
    Clock,
    check_conservation,
    engine_config,
    expected,
    joined,
    run_until_idle,
    scripted_core,
)
from tiny_tokenizer import tiny_tokenizer

from engine.batch import StepKind
from engine.constraints import Constraint, Grammars
from engine.errors import RequestError
from engine.grammar import GrammarMatcher, GrammarTokenizer
from engine.types import FinishReason, GenerationRequest, SamplingParams, TokenDelta

DIGITS = GrammarTokenizer(tiny_tokenizer(), vocab_size=VOCAB_SIZE, eos_token=EOS)  # whose visible pieces are digits, tabs, spaces
NUMBER = LLMatcher.grammar_from_regex("[1-9][0-9]{2,5}")
NUMBERS = LLMatcher.grammar_from_regex("[0-9 \t]*")
SOME = tuple(range(10, 40))


def compile_digits(grammar: str) -> GrammarMatcher:
    return GrammarMatcher(DIGITS, grammar)


class AtOnce(Grammars):
    """Does the threads' work where it is handed over."""

    def start(self, constraint: Constraint, output_token_ids: Iterable[int]) -> None:
        constraint.start(self._compile, output_token_ids)
        self._done.put((constraint, None))

    def advance(self, constraint: Constraint, token: int) -> None:
        constraint.advance(token)
        self._done.put((constraint, None))


class OnCall(Grammars):
    """Does the threads' work when the test lets it."""

    def __init__(self) -> None:
        super().__init__(compile_digits)
        self.jobs: list[tuple[Constraint, Callable[[], None]]] = []
        self.may_wait = True

    def start(self, constraint: Constraint, output_token_ids: Iterable[int]) -> None:
        self.jobs.append((constraint, lambda: constraint.start(compile_digits, output_token_ids)))

    def advance(self, constraint: Constraint, token: int) -> None:
        self.jobs.append((constraint, lambda: constraint.advance(token)))

    def take(self, *, wait_s: float = 0.0) -> list[Constraint]:
        if wait_s:
            assert self.may_wait, "everybody waits for a thread"
            self.work()
        return super().take()

    def work(self) -> None:
        for constraint, job in self.jobs:
            job()
            self._done.put((constraint, None))
        self.jobs.clear()


def under(grammar: str, request_id: str, *prompt: int, sampling: SamplingParams = GREEDY) -> GenerationRequest:
    return replace(request(request_id, *prompt, sampling=sampling), grammar=grammar)


def wanted(each: GenerationRequest) -> TokenDelta:
    return expected(each, compile_digits)


def text_of(delta: TokenDelta) -> str:
    return tiny_tokenizer().decode(delta.token_ids)


CONSTRAINED = [
    under(NUMBER, "greedy"),
    under(NUMBER, "sampled", 5, 9, sampling=replace(GREEDY, temperature=0.5, seed=3, logprobs=2)),
    under(NUMBER, "may end", 5, 8, sampling=replace(GREEDY, temperature=0.5, seed=5, ignore_eos=False, stop_token_ids=(50,))),
    under(NUMBER, "may not end early", 5, 7, sampling=replace(GREEDY, seed=5, ignore_eos=False, min_tokens=5)),
    under(NUMBERS, "endless", 3, 4, sampling=replace(GREEDY, presence_penalty=0.5, temperature=0.5)),
    under(NUMBERS, "without sevens", 3, 5, sampling=replace(GREEDY, temperature=0.5, seed=1, bad_words=((21,), (14, 15)))),
    request("of some", 4, 4, sampling=replace(GREEDY, temperature=0.5, allowed_token_ids=SOME)),
    request(
        "runs banned", 4, 6, sampling=replace(GREEDY, temperature=0.5, seed=8, allowed_token_ids=(5, 6), bad_words=((5, 5), (6, 5, 6)))
    ),
    request("cornered", 4, 7, sampling=replace(GREEDY, allowed_token_ids=(5,), bad_words=((5, 5, 5),))),
    request("free", 4, 8, sampling=replace(GREEDY, temperature=0.5, seed=9)),
]


def test_the_constrained_requests_exercise_what_they_name() -> None:
    results = {each.request_id: wanted(each) for each in CONSTRAINED}

    for name in ("greedy", "sampled"):
        assert re.fullmatch("[1-9][0-9]{5}", text_of(results[name]))
        assert results[name].finish_reason is FinishReason.STOP
    assert results["may end"].token_ids[-1] in (EOS, 50)
    assert len(results["may not end early"].token_ids) >= 5
    assert results["endless"].finish_reason is FinishReason.LENGTH
    assert 21 not in results["without sevens"].token_ids
    assert set(results["of some"].token_ids) <= set(SOME)
    assert set(results["runs banned"].token_ids) == {5, 6}
    assert (results["cornered"].token_ids, results["cornered"].finish_reason) == ((5, 5), FinishReason.GRAMMAR)


@pytest.mark.parametrize("grammars", [AtOnce, Grammars], ids=["at once", "threads"])
@pytest.mark.parametrize("num_blocks", [64, 7], ids=["with room", "with preemptions"])
def test_constrained_requests_get_what_their_constraints_allow_in_any_company(grammars: type[Grammars], num_blocks: int) -> None:
    core, _ = scripted_core(engine_config(num_blocks=num_blocks, max_num_seqs=6), grammars=grammars(compile_digits))
    for each in CONSTRAINED:
        core.submit(each)

    deltas = run_until_idle(core)

    assert {name: joined(found) for name, found in deltas.items()} == {each.request_id: wanted(each) for each in CONSTRAINED}
    assert (core.stats().num_preemptions > 0) == (num_blocks == 7)


def test_a_constrained_request_takes_part_in_every_step_though_its_mask_depends_on_the_last_token() -> None:
    core, runner = scripted_core(engine_config(), grammars=AtOnce(compile_digits))
    core.submit(under(NUMBER, "a"))
    core.submit(request("b"))

    run_until_idle(core)

    steps = [{item.sequence.request.request_id for item in batch.items} for batch in runner.batches]
    assert steps[1:6] == [{"a", "b"}] * 5
    assert runner.num_ahead >= 6


def test_only_steps_with_a_constrained_request_are_no_greedy_ones() -> None:
    core, runner = scripted_core(engine_config(), grammars=AtOnce(compile_digits))
    core.submit(under(LLMatcher.grammar_from_regex("12"), "a"))
    core.submit(request("b"))

    run_until_idle(core)

    for batch in runner.batches:
        is_constrained = any(item.sequence.request.request_id == "a" for item in batch.items)
        assert batch.kind is (StepKind.SAMPLE if is_constrained else StepKind.GREEDY)


def test_a_mask_that_is_not_there_in_time_holds_up_nobody_else() -> None:
    grammars = OnCall()
    core, _ = scripted_core(engine_config(), grammars=grammars)
    slow, other = (
        under(NUMBERS, "slow", sampling=replace(GREEDY, presence_penalty=0.5)),
        request("other", sampling=replace(GREEDY, max_tokens=30)),
    )
    core.submit(slow)
    core.submit(other)
    deltas: dict[str, list[TokenDelta]] = {"slow": [], "other": []}

    def step() -> None:
        for delta in core.step():
            deltas[delta.request_id].append(delta)
        check_conservation(core)

    for _ in range(4):
        step()
    assert (len(deltas["slow"]), len(deltas["other"])) == (0, 3)  # it is not even compiled
    grammars.work()
    for _ in range(5):
        step()
    assert (len(deltas["slow"]), len(deltas["other"])) == (0, 8)  # the first token waits for the second one's mask
    while core.has_work:
        step()
        if core.stats().num_steps % 3 == 0:
            grammars.work()

    assert {name: joined(found) for name, found in deltas.items()} == {"slow": wanted(slow), "other": expected(other)}


def test_a_sequence_that_loses_its_slot_while_its_mask_is_looked_for_comes_back_with_the_same_tokens() -> None:
    grammars = OnCall()
    core, _ = scripted_core(engine_config(num_blocks=6), grammars=grammars)
    sampling = replace(GREEDY, temperature=0.5, max_tokens=12)
    requests = [request("a", *range(3, 10), sampling=sampling), under(NUMBERS, "b", *range(10, 17), sampling=sampling)]
    for each in requests:
        core.submit(each)
    grammars.work()

    deltas = run_until_idle(core)

    assert core.stats().num_preemptions > 0
    assert [joined(deltas[each.request_id]) for each in requests] == [wanted(each) for each in requests]


def test_nobody_waits_for_the_mask_of_a_sequence_that_lost_its_slot() -> None:
    grammars = OnCall()
    core, _ = scripted_core(engine_config(num_blocks=6), grammars=grammars)
    sampling = replace(GREEDY, temperature=0.5, max_tokens=12)
    requests = [request("a", *range(3, 10), sampling=sampling), under(NUMBERS, "b", *range(10, 17), sampling=sampling)]
    for each in requests:
        core.submit(each)
    grammars.work()
    deltas: dict[str, list[TokenDelta]] = {"a": [], "b": []}

    grammars.may_wait = False
    is_awaited = False
    while not deltas["a"] or not deltas["a"][-1].finish_reason:
        if core.stats().num_steps % 2 and not is_awaited:
            grammars.work()
        for delta in core.step():
            deltas[delta.request_id].append(delta)
        is_awaited = is_awaited or any(each.num_pending_tokens for each in core.scheduler.waiting)
    grammars.may_wait = True
    for request_id, rest in run_until_idle(core).items():
        deltas[request_id] += rest

    assert is_awaited
    assert [joined(deltas[each.request_id]) for each in requests] == [wanted(each) for each in requests]


@pytest.mark.parametrize("num_given", [1, 3, 5, 7])
def test_a_constrained_generation_goes_on_behind_what_another_engine_gave(num_given: int) -> None:
    for each in CONSTRAINED:
        whole = wanted(each)
        if len(whole.token_ids) <= num_given:
            continue
        core, _ = scripted_core(engine_config(), grammars=AtOnce(compile_digits))
        core.submit(each, output_token_ids=whole.token_ids[:num_given])

        rest = joined(run_until_idle(core)[each.request_id])

        assert (rest.token_ids, rest.finish_reason) == (whole.token_ids[num_given:], whole.finish_reason)


def test_a_text_that_was_whole_when_its_engine_died_ends_without_another_token() -> None:
    core, _ = scripted_core(engine_config(), grammars=AtOnce(compile_digits))
    core.submit(under(LLMatcher.grammar_from_regex("12"), "a"), output_token_ids=(15, 16))

    assert run_until_idle(core)["a"] == [TokenDelta(request_id="a", finish_reason=FinishReason.STOP)]


def test_a_grammar_that_does_not_compile_ends_its_own_request_alone() -> None:
    core, _ = scripted_core(engine_config(), grammars=AtOnce(compile_digits))
    core.submit(under(LLMatcher.grammar_from_regex("(1"), "bad"))
    core.submit(request("good"))

    deltas = run_until_idle(core)

    assert deltas["bad"] == [TokenDelta(request_id="bad", finish_reason=FinishReason.GRAMMAR)]
    assert joined(deltas["good"]) == expected(request("good"))


def test_a_mask_past_its_limit_ends_its_own_request_alone() -> None:
    core, _ = scripted_core(engine_config(max_model_len=256), grammars=Grammars(compile_digits))
    hostile = under(LLMatcher.grammar_from_lark("start: e\ne: e e e | e e | /[0-9 ]/"), "hostile", sampling=replace(GREEDY, max_tokens=200))
    core.submit(hostile)
    core.submit(request("good"))

    deltas = run_until_idle(core, max_steps=100_000)

    assert deltas["hostile"][-1].finish_reason is FinishReason.GRAMMAR
    assert joined(deltas["good"]) == expected(request("good"))
    assert core.stats().num_blocks_used == 0


def test_a_failure_in_a_thread_is_the_engines_own() -> None:
    def compile_badly(_: str) -> GrammarMatcher:
        raise ZeroDivisionError

    core, _ = scripted_core(engine_config(), grammars=Grammars(compile_badly))
    core.submit(under(NUMBER, "a"))

    with pytest.raises(ZeroDivisionError):
        run_until_idle(core)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4])
def test_an_abort_while_a_thread_is_at_work_leaves_nothing_behind(num_steps: int) -> None:
    grammars = OnCall()
    core, _ = scripted_core(engine_config(), grammars=grammars)
    core.submit(under(NUMBERS, "a"))
    for _ in range(num_steps):
        core.step()

    core.abort("a")
    grammars.work()

    assert run_until_idle(core) == {}
    assert core.stats().num_blocks_used == core.stats().num_running == core.stats().num_waiting == 0


def test_a_request_whose_grammar_is_being_compiled_counts_as_waiting_and_may_run_out_of_time() -> None:
    clock = Clock()
    core, _ = scripted_core(engine_config(), clock=clock, grammars=OnCall())
    core.submit(replace(under(NUMBER, "a"), deadline_s=1.0))

    before = core.stats().num_waiting
    clock.now_s = 1.0

    assert (before, core.has_work) == (1, True)
    assert core.step() == [TokenDelta(request_id="a", finish_reason=FinishReason.DEADLINE)]
    assert not core.has_work


def test_a_grammar_without_a_tokenizer_is_refused() -> None:
    core, _ = scripted_core(engine_config())

    with pytest.raises(RequestError, match="no tokenizer"):
        core.submit(under(NUMBER, "a"))
    assert not core.has_work


@pytest.mark.parametrize(
    ("sampling", "cause"),
    [
        (replace(GREEDY, allowed_token_ids=(VOCAB_SIZE,)), "allowed_token_ids holds token ids from 97 to 97"),
        (replace(GREEDY, bad_words=((5, -1),)), "bad_words holds token ids from -1 to 5"),
        (replace(GREEDY, bad_words=((5,), ())), "a run of no tokens"),
        (replace(GREEDY, allowed_token_ids=(5, 6), bad_words=((5,), (6,))), "no token may be chosen"),
        (replace(GREEDY, allowed_token_ids=(EOS,), min_tokens=1, ignore_eos=False), "no token may be chosen"),
    ],
)
def test_constraints_that_cannot_be_kept_are_refused(sampling: SamplingParams, cause: str) -> None:
    core, _ = scripted_core(engine_config())

    with pytest.raises(RequestError, match=cause):
        core.submit(request("a", sampling=sampling))
    assert not core.has_work


def test_an_end_that_is_allowed_may_come_when_it_is_not_too_early() -> None:
    core, _ = scripted_core(engine_config())
    ending = request("a", sampling=replace(GREEDY, allowed_token_ids=(5, EOS), min_tokens=2, ignore_eos=False, logit_bias={EOS: 50.0}))
    core.submit(ending)

    result = joined(run_until_idle(core)["a"])

    assert result == expected(ending)
    assert result.token_ids[:2] == (5, 5)
