"""A runner without a model that checks every step as a device would meet it, and chooses tokens by hashing the whole context.

`ScriptedRunner` fulfils `engine.core.Runner`. Each place of its KV cache holds the hash of all tokens up to its own and of the cache salt:
whoever computes the same prefix writes the same, as with real keys and values. Attention reads it back through the block tables, so a
stale, foreign or missing block raises here. A token id of -1 is the one that the slot's last step chose; only the device knows it then.
Results are handed over by `collect` alone. `expected` computes what a request must get from its fields: no queue, no cache, no company.
"""

import hashlib
import math
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.batch import PENDING, TILE, Batch, StepInput, StepKind, StepLayout, is_plain_greedy
from engine.config import CacheConfig, EngineConfig, MeshConfig, ModelConfig, SchedulerConfig
from engine.constraints import Grammars, Matcher, is_constrained
from engine.core import EngineCore
from engine.scheduler import ScheduledTokens
from engine.sequence import Sequence
from engine.stop import end_token_ids
from engine.types import EngineInfo, FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprob

VOCAB_SIZE = 97
EOS = 2
POISON = 96  # a context that holds this token gives logits that are not finite
NUM_TOP = 4
MAX_IN_FLIGHT = 2  # steps launched and not collected

EMPTY = 17  # the hash of no tokens
KNOBS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


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


@dataclass(slots=True)
class Launched:
    """What `launch` returns: the result is not there before `choose`, and not the host's before `collect`."""

    batch: Batch
    step: StepInput
    slots: "list[Slot]"
    output: ScriptedOutput | None = None
    num_looks: int = 0  # how often it was asked whether the result is there


def extend(context: int, token: int) -> int:
    """The hash of a context and one more token: the same in every process, negative once the context holds `POISON`."""
    value = abs(hash((context, token)))
    return -1 - value if context < 0 or token == POISON else value


def hashes_of(tokens: Iterable[int]) -> list[int]:
    """The hash of the context up to and with each token."""
    context, hashes = EMPTY, list[int]()
    for token in tokens:
        context = extend(context, token)
        hashes.append(context)
    return hashes


@lru_cache
def salt_number(salt: str) -> int:
    """What a salt adds to every cache entry."""
    return int.from_bytes(hashlib.sha256(salt.encode()).digest()[:7])


