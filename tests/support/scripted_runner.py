"""A runner without a model that checks every step as a device would meet it, and chooses tokens by hashing the whole context.

`ScriptedRunner` fulfils `engine.core.Runner`. Its KV cache remembers which token of which request was written to each place, and attention
reads the context back through the block tables, so a stale, shared or missing block raises here. `expected` computes what a request must
get from its fields alone: no queue, no cache, no batch.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.batch import TILE, Batch, StepInput, StepKind, StepLayout, is_plain_greedy
from engine.config import CacheConfig, EngineConfig, MeshConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.stop import end_token_ids
from engine.types import EngineInfo, FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprob

VOCAB_SIZE = 97
EOS = 2
POISON = 96  # a context that holds this token gives logits that are not finite
NUM_TOP = 4
HASH_PRIME = (1 << 61) - 1


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What stands in one place of the cache."""

    request_id: str
    position: int
    token: int


@dataclass(slots=True)
class Slot:
    """State of one running sequence on the device."""

    sampling: SamplingParams
    end_ids: tuple[int, ...]
    outputs: list[int]


class ScriptedLogprobs(NamedTuple):
    """As `engine.sampling.Logprobs`."""

    chosen: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top: NDArray[np.float32]


class ScriptedOutput(NamedTuple):
    """As `engine.runner.StepOutput`."""

    token_ids: NDArray[np.int32]
    is_finite: NDArray[np.bool_]
    logprobs: ScriptedLogprobs | None
    scores: ScriptedLogprobs | None


def hash_of(*parts: object) -> int:
    """The same number for the same parts, in every process."""
    value = 17
    for number in _numbers(parts):
        value = (value * 1_000_003 + number + 1) % HASH_PRIME
    return value


def _numbers(part: object) -> list[int]:
    if isinstance(part, list | tuple):
        return [number for each in part for number in _numbers(each)]
    if isinstance(part, float):
        return [int.from_bytes(np.float32(part).tobytes(), "little")]
    assert isinstance(part, int)
    return [part]


def next_token(context: list[int], *, num_prompt: int, sampling: SamplingParams, choice: int, end_ids: tuple[int, ...]) -> int:
    """The token after `context`; never `POISON`, and none of `end_ids` before `min_tokens` are out."""
    knobs: list[object] = [sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty]
    knobs += sorted(sampling.logit_bias.items())
    if sampling.temperature:
        seed = sampling.seed & ((1 << 64) - 1)
        top_k = min(sampling.top_k, VOCAB_SIZE)
        knobs += [sampling.temperature, sampling.top_p, top_k, sampling.min_p, seed, choice, len(context)]
    token = hash_of(context, knobs) % (VOCAB_SIZE - 1)
    while len(context) - num_prompt < sampling.min_tokens and token in end_ids:
        token = (token + 1) % (VOCAB_SIZE - 1)
    return token


def logprob_of(context: list[int], token: int) -> float:
    """The log-probability of `token` after `context`, in sixteenths so that float32 holds it exactly."""
    return math.nan if POISON in context else -(hash_of(context, token) % 1000) / 16


