"""Several cores behind the face of one, on runners that check every step: who gets a request, and that nobody can tell."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from scripted_runner import (
    EOS,
    POISON,
    VOCAB_SIZE,
    Clock,
    check_conservation,
    engine_config,
    expected,
    info_of,
    joined,
    scripted_core,
)
from tiny_tokenizer import tiny_tokenizer

from engine.config import EngineConfig, EngineOptions, SchedulerConfig
from engine.constraints import Constraint, Grammars
from engine.core import EngineCore
from engine.engine_loop import EngineLoop
from engine.errors import ConfigError, RequestError
from engine.grammar import GrammarMatcher, GrammarTokenizer
from engine.messages import Begun, Deltas, FromEngine, Queued, Submit
from engine.replicas import MOST_EXPECTED_TOKENS, Replicas
from engine.types import FinishReason, GenerationRequest, SamplingParams, TokenDelta

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.75, max_tokens=12, presence_penalty=0.5, logprobs=2)
LONG = tuple(range(3, 35))  # a prompt of eight blocks
DIGITS = GrammarTokenizer(tiny_tokenizer(), vocab_size=VOCAB_SIZE, eos_token=EOS)
NUMBER = LLMatcher.grammar_from_regex("[1-9][0-9]{2,5}")


def compile_digits(grammar: str) -> GrammarMatcher:
    return GrammarMatcher(DIGITS, grammar)


class AtOnce(Grammars):
    """Does the threads' work where it is handed over."""

    def start(self, constraint: Constraint, output_token_ids: Iterable[int]) -> None:
        constraint.start(compile_digits, output_token_ids)
        self._done.put((constraint, None))

    def advance(self, constraint: Constraint, token: int) -> None:
        constraint.advance(token)
        self._done.put((constraint, None))


def request(request_id: str, *prompt: int, sampling: SamplingParams = GREEDY, choice: int = 0, tenant: str = "") -> GenerationRequest:
    return GenerationRequest(request_id=request_id, prompt_token_ids=prompt or (5, 6, 7), sampling=sampling, choice=choice, tenant=tenant)


def replicas_of(config: EngineConfig | None = None, *, count: int = 2, clock: Clock | None = None) -> Replicas:
    return Replicas([scripted_core(config or engine_config(), clock=clock)[0] for _ in range(count)])


def names(core: EngineCore) -> list[str]:
    return [each.request.request_id for each in (*core.scheduler.running, *core.scheduler.waiting)]


def places(replicas: Replicas) -> list[list[str]]:
    """The open requests of each core."""
    return [names(core) for core in replicas.cores]


def run_until_idle(replicas: Replicas, *, max_steps: int = 10_000) -> dict[str, list[TokenDelta]]:
    """Step until there is no work, checking between the steps; the deltas of each request."""
    deltas: dict[str, list[TokenDelta]] = {}
    for _ in range(max_steps):
        if not replicas.has_work:
            return deltas
        for delta in replicas.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        for core in replicas.cores:
            check_conservation(core)
    raise AssertionError(f"still working after {max_steps} steps: {replicas.stats()}")


def test_requests_get_what_they_get_alone_and_every_core_has_its_part() -> None:
    replicas = replicas_of(count=3)
    requests = [request(str(i), *range(i, i + 1 + 3 * (i % 5)), sampling=replace(SAMPLED, seed=i)) for i in range(3, 33)]
    for each in requests:
        replicas.submit(each)
    shares = [len(place) for place in places(replicas)]

    deltas = run_until_idle(replicas)

    assert {name: joined(found) for name, found in deltas.items()} == {each.request_id: expected(each) for each in requests}
    assert min(shares) >= 8