def bits_of(value: float) -> int:
    """The bits of a float32 as the packed step carries them."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def words_of(seed: int) -> tuple[int, int]:
    """High and low word of a seed as the packed step carries them."""
    high, low = struct.unpack("<ii", struct.pack("<q", seed))
    return low, high


def knob_numbers(sampling: SamplingParams) -> tuple[int, ...]:
    """The fields that travel with every step, as integers: one per name in `KNOBS`, then top_k and the seed."""
    return (*(bits_of(getattr(sampling, name)) for name in KNOBS), min(sampling.top_k, VOCAB_SIZE), *words_of(sampling.seed))


def next_token(
    context: int, num_tokens: int, *, knobs: tuple[int, ...], bias: tuple[tuple[int, float], ...], choice: int, masked: Collection[int]
) -> int:
    """The token after `num_tokens` tokens with the hash `context`; never `POISON` and none of `masked`."""
    assert len({*masked, POISON}) < VOCAB_SIZE, "no token is left to choose"
    temperature, top_p, min_p, *penalties, top_k, high, low = knobs
    randomness = (temperature, top_p, min_p, top_k, high, low, choice, num_tokens) if temperature else ()
    biases = tuple((token, bits_of(value)) for token, value in bias)
    token = hash((context, *penalties, *biases, *randomness)) % (VOCAB_SIZE - 1)
    while token in masked:
        token = (token + 1) % (VOCAB_SIZE - 1)
    return token


def logprob_of(context: int, token: int) -> float:
    """The log-probability of `token` after `context`, in sixteenths so that float32 holds it exactly."""
    return math.nan if context < 0 else -(hash((context, token, 0)) % 1000) / 16


def top_of(context: int) -> list[tuple[int, float]]:
    """The likeliest tokens after `context`."""
    return [((context + place) % VOCAB_SIZE, -place / 4) for place in range(NUM_TOP)]


def token_logprob(context: int, token: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token_id=token, logprob=logprob_of(context, token), top=tuple(top_of(context)[:num_top]))


def following(request: GenerationRequest, output: list[int], compile_grammar: Callable[[str], Matcher] | None) -> tuple[set[int], bool]:
    """What a request may choose after some output, as its own fields say it, and whether its grammar holds the output for whole."""
    sampling = request.sampling
    banned = {run[-1] for run in sampling.bad_words if list(run[:-1]) == output[len(output) - len(run) + 1 :]}
    permitted = set(sampling.allowed_token_ids or range(VOCAB_SIZE)) - banned
    ends = set(end_token_ids(sampling, EOS))
    if len(output) < sampling.min_tokens:
        permitted -= ends
    if request.grammar is None:
        return permitted, False
    assert compile_grammar is not None
    matcher = compile_grammar(request.grammar)
    for token in output:
        matcher.advance(token)
    row = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
    matcher.fill_mask(row)
    tokens = set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())
    may_end = matcher.is_accepting and bool(tokens & permitted)
    return permitted & (tokens | ends if may_end else tokens), matcher.is_accepting


def expected(request: GenerationRequest, compile_grammar: Callable[[str], Matcher] | None = None) -> TokenDelta:
    """All deltas of a request in one, when nobody aborts it and its time is not up; of one that fails, the reason alone.

    It fails where a result that somebody asked for is not finite.
    """
    prompt, sampling = request.prompt_token_ids, request.sampling
    if POISON in (prompt if sampling.max_tokens else prompt[:-1] if sampling.prompt_logprobs is not None else ()):
        return TokenDelta(request_id=request.request_id, finish_reason=FinishReason.ERROR)
    end_ids, knobs, bias = end_token_ids(sampling, EOS), knob_numbers(sampling), tuple(sampling.logit_bias.items())
    hashes = hashes_of(prompt)
    output, logprobs = list[int](), list[TokenLogprob]()
    reason = FinishReason.LENGTH
    while len(output) < sampling.max_tokens:
        allowed, is_whole = following(request, output, compile_grammar)
        if not allowed:
            reason = FinishReason.STOP if is_whole else FinishReason.GRAMMAR
            break
        masked = {*range(VOCAB_SIZE)} - allowed
        token = next_token(hashes[-1], len(hashes), knobs=knobs, bias=bias, choice=request.choice, masked=masked)
        if sampling.logprobs is not None:
            logprobs.append(token_logprob(hashes[-1], token, sampling.logprobs))
        output.append(token)
        hashes.append(extend(hashes[-1], token))
        if token in end_ids:
            reason = FinishReason.STOP
            break
    else:
        if request.grammar is not None and following(request, output, compile_grammar) == (set(), True):
            reason = FinishReason.STOP
    num_top = sampling.prompt_logprobs
    scores = () if num_top is None else tuple(token_logprob(hashes[place - 1], prompt[place], num_top) for place in range(1, len(prompt)))
    return TokenDelta(
        request_id=request.request_id,
        token_ids=tuple(output),
        logprobs=tuple(logprobs),
        prompt_logprobs=scores,
        finish_reason=reason,
    )


def joined(deltas: list[TokenDelta]) -> TokenDelta:
    """All deltas of one request in one, without what the prefix cache gave; only the last may end it."""
    assert not any(delta.finish_reason for delta in deltas[:-1])
    assert len({delta.num_cached_tokens for delta in deltas}) == 1
    return TokenDelta(
        request_id=deltas[0].request_id,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        finish_reason=deltas[-1].finish_reason,
    )


@dataclass(slots=True)
class Slot:
    """State of one running sequence on the device, and what the checks know of the sequence in it."""

    sampling: SamplingParams
    end_ids: tuple[int, ...]
    prompt: list[int]  # counted so far, for the penalties
    outputs: list[int]
    sequence: Sequence | None = None  # whose first step has come
    tokens: list[int] = field(default_factory=list[int])  # all that were computed, the device's own included
    hashes: list[int] = field(default_factory=list[int])  # of the context up to each of them
    entries: list[int] = field(default_factory=list[int])  # what stands in the cache for each of them
    next_position: int | None = None  # after the last step
    masked: frozenset[int] | None = None  # tokens that the mask forbids; None until one was written

    def learn(self, tokens: Iterable[int], *, salt: int) -> None:
        for token in tokens:
            context = extend(self.hashes[-1] if self.hashes else EMPTY, token)
            self.tokens.append(token)
            self.hashes.append(context)
            self.entries.append(context ^ salt)


class ScriptedRunner:
    """Checks each step, computes it at launch and hands the result over at collect."""

    def __init__(self, config: EngineConfig) -> None:
        self.layouts = layouts_of(config)
        self.num_late_compilations = 0
        self.batches: list[Batch] = []
        self.num_ahead = 0  # steps launched before the one before was collected
        self.num_looks = 0  # that find a step undone, before it is
        self._block_size = config.cache.block_size
        self._cache: list[list[int | None]] = [[None] * self._block_size for _ in range(config.cache.num_blocks + 1)]
        self._writers: dict[int, Slot] = {}  # by block: who wrote its first place last
        self._slots: dict[int, Slot] = {}
        self._last_tokens: dict[int, int] = {}
        self._num_slots = config.scheduler.max_num_seqs
        self._in_flight: deque[Launched] = deque()

    def reset_slot(
        self,
        slot: int,
        sampling: SamplingParams,
        end_token_ids: tuple[int, ...],
        *,
        prompt_token_ids: Iterable[int] = (),
        output_token_ids: Iterable[int] = (),
    ) -> None:
        assert 0 <= slot < self._num_slots
        self._slots[slot] = Slot(sampling, end_token_ids, list(prompt_token_ids), list(output_token_ids))

    def write_masks(self, masks: list[tuple[int, NDArray[np.int32]]]) -> None:
        assert len({slot for slot, _ in masks}) == len(masks) > 0
        for slot, words in masks:
            assert (words.shape, words.dtype) == ((-(-VOCAB_SIZE // 32),), np.int32)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
            self._slots[slot].masked = frozenset(np.flatnonzero(bits == 0).tolist())

    def launch(self, batch: Batch) -> Launched:
        assert batch.packed.dtype == np.int32
        assert batch.packed.shape == (batch.layout.packed_len,)
        assert batch.layout in self.layouts
        assert len(self._in_flight) < MAX_IN_FLIGHT, "too many steps ahead"
        self.batches.append(batch)
        step = fields_of(batch.layout, batch.packed.tolist())
        slots = [self._slot_of(item) for item in batch.items]
        for item, slot in zip(batch.items, slots, strict=True):
            self._learn(item, slot)
        check_step(step, batch)
        assert max(step.cache_slots[step.counts[0] :], default=0) < self._block_size, "padding is written outside the scratch block"
        for row, slot in enumerate(slots):
            self._write(step, batch, row, slot)
        for row, slot in enumerate(slots):
            self._read(step, batch, row, slot)
        launched = Launched(batch, step, slots)
        assert all(each.output is not None for each in self._in_flight), "a step is launched before the last one chose"
        self.num_ahead += bool(self._in_flight)
        self._in_flight.append(launched)
        return launched

    def choose(self, launched: Launched, *, dropped: Collection[int] = ()) -> Launched:
        """The rows' tokens, but for the dropped ones, whose step has to come again."""
        assert launched is self._in_flight[-1]
        assert launched.output is None, "a step chooses twice"
        for row in dropped:
            item, slot = launched.batch.items[row], launched.slots[row]
            assert item.chooses_token or item.sequence.is_over, "a row is dropped that chooses nothing"
            slot.next_position = item.start
        launched.output = self._choose(launched.step, launched.batch, launched.slots, dropped)
        return launched

    def is_done(self, output: Launched) -> bool:
        assert output is self._in_flight[0], "another step is done first"
        output.num_looks += 1
        return output.num_looks > self.num_looks

    def collect(self, output: Launched) -> ScriptedOutput:
        assert output is self._in_flight.popleft(), "steps are collected in the order of their launches"
        assert output.output is not None
        return output.output

    def _slot_of(self, item: ScheduledTokens) -> Slot:
        """The slot of a row, which belongs to its sequence from the first step after the reset on."""
        assert item.sequence.slot is not None, "a scheduled sequence has no slot"
        slot = self._slots[item.sequence.slot]
        if slot.sequence is None:
            slot.sequence = item.sequence
        assert slot.sequence is item.sequence, "a slot was not reset for its new sequence"
        assert slot.sampling is item.sequence.request.sampling, "a slot was reset for another sequence"
        return slot

    def _learn(self, item: ScheduledTokens, slot: Slot) -> None:
        """Bring what the device knows of a row's tokens up to the end of this step."""
        sequence, known = item.sequence, item.sequence.token_ids
        end, num_learned = item.start + item.num_tokens, len(slot.tokens)
        first = min(sequence.num_shared_tokens, len(known) - 1) if slot.next_position is None else slot.next_position
        assert item.start == first, "a token is computed twice or left out"
        slot.next_position = end
        salt = salt_number(sequence.request.cache_salt)
        assert item.num_tokens > 0, "a row has no tokens"
        assert slot.tokens == known[:num_learned], "the host entered other tokens than the device chose"
        slot.learn(known[num_learned:], salt=salt)
        if end > len(slot.tokens):
            assert end == len(known) + 1, "more than one token is pending"
            assert item.num_tokens == 1, "a pending token is computed beside others"
            assert not sequence.needs_host, "a sequence was not left to the host between two tokens"
            assert sequence.slot is not None
            slot.learn([self._last_tokens[sequence.slot]], salt=salt)

    def _write(self, step: StepInput, batch: Batch, row: int, slot: Slot) -> None:
        """Enter a row's tokens into the cache."""
        item, size = batch.items[row], self._block_size
        table = step.block_tables[row]
        num_shared = item.sequence.num_shared_tokens
        assert num_shared % size == 0, "a block is shared in part"
        first = batch.token_starts[row] - item.start
        for position in range(item.start, item.start + item.num_tokens):
            place = step.cache_slots[first + position]
            if position < num_shared:
                assert place < size, "a shared block is written"
                continue
            index, offset = divmod(position, size)
            block = table[index]
            assert block > 0, "a token is written to the scratch block"
            assert place == block * size + offset, "a token is written to another place than its block table says"
            if offset == 0:
                self._writers[block] = slot
            assert self._writers.get(block) is slot, "a block is written by two sequences"
            self._cache[block][offset] = slot.entries[position]

    def _read(self, step: StepInput, batch: Batch, row: int, slot: Slot) -> None:
        """Attend to all places up to the row's last token: they must hold exactly the row's own context."""
        item, size = batch.items[row], self._block_size
        end = item.start + item.num_tokens
        for block, start in zip(step.block_tables[row], range(0, end, size), strict=False):
            wanted, found = slot.entries[start : min(start + size, end)], self._cache[block]
            if found[: len(wanted)] != wanted:
                raise AssertionError(f"block {block} does not hold tokens {start}... of request {item.sequence.request.request_id}")

    def _choose(self, step: StepInput, batch: Batch, slots: list[Slot], dropped: Collection[int]) -> ScriptedOutput:
        """Count the row's tokens for the penalties, then choose the next ones and score what is asked."""
        num_rows, is_greedy = batch.layout.num_seqs, batch.kind is StepKind.GREEDY
        token_ids, is_finite = np.zeros(num_rows, np.int32), np.ones(num_rows, bool)
        logprobs = None if is_greedy else empty_logprobs(num_rows)
        for row, (item, slot) in enumerate(zip(batch.items, slots, strict=True)):
            if row in dropped:
                continue
            end, num_prompt = item.start + item.num_tokens, item.sequence.num_prompt_tokens
            if not is_greedy:
                slot.prompt += slot.tokens[item.start : min(end, num_prompt)]
                slot.outputs += slot.tokens[max(item.start, num_prompt) : end]
            if row < batch.num_sampled:
                check_counts(batch, slot, num_prompt=num_prompt, end=end)
                context, token = slot.hashes[end - 1], chosen_token(step, row, slot, end)
                token_ids[row], is_finite[row] = token, context >= 0
                self._last_tokens[step.slots[row]] = token
                if logprobs is not None and slot.sampling.logprobs is not None:
                    write_logprob(logprobs, row, context, token)
        return ScriptedOutput(token_ids, is_finite, logprobs, self._scores(step, batch, slots) if batch.kind is StepKind.SCORE else None)

    def _scores(self, step: StepInput, batch: Batch, slots: list[Slot]) -> ScriptedLogprobs:
        scores = empty_logprobs(batch.layout.num_tokens)
        for item, slot, first in zip(batch.items, slots, batch.token_starts, strict=True):
            if slot.sampling.prompt_logprobs is None:
                continue
            prompt = item.sequence.request.prompt_token_ids
            for token, position in enumerate(range(item.start, min(item.start + item.num_tokens, len(prompt) - 1)), first):
                assert step.targets[token] == prompt[position + 1], "another token is scored than the next one"
                write_logprob(scores, token, slot.hashes[position], prompt[position + 1])
        return scores