def top_of(context: list[int]) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens after `context`."""
    first = hash_of(context) % VOCAB_SIZE
    return tuple(((first + place) % VOCAB_SIZE, -place / 4) for place in range(NUM_TOP))


def token_logprob(context: list[int], token: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token_id=token, logprob=logprob_of(context, token), top=top_of(context)[:num_top])


def expected(request: GenerationRequest) -> TokenDelta:
    """All deltas of a request in one, when nobody aborts it and its time is not up; of one that fails, the reason alone."""
    if POISON in request.prompt_token_ids:
        return TokenDelta(request_id=request.request_id, finish_reason=FinishReason.ERROR)
    sampling, prompt = request.sampling, list(request.prompt_token_ids)
    end_ids = end_token_ids(sampling, EOS)
    context, logprobs = list(prompt), list[TokenLogprob]()
    reason = FinishReason.LENGTH
    while len(context) < len(prompt) + sampling.max_tokens:
        token = next_token(context, num_prompt=len(prompt), sampling=sampling, choice=request.choice, end_ids=end_ids)
        if sampling.logprobs is not None:
            logprobs.append(token_logprob(context, token, sampling.logprobs))
        context.append(token)
        if token in end_ids:
            reason = FinishReason.STOP
            break
    num_top = sampling.prompt_logprobs
    scores = () if num_top is None else tuple(token_logprob(prompt[:end], prompt[end], num_top) for end in range(1, len(prompt)))
    return TokenDelta(
        request_id=request.request_id,
        token_ids=tuple(context[len(prompt) :]),
        logprobs=tuple(logprobs),
        prompt_logprobs=scores,
        finish_reason=reason,
    )


def joined(deltas: list[TokenDelta]) -> TokenDelta:
    """All deltas of one request in one; only the last may end it."""
    assert not any(delta.finish_reason for delta in deltas[:-1])
    return TokenDelta(
        request_id=deltas[0].request_id,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        finish_reason=deltas[-1].finish_reason,
    )


class ScriptedRunner:
    """Checks each step, computes it at launch and hands the result over at collect."""

    def __init__(self, config: EngineConfig) -> None:
        self.layouts = layouts_of(config)
        self.num_late_compilations = 0
        self.batches: list[Batch] = []
        self._block_size = config.cache.block_size
        self._cache: dict[int, CacheEntry] = {}
        self._slots: dict[int, Slot] = {}
        self._num_slots = config.scheduler.max_num_seqs

    def reset_slot(self, slot: int, sampling: SamplingParams, end_token_ids: tuple[int, ...]) -> None:
        assert 0 <= slot < self._num_slots
        self._slots[slot] = Slot(sampling, end_token_ids, [])

    def launch(self, batch: Batch) -> ScriptedOutput:
        assert batch.packed.dtype == np.int32
        assert batch.packed.shape == (batch.layout.packed_len,)
        assert batch.layout in self.layouts
        self.batches.append(batch)
        step = batch.layout.unpack(batch.packed, lambda bits: bits.view(np.float32))
        check_rows(step, batch)
        self._write_cache(step, batch)
        contexts = self._attend(step, batch)
        if batch.kind is not StepKind.GREEDY:
            self._count_outputs(step)
        return self._choose(step, batch, contexts)

    def collect(self, output: ScriptedOutput) -> ScriptedOutput:
        return output

    def _write_cache(self, step: StepInput, batch: Batch) -> None:
        num_tokens = int(step.counts[0])
        places = step.cache_slots[:num_tokens].tolist()
        assert len(set(places)) == num_tokens, "two tokens of a step share a place"
        assert (step.cache_slots[num_tokens:] < self._block_size).all(), "padding is written outside the scratch block"
        for token, place in enumerate(places):
            position, row = int(step.positions[token]), int(step.token_rows[token])
            block = int(step.block_tables[row, position // self._block_size])
            assert block > 0, "a token is written to the scratch block"
            assert place == block * self._block_size + position % self._block_size
            self._cache[place] = CacheEntry(request_id_of(batch, row), position, int(step.token_ids[token]))

    def _attend(self, step: StepInput, batch: Batch) -> dict[int, list[int]]:
        """For every token of the step, the tokens that it sees, as they stand in the cache."""
        contexts: dict[int, list[int]] = {}
        for tile in range(step.counts[2]):
            row, start, end = (int(field[tile]) for field in (step.tile_rows, step.tile_starts, step.tile_ends))
            table = step.block_tables[row].tolist()
            places = [table[position // self._block_size] * self._block_size + position % self._block_size for position in range(end)]
            entries = [self._cache.get(place) for place in places]
            sequence = batch.items[row].sequence
            assert entries == [CacheEntry(request_id_of(batch, row), p, token) for p, token in enumerate(sequence.token_ids[:end])]
            first = int(step.positions[start])
            assert 0 < end - first <= TILE
            for place, position in enumerate(range(first, end)):
                token = start + place
                assert token not in contexts, "a token lies in two tiles"
                assert step.token_rows[token] == row
                assert step.positions[token] == position
                assert step.tile_places[token] == tile * TILE + place
                contexts[token] = sequence.token_ids[: position + 1]
        assert sorted(contexts) == list(range(step.counts[0])), "a token lies in no tile"
        return contexts

    def _count_outputs(self, step: StepInput) -> None:
        for token in range(step.counts[0]):
            if step.is_output[token]:
                self._slots[int(step.slots[step.token_rows[token]])].outputs.append(int(step.token_ids[token]))

    def _choose(self, step: StepInput, batch: Batch, contexts: dict[int, list[int]]) -> ScriptedOutput:
        num_rows, num_tokens = batch.layout.num_seqs, batch.layout.num_tokens
        token_ids, is_finite = np.zeros(num_rows, np.int32), np.ones(num_rows, bool)
        logprobs, scores = empty_logprobs(num_rows), empty_logprobs(num_tokens)
        for row in range(batch.num_sampled):
            context = contexts[int(step.sample_at[row])]
            sequence, slot = batch.items[row].sequence, self._slots[int(step.slots[row])]
            assert context == sequence.token_ids, "a row chooses before all its tokens are computed"
            assert slot.sampling is sequence.request.sampling, "a slot was not reset for its new sequence"
            if not is_plain_greedy(sequence):
                assert batch.kind is not StepKind.GREEDY
                assert slot.outputs == context[sequence.num_prompt_tokens :], "the device counted other tokens than were generated"
            token_ids[row] = next_token(
                context,
                num_prompt=sequence.num_prompt_tokens,
                sampling=sampling_of(step, row, slot.sampling),
                choice=int(step.choices[row]),
                end_ids=slot.end_ids if step.mask_end[row] else (),
            )
            is_finite[row] = POISON not in context
            write_logprob(logprobs, row, context, int(token_ids[row]))
        for token, context in contexts.items():
            write_logprob(scores, token, context, int(step.targets[token]))
        return ScriptedOutput(
            token_ids,
            is_finite,
            None if batch.kind is StepKind.GREEDY else logprobs,
            scores if batch.kind is StepKind.SCORE else None,
        )


def check_rows(step: StepInput, batch: Batch) -> None:
    """Every row's numbers are those of its sequence."""
    assert step.counts[0] == sum(item.num_tokens for item in batch.items) <= batch.layout.num_tokens
    assert step.counts[1] == batch.num_sampled <= len(batch.items) <= batch.layout.num_seqs
    assert step.counts[2] <= batch.layout.num_tiles
    start = 0
    for row, item in enumerate(batch.items):
        sequence, sampling = item.sequence, item.sequence.request.sampling
        first, last = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_tokens
        end = start + item.num_tokens
        assert batch.token_starts[row] == start
        assert step.token_rows[start:end].tolist() == [row] * item.num_tokens
        assert step.token_ids[start:end].tolist() == sequence.token_ids[first:last]
        assert step.positions[start:end].tolist() == list(range(first, last))
        assert step.is_output[start:end].tolist() == [position >= sequence.num_prompt_tokens for position in range(first, last)]
        following = sequence.token_ids[first + 1 : last + 1]
        assert step.targets[start:end].tolist() == following + [0] * (item.num_tokens - len(following))
        assert (row < batch.num_sampled) == (last == sequence.num_tokens and sampling.max_tokens > 0)
        assert step.sample_at[row] == end - 1
        assert step.slots[row] == sequence.slot
        assert step.sample_positions[row] == sequence.num_tokens
        assert bool(step.mask_end[row]) == (sequence.num_output_tokens < sampling.min_tokens)
        start = end