KINDS = (
    GREEDY,
    SAMPLED,
    replace(GREEDY, prompt_logprobs=1),
    replace(SAMPLED, bad_words=((5, 6), (7,))),
)


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.lists(st.tuples(st.lists(st.integers(3, 6), min_size=1, max_size=20), st.integers(0, 4)), max_size=3),
            st.integers(0, 8),
            st.integers(0, 20),
        ),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.sampled_from([64, 10]),
    num_looks=st.tuples(*[st.integers(0, 4)] * 3),
)
def test_whatever_comes_and_goes_nothing_is_lost_and_nothing_stays_behind(
    turns: list[tuple[list[tuple[list[int], int]], int, int]], num_blocks: int, num_looks: tuple[int, ...]
) -> None:
    config = engine_config(num_blocks=num_blocks)
    replicas = Replicas([scripted_core(config, grammars=AtOnce(compile_digits))[0] for _ in num_looks])
    for core, number in zip(replicas.cores, num_looks, strict=True):
        core.runner.num_looks = number
    wanted: dict[str, TokenDelta] = {}
    found: dict[str, list[TokenDelta]] = {}
    for arrivals, num_steps, aborted in turns:
        for prompt, kind in arrivals:
            each = request(str(len(found)), *prompt, sampling=KINDS[kind % len(KINDS)])
            each = replace(each, grammar=NUMBER) if kind == len(KINDS) else each
            replicas.submit(each)
            wanted[each.request_id], found[each.request_id] = expected(each, compile_digits), []
        for _ in range(num_steps):
            for delta in replicas.step():
                found[delta.request_id].append(delta)
        replicas.abort(str(aborted))
        if str(aborted) in found and not (found[str(aborted)] and found[str(aborted)][-1].finish_reason):
            wanted.pop(str(aborted), None)

    for name, rest in run_until_idle(replicas).items():
        found[name] += rest

    assert {name: joined(found[name]) for name in wanted} == wanted
    assert replicas._open == {}
    for replica in replicas._replicas:
        assert (replica.num_open, replica.num_open_tokens, dict(replica.open_keys)) == (0, 0, {})


def test_a_request_goes_where_there_is_least_to_do() -> None:
    replicas = replicas_of()
    replicas.submit(request("long", *LONG))

    for name in "abcde":
        replicas.submit(request(name, 5, sampling=replace(GREEDY, max_tokens=10)))

    assert places(replicas) == [["long", "e"], ["a", "b", "c", "d"]]  # 40 tokens, 11 each


def test_equal_requests_go_to_the_same_cores_in_every_life() -> None:
    lives = [replicas_of(count=3) for _ in range(2)]
    for replicas in lives:
        for name in "abcdefg":
            replicas.submit(request(name))

    assert places(lives[0]) == places(lives[1]) == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def test_nobody_waits_for_a_slot_while_another_core_has_one() -> None:
    replicas = replicas_of(engine_config(max_num_seqs=2))
    replicas.submit(request("long", *LONG))
    for name in "abc":
        replicas.submit(request(name, 5))

    free = places(replicas)
    replicas.submit(request("d", 5))

    assert free == [["long", "c"], ["a", "b"]]
    assert places(replicas) == [["long", "c"], ["a", "b", "d"]]  # all slots are taken