@lru_cache
def places_of(layout: StepLayout) -> tuple[tuple[int, int], ...]:
    """Where each field of `StepInput` begins and ends in the packed array."""
    ends = list(accumulate(math.prod(shape) for shape in layout.shapes()))
    return tuple(zip([0, *ends], ends, strict=False))


def fields_of(layout: StepLayout, packed: list[int]) -> StepInput:
    """The packed step as lists, tables row by row; floats stay bits, to be hashed."""
    step = StepInput(*(packed[start:end] for start, end in places_of(layout)))
    rows, width = range(layout.num_seqs), layout.blocks_per_seq
    tables = [step.block_tables[row * width : (row + 1) * width] for row in rows]
    return step._replace(block_tables=tables, seeds=[step.seeds[2 * row : 2 * row + 2] for row in rows])


def check_step(step: StepInput, batch: Batch) -> None:
    """Every number of the step is that of its sequence."""
    count = len(batch.items)
    token_ids, positions, rows, is_output, places = [], [], [], [], []
    tile_rows, tile_starts, tile_ends, starts, ends = [], [], [], [], []
    for row, item in enumerate(batch.items):
        start, end, num_prompt = item.start, item.start + item.num_tokens, item.sequence.num_prompt_tokens
        first = len(positions)
        known = item.sequence.token_ids[start:end]
        token_ids += known + [PENDING] * (item.num_tokens - len(known))
        positions += range(start, end)
        rows += [row] * item.num_tokens
        is_output += [int(position >= num_prompt) for position in range(start, end)]
        places += range(len(tile_rows) * TILE, len(tile_rows) * TILE + item.num_tokens)
        tiles = range(start, end, TILE)
        tile_rows += [row] * len(tiles)
        tile_starts += [first + tile - start for tile in tiles]
        tile_ends += [min(tile + TILE, end) for tile in tiles]
        starts.append(first)
        ends.append(end)
        is_known_end = end == len(item.sequence.token_ids) or len(known) < item.num_tokens
        assert item.chooses_token == (is_known_end and item.sequence.request.sampling.max_tokens > 0)
        assert (row < batch.num_sampled) == item.chooses_token
        assert end < item.sequence.max_len or not item.sequence.request.sampling.max_tokens, "a token after the last one is computed"
    assert step.counts == [len(positions), batch.num_sampled, len(tile_rows)]
    assert batch.token_starts == tuple(starts)
    assert len(positions) <= batch.layout.num_tokens
    assert count <= batch.layout.num_seqs
    num_tokens, num_tiles = len(positions), len(tile_rows)
    by_token = (step.token_ids, token_ids), (step.positions, positions), (step.token_rows, rows), (step.is_output, is_output)
    for field_, wanted in (*by_token, (step.tile_places, places)):
        assert field_[:num_tokens] == wanted
    for field_, wanted in ((step.tile_rows, tile_rows), (step.tile_starts, tile_starts), (step.tile_ends, tile_ends)):
        assert field_[:num_tiles] == wanted
    slots = [item.sequence.slot for item in batch.items]
    assert step.slots[:count] == slots
    assert len(set(slots)) == count, "a slot has two rows"
    assert step.sample_at[:count] == [first + item.num_tokens - 1 for first, item in zip(starts, batch.items, strict=True)]
    assert step.sample_positions[:count] == ends