def sampling_of(step: StepInput, row: int, slot: SamplingParams) -> SamplingParams:
    """The parameters of a row as the device reads them: its own fields from the step, the rest from its slot."""
    high, low = (int(word) & 0xFFFF_FFFF for word in step.seeds[row])
    return replace(
        slot,
        seed=high << 32 | low,
        top_k=int(step.top_k[row]),
        temperature=float(step.temperature[row]),
        top_p=float(step.top_p[row]),
        min_p=float(step.min_p[row]),
        presence_penalty=float(step.presence_penalty[row]),
        frequency_penalty=float(step.frequency_penalty[row]),
        repetition_penalty=float(step.repetition_penalty[row]),
    )


def request_id_of(batch: Batch, row: int) -> str:
    return batch.items[row].sequence.request.request_id


def empty_logprobs(count: int) -> ScriptedLogprobs:
    return ScriptedLogprobs(np.zeros(count, np.float32), np.zeros((count, NUM_TOP), np.int32), np.zeros((count, NUM_TOP), np.float32))


def write_logprob(logprobs: ScriptedLogprobs, row: int, context: list[int], token: int) -> None:
    logprobs.chosen[row] = logprob_of(context, token)
    for place, (top_id, value) in enumerate(top_of(context)):
        logprobs.top_ids[row, place], logprobs.top[row, place] = top_id, value


