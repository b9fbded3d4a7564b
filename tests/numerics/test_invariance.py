"""A request's numbers do not depend on its company, to the bit: not on chunks, neighbours, rows, buckets, preemption or program.

The model is large enough for the matrix kernels that a real one gets, and no width of it is a multiple of what they like.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward_harness import Answer, ForwardHarness, engine_config, finish, no_report, small_model
from llguidance import LLMatcher
from numpy.random import Generator
from tiny_tokenizer import tiny_tokenizer

from engine.config import CacheConfig, EngineConfig, KVDType
from engine.constraints import Grammars
from engine.core import EngineCore
from engine.device_step import DeviceState
from engine.grammar import GrammarMatcher, GrammarTokenizer
from engine.model.params import random_params
from engine.programs import Programs, shapes_of
from engine.runner import ModelRunner
from engine.sharding import make_meshes
from engine.types import EngineInfo, FinishReason, GenerationRequest, SamplingParams

pytestmark = pytest.mark.timeout(400)  # two dozen seconds of compiling, on whatever a busy machine leaves

MODEL = small_model(
    vocab_size=515,
    num_layers=1,
    sequence_len=96,
    emb_size=136,
    key_size=34,
    num_q_heads=4,
    num_kv_heads=2,
    num_experts=3,
    ffn_size=200,
    eos_token=2,
)
CONFIG = engine_config(  # rows for 16 sequences in the small bucket, for 24 in the full one
    MODEL, block_size=4, num_blocks=96, max_num_seqs=24, max_num_batched_tokens=40, max_model_len=96
)
INFO = EngineInfo(
    vocab_size=MODEL.vocab_size,
    max_model_len=96,
    max_num_seqs=24,
    max_num_batched_tokens=40,
    max_logprobs=20,
    block_size=4,
    num_blocks=96,
    dtype="float32",
    kv_dtype="float32",
    backend="cpu",
    num_devices=1,
    num_params=0,
    weight_bytes=0,
    num_programs=8,
    load_s=0,
    compile_s=0,
)


def with_cache(dtype: KVDType) -> EngineConfig:
    return replace(CONFIG, cache=replace(CONFIG.cache, dtype=dtype))


@pytest.fixture(scope="module")
def harness() -> ForwardHarness:
    return ForwardHarness(CONFIG, random_params(MODEL, seed=3, dtype="float32"))


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return runner_of(CONFIG)


def runner_of(config: EngineConfig) -> ModelRunner:
    params, mesh = random_params(MODEL, seed=3, dtype="float32"), make_meshes(config.mesh, MODEL)[0]
    programs = Programs(config, shapes_of(params), mesh)
    programs.compile(no_report)
    return ModelRunner(config, params, mesh, programs)


def draw_prompt(random: Generator, length: int) -> list[int]:
    return random.integers(0, MODEL.vocab_size, length).tolist()


def draw_chunks(random: Generator, length: int, largest: int) -> list[int]:
    chunks: list[int] = []
    while left := length - sum(chunks):
        chunks.append(min(left, int(random.integers(1, largest + 1))))
    return chunks


PROMPTS = [draw_prompt(np.random.default_rng(4), length) for length in (1, 2, 7, 8, 9, 23, 40, 40)]


@pytest.mark.parametrize("seed", range(12))
def test_logits_are_the_same_bits_whatever_the_chunks_neighbours_and_rows(harness: ForwardHarness, seed: int):
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(PROMPTS))[: random.integers(1, 6)]
    work = [(PROMPTS[i], draw_chunks(random, len(PROMPTS[i]), largest=40 // len(chosen))) for i in chosen]

    together = harness.run(work)

    for i, logits in zip(chosen, together, strict=True):
        (alone,) = harness.run([(PROMPTS[i], [len(PROMPTS[i])])])
        np.testing.assert_array_equal(logits, alone, err_msg=f"prompt {i} in {work}")


def test_logits_are_the_same_bits_token_by_token_in_the_smallest_bucket(harness: ForwardHarness):
    (alone,) = harness.run([(PROMPTS[6], [40])])

    (by_token,) = harness.run([(PROMPTS[6], [1] * 40)])

    np.testing.assert_array_equal(by_token, alone)


def test_nothing_that_a_block_held_before_reaches_its_next_owner(harness: ForwardHarness):
    work = [(PROMPTS[5], [5, 18]), (PROMPTS[2], [7])]

    clean, stale = harness.run(work), harness.run(work, stale=np.nan)

    for one, other in zip(clean, stale, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_logits_are_the_same_bits_with_any_type_of_cache(harness: ForwardHarness, dtype: KVDType):
    rounding = ForwardHarness(with_cache(dtype), harness.params)
    random = np.random.default_rng(1)
    work = [(PROMPTS[i], draw_chunks(random, len(PROMPTS[i]), largest=10)) for i in (6, 5, 2, 7)]

    together = rounding.run(work, stale=np.nan)

    for (prompt, _), logits in zip(work, together, strict=True):
        (alone,) = rounding.run([(prompt, [len(prompt)])])
        (by_token,) = rounding.run([(prompt, [1] * len(prompt))])
        np.testing.assert_array_equal(logits, alone)
        np.testing.assert_array_equal(by_token, alone)
    (exact,) = harness.run([(PROMPTS[6], [40])])
    assert np.abs(together[0] - exact).max() > 1e-4


def request(name: str, prompt: Iterable[int], *, grammar: str | None = None, **sampling: object) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 14, "ignore_eos": True, **sampling})
    return GenerationRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, grammar=grammar)


TOKENIZER = GrammarTokenizer(tiny_tokenizer(), vocab_size=MODEL.vocab_size, eos_token=MODEL.eos_token)  # 95 ids fewer than the model
SCHEMA = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "is": {"enum": ["here", "gone"]}},
        "required": ["name", "is"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)
LETTERS = LLMatcher.grammar_from_regex("[a-z ]*")
BANNED = ((9,), (7, 7), (7, 8, 7), (8, 8))


REQUESTS = [
    request("plain greedy", PROMPTS[6], temperature=0),
    request("greedy with logprobs", PROMPTS[5], temperature=0, logprobs=5),
    request("sampled", PROMPTS[3], seed=-5, logprobs=3),
    request("hot with everything", PROMPTS[4], temperature=1.8, top_p=0.9, top_k=50, min_p=0.01, seed=1 << 40, logprobs=20),
    request("penalised", PROMPTS[7], presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3, seed=6, logprobs=1),
    request("greedy and penalised", PROMPTS[2], temperature=0, repetition_penalty=2.0, frequency_penalty=2.0),
    request("biased", PROMPTS[1], logit_bias=dict.fromkeys(range(200, 500), 3.0), seed=8, logprobs=0),
    request("scored", PROMPTS[6], temperature=0, prompt_logprobs=4, logprobs=4),
    request("only scored", PROMPTS[5], prompt_logprobs=2, max_tokens=0),
    request("under a schema", PROMPTS[3], seed=11, logprobs=3, grammar=SCHEMA, max_tokens=40),
    request("greedy under a schema", PROMPTS[6], temperature=0, grammar=SCHEMA, max_tokens=40),
    request("under a pattern without end", PROMPTS[4], seed=12, top_p=0.8, grammar=LETTERS, repetition_penalty=1.2, logprobs=1),
    request("few tokens allowed", PROMPTS[2], seed=13, allowed_token_ids=tuple(range(330, 360)), logprobs=2),
    request("tokens and runs banned", PROMPTS[5], seed=14, bad_words=BANNED, allowed_token_ids=(7, 8, 9, 400), logprobs=0),
    request("may not end yet", PROMPTS[0], seed=9, logit_bias={2: 100.0}, min_tokens=5, ignore_eos=False, logprobs=2),
]


def core_of(runner: ModelRunner, *, num_blocks: int = 96, **limits: int) -> EngineCore:
    """A fresh engine over the compiled runner; limits may only be tightened."""
    config: EngineConfig = replace(
        CONFIG, cache=CacheConfig(block_size=4, num_blocks=num_blocks), scheduler=replace(CONFIG.scheduler, **limits)
    )
    return EngineCore(config, runner, INFO, grammars=Grammars(partial(GrammarMatcher, TOKENIZER)))


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> dict[str, Answer]:
    """Every request's answer when it has the engine to itself."""
    answers: dict[str, Answer] = {}
    for each in REQUESTS:
        answers |= finish(core_of(runner), [each])
    return answers