def test_a_request_that_may_give_far_more_than_others_do_does_not_keep_them_away() -> None:
    replicas = replicas_of(engine_config(num_blocks=1200, max_num_seqs=64, max_model_len=4096))
    replicas.submit(request("endless", sampling=replace(GREEDY, max_tokens=4000)))

    for number in range(2 * MOST_EXPECTED_TOKENS // 10):
        replicas.submit(request(str(number), sampling=replace(GREEDY, max_tokens=7)))

    assert len(places(replicas)[0]) > 10


def test_choices_of_one_prompt_meet_and_compute_it_once() -> None:
    replicas = replicas_of()
    choices = [request(str(choice), *LONG, sampling=SAMPLED, choice=choice) for choice in range(3)]
    for each in choices:
        replicas.submit(each)

    deltas = run_until_idle(replicas)

    assert [len(core.runner.batches) > 0 for core in replicas.cores] == [True, False]
    assert {name: joined(found) for name, found in deltas.items()} == {each.request_id: expected(each) for each in choices}
    assert [deltas[each.request_id][0].num_cached_tokens for each in choices] == [0, 31, 31]


def test_a_prefix_is_computed_a_second_time_rather_than_waited_for_forever() -> None:
    replicas = replicas_of(engine_config(max_num_seqs=8))

    for choice in range(5):
        replicas.submit(request(str(choice), *LONG, sampling=SAMPLED, choice=choice))

    assert places(replicas) == [["0", "1", "2"], ["3", "4"]]  # 68 tokens to do, when the prefix costs 64


def test_a_prompt_goes_where_its_beginning_was_computed_and_under_another_salt_nothing_is_found() -> None:
    replicas = replicas_of()
    replicas.submit(request("first", 7))
    replicas.submit(request("prefix", *LONG))
    run_until_idle(replicas)

    replicas.submit(request("same", *LONG, 50, 51))
    replicas.submit(replace(request("salted", *LONG, 50, 51), cache_salt="other"))

    assert places(replicas) == [["salted"], ["same"]]


def test_a_generation_that_another_engine_began_goes_on_wherever_it_comes() -> None:
    replicas = replicas_of()
    requests = [request(str(i), *range(i, i + 9), sampling=replace(SAMPLED, seed=i)) for i in range(6)]
    wholes = [expected(each) for each in requests]
    for number, (each, whole) in enumerate(zip(requests, wholes, strict=True)):
        replicas.submit(each, output_token_ids=whole.token_ids[: 2 * number])
    shares = [len(place) for place in places(replicas)]

    deltas = run_until_idle(replicas)

    assert min(shares) > 0
    for number, (each, whole) in enumerate(zip(requests, wholes, strict=True)):
        rest = joined(deltas[each.request_id])
        assert (rest.token_ids, rest.finish_reason) == (whole.token_ids[2 * number :], whole.finish_reason)


def test_an_aborted_request_leaves_its_core_and_counts_no_more() -> None:
    replicas = replicas_of()
    for name in "abcd":
        replicas.submit(request(name))
    replicas.step()

    replicas.abort("b")
    replicas.abort("d")
    replicas.abort("unknown")
    before = places(replicas)
    for name in "ef":
        replicas.submit(request(name))

    assert before == [["a", "c"], []]
    assert places(replicas) == [["a", "c"], ["e", "f"]]
    assert set(run_until_idle(replicas)) == set("acef")


def test_every_core_ends_what_is_past_its_deadline() -> None:
    clock = Clock()
    replicas = replicas_of(clock=clock)
    for name in "abcd":
        replicas.submit(replace(request(name), deadline_s=2.0 if name in "ab" else None))
    replicas.step()
    clock.now_s = 2.0

    ended = [delta.request_id for delta in replicas.step() if delta.finish_reason is FinishReason.DEADLINE]

    assert ended == ["a", "b"]
    assert places(replicas) == [["c"], ["d"]]


def test_a_request_is_refused_once_it_runs_anywhere_or_could_run_nowhere() -> None:
    replicas = replicas_of()
    replicas.submit(request("a"))
    replicas.submit(request("b"))

    for name in "ab":
        with pytest.raises(RequestError, match=f"request id {name} is already running"):
            replicas.submit(request(name))
    for prompt in ((VOCAB_SIZE,), (-1,), (1 << 40,)):
        with pytest.raises(RequestError, match="prompt holds token ids"):
            replicas.submit(request("c", *prompt))
    with pytest.raises(RequestError, match="no tokenizer"):
        replicas.submit(replace(request("c"), grammar="{}"))
    assert places(replicas) == [["a"], ["b"]]
    replicas.submit(request("c"))


def test_the_longest_request_is_what_one_cache_holds_however_many_there_are() -> None:
    replicas = replicas_of(engine_config(num_blocks=8, max_model_len=64))

    longest = request("at the cap", *range(3, 27))
    replicas.submit(longest)

    with pytest.raises(RequestError, match="exceed the limit of 32"):
        replicas.submit(request("one past it", *range(3, 28)))
    assert (replicas.info.max_model_len, replicas.info.num_blocks) == (32, 16)
    assert joined(run_until_idle(replicas)["at the cap"]) == expected(longest)


def test_each_cache_must_hold_the_longest_sequence_alone() -> None:
    config = engine_config(max_model_len=64)
    options = EngineOptions(
        model=config.model, model_dir="", scheduler=SchedulerConfig(max_model_len=64), mesh=replace(config.mesh, data=2)
    )
    block_bytes = 16 * 2 * 8 * 4

    assert options.resolve(backend="cpu", free_bytes=4 * block_bytes).cache.num_blocks == 4
    with pytest.raises(ConfigError, match="max_model_len is 64"):
        options.resolve(backend="cpu", free_bytes=4 * block_bytes - 1)


def test_info_is_of_all_together_and_steps_may_share_a_processor() -> None:
    config = engine_config()
    info = replace(info_of(config), num_devices=4, num_params=7, weight_bytes=100, num_programs=5, num_cached_programs=3, step_s=0.5)
    cores = [scripted_core(config)[0] for _ in range(2)]
    for core in cores:
        core.info = info

    combined = Replicas(cores).info

    assert combined == replace(
        info,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        num_blocks=128,
        num_devices=8,
        weight_bytes=200,
        num_programs=10,
        num_cached_programs=6,
        step_s=1.0,
    )


def test_stats_are_sums_and_a_late_compilation_of_the_process_counts_once() -> None:
    replicas = replicas_of(engine_config(max_num_seqs=1))
    for name in "abc":
        replicas.submit(request(name))
    replicas.step()
    for core, num_late in zip(replicas.cores, (5, 2), strict=True):  # three came before the second core was made
        core.runner.num_late_compilations = num_late

    stats = replicas.stats()

    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (2, 1, 2)
    assert (stats.num_blocks, stats.num_blocks_used, stats.num_lookup_tokens) == (128, 2, 6)
    assert stats.num_late_compilations == 2


def test_cores_go_on_at_their_own_pace_and_a_step_ahead() -> None:
    replicas = replicas_of()
    slow, quick = (core.runner for core in replicas.cores)
    slow.num_looks = 4
    replicas.submit(request("slow", sampling=replace(GREEDY, max_tokens=50)))
    replicas.submit(request("quick", sampling=replace(GREEDY, max_tokens=50)))

    for _ in range(26):
        replicas.step()

    assert [replica.core.stats().num_steps for replica in replicas._replicas] == [6, 26]
    assert [slow.num_ahead, quick.num_ahead] == [5, 25]


def test_an_idle_core_is_left_alone() -> None:
    replicas = replicas_of()
    replicas.submit(request("a"))

    run_until_idle(replicas)

    assert replicas.cores[1].runner.batches == []
    assert replicas.step() == []


def test_the_failure_of_one_core_is_the_failure_of_all() -> None:
    replicas = replicas_of()
    replicas.submit(request("a"))
    replicas.submit(request("b"))
    replicas.cores[1].runner.layouts = ()  # so that the runner refuses its next step

    with pytest.raises(AssertionError):
        run_until_idle(replicas)


def test_a_request_that_fails_alone_leaves_its_core_to_others() -> None:
    replicas = replicas_of()
    bad, good = request("bad", 5, POISON), request("good")
    replicas.submit(bad)
    replicas.submit(good)

    deltas = run_until_idle(replicas)

    assert deltas["bad"][-1].finish_reason is FinishReason.ERROR
    assert joined(deltas["good"]) == expected(good)
    replicas.submit(request("next"))
    assert places(replicas) == [["next"], []]


def test_the_server_is_told_of_those_that_wait_in_any_core_before_they_begin() -> None:
    replicas = replicas_of(engine_config(max_num_seqs=1))
    said: list[FromEngine] = []
    loop = EngineLoop(replicas, send=said.append)
    for name in "abcd":
        loop.take(Submit(request(name)))

    for _ in range(40):
        loop.turn()

    told = [message for message in said if not isinstance(message, Deltas)]
    assert told == [Queued(["c", "d"]), Begun(["c"]), Begun(["d"])]
    ended = [delta.request_id for message in said if isinstance(message, Deltas) for delta in message.deltas if delta.finish_reason]
    assert sorted(ended) == list("abcd")


def test_a_tenant_with_one_request_is_soon_served_beside_one_with_a_crowd_in_every_core() -> None:
    replicas = replicas_of(engine_config(num_blocks=400))
    crowd = [request(str(i), i % 90, 5, sampling=replace(GREEDY, max_tokens=40), tenant="crowd") for i in range(60)]
    for each in crowd:
        replicas.submit(each)
    for _ in range(50):
        replicas.step()

    visit = request("visit", tenant="visitor")
    replicas.submit(visit)
    found: list[TokenDelta] = []
    for _ in range(40):
        found += [delta for delta in replicas.step() if delta.request_id == "visit"]

    assert joined(found) == expected(visit)
    assert [len(place) > 10 for place in places(replicas)] == [True, True]


def test_grammars_hold_in_every_core_though_each_has_threads_of_its_own() -> None:
    cores = [scripted_core(engine_config(), grammars=Grammars(compile_digits))[0] for _ in range(2)]
    replicas = Replicas(cores)
    requests = [replace(request(str(i), 5, 6, i, sampling=replace(GREEDY, seed=i, temperature=0.5)), grammar=NUMBER) for i in range(4)]
    for each in requests:
        replicas.submit(each)

    deltas = run_until_idle(replicas, max_steps=100_000)

    assert {name: joined(found) for name, found in deltas.items()} == {each.request_id: expected(each, compile_digits) for each in requests}
    assert all(100 <= int(tiny_tokenizer().decode(joined(found).token_ids)) < 1_000_000 for found in deltas.values())
    assert [core.stats().num_steps > 0 for core in cores] == [True, True]


class Unhurried(Grammars):
    """Compiles nothing before the test says so, and notes how long the core would have waited."""

    def __init__(self) -> None:
        super().__init__(compile_digits)
        self.waits_s: list[float] = []
        self.started: list[tuple[Constraint, Iterable[int]]] = []

    def start(self, constraint: Constraint, output_token_ids: Iterable[int]) -> None:
        self.started.append((constraint, output_token_ids))

    def take(self, *, wait_s: float = 0.0) -> list[Constraint]:
        self.waits_s.append(wait_s)
        return super().take()

    def work(self) -> None:
        for constraint, output_token_ids in self.started:
            constraint.start(compile_digits, output_token_ids)
            self._done.put((constraint, None))
        self.started = []


def test_a_core_waits_for_a_grammar_only_where_no_other_core_has_work() -> None:
    grammars = Unhurried()
    replicas = Replicas([scripted_core(engine_config(), grammars=each)[0] for each in (grammars, None)])
    grammatical = replace(request("grammar"), grammar=LLMatcher.grammar_from_regex("[0-9]{4}"))
    replicas.submit(grammatical)
    replicas.submit(request("other"))
    replicas.step()

    for _ in range(4):
        replicas.step()
    meanwhile = sum(grammars.waits_s)
    while places(replicas) != [[], []]:
        replicas.step()
    grammars.waits_s.clear()
    replicas.step()
    alone = sum(grammars.waits_s)
    grammars.work()

    assert (meanwhile, alone > 0) == (0.0, True)
    assert joined(run_until_idle(replicas)["grammar"]) == expected(grammatical, compile_digits)