def layouts_of(config: EngineConfig) -> tuple[StepLayout, ...]:
    """A small bucket, one between and the full one."""
    full = -(-config.scheduler.max_num_batched_tokens // TILE) * TILE
    max_num_seqs = config.scheduler.max_num_seqs
    return tuple(
        StepLayout(num_tokens=size, num_seqs=min(size, max_num_seqs), blocks_per_seq=config.max_blocks_per_seq)
        for size in sorted({TILE, max(TILE, full // 2 // TILE * TILE), full})
    )


def engine_config(
    *, num_blocks: int = 64, block_size: int = 4, max_num_seqs: int = 4, max_num_batched_tokens: int = 16, max_model_len: int = 64
) -> EngineConfig:
    """A small engine over a vocabulary of `VOCAB_SIZE`."""
    model = ModelConfig(
        vocab_size=VOCAB_SIZE,
        sequence_len=max_model_len,
        emb_size=8,
        key_size=8,
        num_q_heads=1,
        num_kv_heads=1,
        num_layers=1,
        num_experts=1,
        num_selected_experts=1,
        ffn_size=8,
        embedding_multiplier_scale=1.0,
        output_multiplier_scale=1.0,
        attn_output_multiplier=1.0,
        eos_token=EOS,
    )
    return EngineConfig(
        model=model,
        model_dir="",
        dtype="float32",
        mesh=MeshConfig(),
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len),
        max_logprobs=NUM_TOP,
    )


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def scripted_core(config: EngineConfig, *, clock: Clock | None = None) -> tuple[EngineCore, ScriptedRunner]:
    """A core on a scripted runner; its clock stands still unless one is given."""
    runner = ScriptedRunner(config)
    info = EngineInfo(
        vocab_size=config.model.vocab_size,
        max_model_len=config.scheduler.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_logprobs=config.max_logprobs,
        block_size=config.cache.block_size,
        num_blocks=config.cache.num_blocks,
        dtype=config.dtype,
        backend="none",
        num_devices=0,
        num_params=0,
        weight_bytes=0,
        num_programs=0,
        load_s=0.0,
        compile_s=0.0,
    )
    return EngineCore(config, runner, info, clock=clock or Clock()), runner


def check_conservation(core: EngineCore) -> None:
    """What must hold between any two steps, whatever happened."""
    scheduler, pool = core.scheduler, core.pool
    running, waiting = scheduler.running, scheduler.waiting
    held = [block for sequence in running for block in sequence.block_ids]
    assert pool.num_free + pool.num_held == pool.num_blocks
    assert len(held) == pool.num_held, "held blocks are not those of the running sequences"
    assert len(set(held)) == len(held), "a block has two owners"
    assert all(1 <= block <= pool.num_blocks for block in held)
    assert not any(sequence.block_ids or sequence.num_computed_tokens or sequence.slot is not None for sequence in waiting)
    slots = [sequence.slot for sequence in running]
    assert None not in slots
    assert len(set(slots)) == len(slots) <= core.config.scheduler.max_num_seqs
    arrivals = [sequence.arrival for sequence in (*running, *waiting)]
    assert arrivals == sorted(set(arrivals)), "someone overtook, or stands in two queues"
    block_size = core.config.cache.block_size
    assert all(len(sequence.block_ids) * block_size >= sequence.num_computed_tokens for sequence in running)


def run_until_idle(core: EngineCore, *, max_steps: int = 10_000) -> dict[str, list[TokenDelta]]:
    """Step until there is no work, checking between the steps; the deltas of each request."""
    deltas: dict[str, list[TokenDelta]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            return deltas
        for delta in core.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        check_conservation(core)
    raise AssertionError(f"still working after {max_steps} steps: {core.stats()}")