def test_the_requests_exercise_what_they_name(alone: dict[str, Answer]):
    assert alone["plain greedy"].token_ids == alone["scored"].token_ids
    assert alone["may not end yet"].finish_reason is FinishReason.STOP
    assert alone["may not end yet"].token_ids[-1] == 2
    assert len(alone["may not end yet"].token_ids) == 6
    assert len(alone["only scored"].prompt_logprobs) == len(PROMPTS[5]) - 1
    assert len(set(alone["greedy and penalised"].token_ids)) == 14
    assert sum(200 <= token < 500 for token in alone["biased"].token_ids) >= 12
    assert len({tuple(answer.token_ids) for answer in alone.values()}) == len(REQUESTS) - 1
    for name in ("under a schema", "greedy under a schema"):
        value = json.loads(tiny_tokenizer().decode(alone[name].token_ids))
        assert alone[name].finish_reason is FinishReason.STOP
        assert list(value) == ["name", "is"]
        assert value["is"] in ("here", "gone")
    assert re.fullmatch("[a-z ]{14,}", tiny_tokenizer().decode(alone["under a pattern without end"].token_ids))
    assert set(alone["few tokens allowed"].token_ids) <= set(range(330, 360))
    assert set(alone["tokens and runs banned"].token_ids) <= {7, 8, 400}
    pairs = set(pairwise(alone["tokens and runs banned"].token_ids))
    assert pairs.isdisjoint({(7, 7), (8, 8)})
    assert (8, 7) in pairs


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
@pytest.mark.parametrize("steps_between", [0, 2], ids=["at once", "joining late"])
def test_answers_are_the_same_bits_in_company(runner: ModelRunner, alone: dict[str, Answer], order: str, steps_between: int):
    requests = {"forwards": REQUESTS, "backwards": REQUESTS[::-1], "shuffled": REQUESTS[3:] + REQUESTS[:3]}[order]

    together = finish(core_of(runner), requests, steps_between=steps_between)

    assert together == alone