def check_counts(batch: Batch, slot: Slot, *, num_prompt: int, end: int) -> None:
    """What the device counted is what the penalties are about."""
    if slot.sampling.has_penalties:
        assert slot.outputs == slot.tokens[num_prompt:end], "the device counted other tokens than were generated"
        assert slot.prompt == slot.tokens[:num_prompt], "the device counted other tokens than the prompt's"
    assert batch.kind is not StepKind.GREEDY or _is_plain(slot), "a step is greedy that should not be"


def _is_plain(slot: Slot) -> bool:
    assert slot.sequence is not None
    return is_plain_greedy(slot.sequence.request)


def chosen_token(step: StepInput, row: int, slot: Slot, end: int) -> int:
    """What the device makes of a row: its own fields come from the step, the rest from its slot."""
    assert slot.sequence is not None
    knobs = (*(getattr(step, name)[row] for name in KNOBS), step.top_k[row], *step.seeds[row])
    is_early = bool(step.mask_end[row])
    assert is_early == (end - slot.sequence.num_prompt_tokens < slot.sampling.min_tokens)
    masked = set(slot.end_ids) if is_early else set[int]()
    assert step.is_masked[row] == is_constrained(slot.sequence.request)
    if step.is_masked[row]:
        assert slot.masked is not None, "a mask was not written for the slot's new sequence"
        masked |= slot.masked
    return next_token(
        slot.hashes[end - 1],
        step.sample_positions[row],
        knobs=knobs,
        bias=tuple(slot.sampling.logit_bias.items()),
        choice=step.choices[row],
        masked=masked,
    )