@pytest.mark.parametrize("budget", [1, 7, 16])
def test_answers_are_the_same_bits_under_any_token_budget(runner: ModelRunner, alone: dict[str, Answer], budget: int):
    together = finish(core_of(runner, max_num_batched_tokens=budget, max_num_seqs=5), REQUESTS)

    assert together == alone


def test_answers_are_the_same_bits_after_preemption(runner: ModelRunner, alone: dict[str, Answer]):
    core = core_of(runner, num_blocks=24)

    together = finish(core, REQUESTS)

    assert core.scheduler.num_preemptions >= 3
    assert core.pool.num_held == 0
    assert together == alone


def test_answers_are_the_same_bits_after_a_prefix_hit(runner: ModelRunner, alone: dict[str, Answer]):
    core = core_of(runner)

    cold = [finish(core, [each])[each.request_id] for each in REQUESTS]
    num_hit_before = core.cache.num_hit_tokens
    warm = [finish(core, [each])[each.request_id] for each in REQUESTS]

    assert core.cache.num_hit_tokens > num_hit_before + 60
    assert cold == warm == list(alone.values())


def test_answers_over_an_8_bit_cache_are_the_same_bits_in_company_after_preemption_and_after_a_prefix_hit(alone: dict[str, Answer]):
    runner = runner_of(with_cache("int8"))
    expected: dict[str, Answer] = {}
    for each in REQUESTS:
        expected |= finish(core_of(runner), [each])

    crowded = core_of(runner, num_blocks=24, max_num_batched_tokens=16)
    together = finish(crowded, REQUESTS)
    warm = core_of(runner)
    finish(warm, REQUESTS)
    again = finish(warm, REQUESTS)

    assert crowded.scheduler.num_preemptions >= 3
    assert warm.cache.num_hit_tokens > 60
    assert together == again == expected
    assert expected["scored"].prompt_logprobs != alone["scored"].prompt_logprobs