def empty_logprobs(count: int) -> ScriptedLogprobs:
    return ScriptedLogprobs(np.zeros(count, np.float32), np.zeros((count, NUM_TOP), np.int32), np.zeros((count, NUM_TOP), np.float32))


def write_logprob(logprobs: ScriptedLogprobs, row: int, context: int, token: int) -> None:
    logprobs.chosen[row] = logprob_of(context, token)
    top = top_of(context)
    logprobs.top_ids[row] = [top_id for top_id, _ in top]
    logprobs.top[row] = [value for _, value in top]


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


def info_of(config: EngineConfig) -> EngineInfo:
    """What an engine with this configuration tells about itself."""
    return EngineInfo(
        vocab_size=config.model.vocab_size,
        max_model_len=config.scheduler.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_logprobs=config.max_logprobs,
        block_size=config.cache.block_size,
        num_blocks=config.cache.num_blocks,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        backend="none",
        num_devices=0,
        num_params=0,
        weight_bytes=0,
        num_programs=0,
        load_s=0.0,
        compile_s=0.0,
    )


def scripted_core(
    config: EngineConfig, *, clock: Clock | None = None, grammars: Grammars | None = None
) -> tuple[EngineCore, ScriptedRunner]:
    """A core on a scripted runner; its clock stands still unless one is given."""
    runner = ScriptedRunner(config)
    return EngineCore(config, runner, info_of(config), clock=clock or Clock(), grammars=grammars), runner


def check_conservation(core: EngineCore) -> None:
    """What must hold between any two steps, whatever happened."""
    scheduler, pool, block_size = core.scheduler, core.pool, core.config.cache.block_size
    running, waiting = scheduler.running, scheduler.waiting
    held: list[int] = []
    written: list[int] = []
    for sequence in running:
        blocks, num_shared = list(sequence.block_ids), sequence.num_shared_tokens
        held += blocks
        written += blocks[num_shared // block_size :]
        assert len(set(blocks)) == len(blocks), "a sequence holds a block twice"
        assert num_shared % block_size == 0, "a block is shared in part"
        assert num_shared <= len(blocks) * block_size, "more is shared than held"
        assert sequence.num_computed_tokens <= len(blocks) * block_size, "more is computed than held"
        assert 0 <= sequence.num_pending_tokens <= (1 if core._ahead is None else 2)
    for sequence in waiting:
        assert (len(sequence.block_ids), sequence.num_computed_tokens, sequence.slot) == (0, 0, None), "a waiting sequence holds something"
    assert pool.num_free + pool.num_held == pool.num_blocks
    assert 0 <= pool.num_cached <= pool.num_free
    assert len(set(held)) == pool.num_held, "held blocks are not those of the running sequences"
    assert len(set(written)) == len(written), "two sequences write one block"
    assert not held or 1 <= min(held) <= max(held) <= pool.num_blocks
    slots = [sequence.slot for sequence in running]
    assert None not in slots
    assert len(set(slots)) == len(slots) <= core.config.scheduler.max_num_seqs
    ranks = [-1 if sequence.rank is None else sequence.rank for sequence in running]
    assert ranks == sorted(set(ranks)), "the running ones are not in the order of their age"
    arrivals = {sequence.arrival for sequence in running}.union(sequence.arrival for sequence in waiting)
    assert len(arrivals) == len(running) + len(waiting), "a sequence stands in two queues"


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