def test_choices_of_one_prompt_share_its_blocks_and_keep_their_bits(runner: ModelRunner):
    choices = [replace(request(str(choice), PROMPTS[6], seed=4, logprobs=2), choice=choice) for choice in range(6)]
    core = core_of(runner)

    together = finish(core, choices)

    assert core.cache.num_hit_tokens >= 5 * 39
    assert together == {each.request_id: finish(core_of(runner), [each])[each.request_id] for each in choices}
    assert len({tuple(answer.token_ids) for answer in together.values()}) == 6


@pytest.mark.parametrize("num_given", [1, 5, 13])
def test_an_answer_that_goes_on_in_another_engine_has_the_same_bits(runner: ModelRunner, alone: dict[str, Answer], num_given: int):
    core = core_of(runner)
    rest: dict[str, Answer] = {}

    for each in REQUESTS:
        whole = alone[each.request_id]
        if len(whole.token_ids) > num_given:
            rest[each.request_id] = Answer(
                token_ids=whole.token_ids[:num_given],
                logprobs=whole.logprobs[:num_given],
                prompt_logprobs=list(whole.prompt_logprobs),
            )
            core.submit(each, output_token_ids=tuple(whole.token_ids[:num_given]), num_scored_tokens=len(whole.prompt_logprobs))
    while core.has_work:
        for delta in core.step():
            rest[delta.request_id].add(delta)

    assert len(rest) >= 8
    assert rest == {name: alone[name] for name in rest}


def test_a_score_that_was_cut_off_goes_on_where_it_was(runner: ModelRunner, alone: dict[str, Answer]):
    whole = alone["only scored"]
    core, rest = core_of(runner), Answer(prompt_logprobs=whole.prompt_logprobs[:9])

    core.submit(next(each for each in REQUESTS if each.request_id == "only scored"), num_scored_tokens=9)
    while core.has_work:
        for delta in core.step():
            rest.add(delta)

    assert rest == whole


def test_a_sequence_that_fails_takes_nobody_with_it(runner: ModelRunner, alone: dict[str, Answer]):
    core = core_of(runner)
    victim = request("victim", PROMPTS[7], temperature=0, max_tokens=40)
    answers = {"victim": Answer()} | {each.request_id: Answer() for each in REQUESTS[1:4]}
    for each in (victim, *REQUESTS[1:4]):
        core.submit(each)
    for _ in range(4):
        for delta in core.step():
            answers[delta.request_id].add(delta)

    poison(runner, core.scheduler.running[0].block_ids[6:])  # the prompts begin alike, so the blocks before are not its own
    while core.has_work:
        for delta in core.step():
            answers[delta.request_id].add(delta)
    reusing_its_blocks = finish(core, REQUESTS)

    assert answers.pop("victim").finish_reason is FinishReason.ERROR
    assert answers == {name: alone[name] for name in answers}
    assert reusing_its_blocks == alone


def poison(runner: ModelRunner, blocks: list[int]) -> None:
    """Overwrite blocks of the cache with NaN."""
    state = runner._state
    cache = jax.tree.map(lambda array: array.at[jnp.asarray(blocks)].set(jnp.asarray(jnp.nan, array.dtype)), state.cache)
    runner._state = DeviceState(cache, state.slots)


def test_a_score_is_the_float_that_the_same_token_had_when_it_was_generated(runner: ModelRunner, alone: dict[str, Answer]):
    generated = alone["greedy with logprobs"]
    whole = [*PROMPTS[5], *generated.token_ids]

    scored = finish(core_of(runner), [request("again", whole, prompt_logprobs=5, max_tokens=0)])["again"]

    assert scored.prompt_logprobs[len(PROMPTS[5]) - 1 :] == generated.logprobs


def test_all_64_bits_of_a_seed_count(runner: ModelRunner):
    seeds = (3, 3 + (1 << 32), 3 - (1 << 63), -3, (1 << 32) - 3)

    found = finish(core_of(runner), [request(str(seed), PROMPTS[3], seed=seed) for seed in seeds])

    assert len({tuple(answer.token_ids) for answer in found.values()}) == len(seeds)


def test_nothing_is_compiled_after_the_start(runner: ModelRunner):
    before = runner.num_late_compilations

    finish(core_of(runner), REQUESTS)

    assert runner.num_late_compilations == before
