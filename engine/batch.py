"""Batch: a schedule laid out in one packed int32 array, and how the device reads it back.

This is the last file that knows only NumPy. Every array of the step travels in one buffer, because each separate argument of a compiled
call costs time; floats travel as their bits. Both sides read the buffer with `StepLayout.unpack`; the layout also names the compiled shape
(the bucket).

Rows are sequences, in the order of the batch: first those whose next token is chosen in this step. Query tiles are runs of up to `TILE`
tokens of one sequence: attention works on one tile at a time.

    tokens of A: 1, of B: 11      token      0 | 1 2 3 4 5 6 7 8 | 9 10 11
                                  tile       0 | 1               | 2
                                  row        0 | 1               | 1
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.block_pool import SCRATCH_BLOCK
from engine.constraints import is_constrained
from engine.scheduler import Schedule, ScheduledTokens
from engine.sequence import Sequence
from engine.types import GenerationRequest

TILE = 8  # rows that every reduction is computed with, whatever the step's size
PENDING = -1  # in `StepInput.token_ids`


class StepKind(IntEnum):
    """Which compiled program a step needs; each does what the one before does and more."""

    GREEDY = 0  # every row takes its most likely token, nothing else is asked
    SAMPLE = 1  # penalties, biases, masks, randomness, log-probabilities of the chosen tokens
    SCORE = 2  # also log-probabilities of prompt tokens


class StepInput(NamedTuple):
    """All the device needs for one step; T tokens, S rows, Q query tiles, W blocks per sequence. int32 unless said otherwise."""

    counts: Any  # [3]: tokens, rows that choose a token, query tiles
    token_ids: Any  # [T] -1 stands for the token that the step before chose for the row's slot
    positions: Any  # [T]
    cache_slots: Any  # [T] block id * block size + offset; the scratch block for padding and for what is in a shared block already
    token_rows: Any  # [T]
    is_output: Any  # [T] 1 for tokens this engine generated, 0 for prompt tokens and padding
    tile_places: Any  # [T] tile * TILE + place inside the tile
    targets: Any  # [T] the token that follows, where it is to be scored, else 0
    tile_rows: Any  # [Q]
    tile_starts: Any  # [Q] first token of the tile
    tile_ends: Any  # [Q] position of the tile's last token, plus one
    block_tables: Any  # [S, W]
    sample_at: Any  # [S] token whose hidden state gives the next token
    slots: Any  # [S] row of the per-sequence state
    sample_positions: Any  # [S] position of the token to choose; part of its randomness
    choices: Any  # [S]
    seeds: Any  # [S, 2] high and low word
    top_k: Any  # [S] 0 means all
    mask_end: Any  # [S] 1 while min_tokens are not out
    is_masked: Any  # [S] 1 where only the tokens of the slot's mask may be chosen
    temperature: Any  # float32 [S] 0 means greedy
    top_p: Any  # float32 [S]
    min_p: Any  # float32 [S]
    presence_penalty: Any  # float32 [S]
    frequency_penalty: Any  # float32 [S]
    repetition_penalty: Any  # float32 [S]


FIRST_FLOAT = StepInput._fields.index("temperature")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """The shape of a bucket: `num_tokens` is a multiple of `TILE`."""

    num_tokens: int
    num_seqs: int
    blocks_per_seq: int

    @property
    def num_tiles(self) -> int:
        """Every sequence may leave its last tile unfilled."""
        return self.num_tokens // TILE + self.num_seqs

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of every field of `StepInput`, in order."""
        t, s, q = (self.num_tokens,), (self.num_seqs,), (self.num_tiles,)
        by_token = dict.fromkeys(("token_ids", "positions", "cache_slots", "token_rows", "is_output", "tile_places", "targets"), t)
        by_tile = dict.fromkeys(("tile_rows", "tile_starts", "tile_ends"), q)
        special = {"counts": (3,), "block_tables": (self.num_seqs, self.blocks_per_seq), "seeds": (self.num_seqs, 2)}
        shapes: dict[str, tuple[int, ...]] = {**by_token, **by_tile, **special}
        return tuple(shapes.get(name, s) for name in StepInput._fields)

    @property
    def packed_len(self) -> int:
        _, end, _ = _places(self)[-1]
        return end

    def unpack(self, packed: Any, as_float: Callable[[Any], Any]) -> StepInput:
        """Views into `packed` int32 [packed_len], a NumPy or a device array; `as_float` reads int32 bits as float32."""
        fields = [packed[start:end].reshape(shape) for start, end, shape in _places(self)]
        return StepInput(*fields[:FIRST_FLOAT], *(as_float(field) for field in fields[FIRST_FLOAT:]))


@cache
def _places(layout: StepLayout) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Start, end and shape of every field in the packed array; asked for in every step, so computed once per bucket."""
    places: list[tuple[int, int, tuple[int, ...]]] = []
    start = 0
    for shape in layout.shapes():
        places.append((start, start + prod(shape), shape))
        start += prod(shape)
    return tuple(places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A packed step and what is needed to read its result."""

    layout: StepLayout
    kind: StepKind
    packed: NDArray[np.int32]
    items: tuple[ScheduledTokens, ...]  # in row order; the first `num_sampled` choose a token
    num_sampled: int
    token_starts: tuple[int, ...]  # first token of each row


def is_plain_greedy(request: GenerationRequest) -> bool:
    """True if nothing but the most likely token is asked of every step."""
    sampling = request.sampling
    return (
        sampling.temperature == 0
        and not is_constrained(request)
        and not sampling.has_penalties
        and not sampling.logit_bias
        and not sampling.min_tokens
        and sampling.logprobs is None
    )


def wants_scores(item: ScheduledTokens) -> bool:
    """True if this step computes log-probabilities of prompt tokens that are still to be sent."""
    sequence = item.sequence
    if sequence.score_collector is None:
        return False
    return max(item.start, sequence.num_scored_tokens) < min(item.start + item.num_tokens, sequence.num_prompt_tokens - 1)


class _SlotRows:
    """What a running sequence contributes to every one of its steps, entered once per admission; row i belongs to slot i."""

    def __init__(self, num_slots: int, blocks_per_seq: int, vocab_size: int):
        self._vocab_size = vocab_size
        self.block_tables = np.zeros((num_slots, blocks_per_seq), np.int32)
        self.num_blocks = [0] * num_slots  # entered in `block_tables`
        self.is_plain_greedy = np.zeros(num_slots, bool)
        self.is_masked = np.zeros(num_slots, bool)
        self.num_prompt_tokens = np.zeros(num_slots, np.int64)
        self.num_shared_tokens = np.zeros(num_slots, np.int64)
        self.min_tokens = np.zeros(num_slots, np.int64)
        self.seeds = np.zeros((num_slots, 2), np.int32)
        self.choices, self.top_k = (np.zeros(num_slots, np.int32) for _ in range(2))
        self.knobs = {name: np.zeros(num_slots, np.float32) for name in StepInput._fields[FIRST_FLOAT:]}

    def enter(self, sequence: Sequence) -> None:
        """The sequence has been given its slot."""
        slot, sampling = sequence.slot, sequence.request.sampling
        if slot is None or not 0 <= slot < len(self.block_tables):
            raise RuntimeError(f"a sequence was admitted to slot {slot}, there are 0 to {len(self.block_tables) - 1}")
        self.num_blocks[slot] = 0
        self.block_tables[slot] = SCRATCH_BLOCK
        self.is_plain_greedy[slot] = is_plain_greedy(sequence.request)
        self.is_masked[slot] = is_constrained(sequence.request)
        self.num_prompt_tokens[slot] = sequence.num_prompt_tokens
        self.num_shared_tokens[slot] = sequence.num_shared_tokens
        self.min_tokens[slot] = sampling.min_tokens
        seed = np.array([sampling.seed >> 32 & 0xFFFF_FFFF, sampling.seed & 0xFFFF_FFFF], np.uint32)
        self.seeds[slot] = seed.view(np.int32)
        self.choices[slot] = sequence.request.choice
        self.top_k[slot] = min(sampling.top_k, self._vocab_size)
        for name, column in self.knobs.items():
            column[slot] = getattr(sampling, name)

    def update_blocks(self, sequence: Sequence) -> None:
        """Enter the blocks that the sequence was given since the last step."""
        slot, block_ids = sequence.slot, sequence.block_ids
        assert slot is not None, "a scheduled sequence has a slot"
        known = self.num_blocks[slot]
        if known < len(block_ids):
            self.block_tables[slot, known : len(block_ids)] = block_ids[known:]
            self.num_blocks[slot] = len(block_ids)


class Batcher:
    """Chooses the bucket and fills it."""

    def __init__(self, layouts: tuple[StepLayout, ...], *, block_size: int, num_blocks: int, vocab_size: int, num_slots: int):
        self.layouts = layouts  # smallest first
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.num_slots = num_slots
        self._rows = _SlotRows(num_slots, layouts[-1].blocks_per_seq, vocab_size)

    def build(self, schedule: Schedule) -> Batch:
        """Lay out a schedule that has at least one item. Raises `RuntimeError` if an index would leave its array (JAX would not)."""
        for sequence in schedule.admitted:
            self._rows.enter(sequence)
        chosen = [item for item in schedule.items if item.chooses_token]
        items = (*chosen, *(item for item in schedule.items if not item.chooses_token))
        for item in items:
            self._rows.update_blocks(item.sequence)

        count = len(items)
        slots = np.array([item.sequence.slot for item in items])
        starts = np.array([item.start for item in items])
        lens = np.array([item.num_tokens for item in items])
        num_tokens = int(lens.sum())
        layout = next(each for each in self.layouts if each.num_tokens >= num_tokens and each.num_seqs >= count)
        packed = np.zeros(layout.packed_len, np.int32)
        step = layout.unpack(packed, lambda bits: bits.view(np.float32))
        kind = self._kind(items, slots)

        self._fill_rows(step, slots, ends=starts + lens)
        num_tiles, token_starts = self._fill_tokens(step, slots, starts, lens)
        step.token_ids[:num_tokens] = self._tokens_of(items)
        if kind is StepKind.SCORE:
            step.targets[:num_tokens] = _targets_of(items)
        step.counts[:] = num_tokens, len(chosen), num_tiles
        self._check_ranges(step)
        return Batch(layout=layout, kind=kind, packed=packed, items=items, num_sampled=len(chosen), token_starts=token_starts)

    def _kind(self, items: tuple[ScheduledTokens, ...], slots: NDArray[np.int64]) -> StepKind:
        """The smallest program that serves every scheduled sequence."""
        if any(wants_scores(item) for item in items):
            return StepKind.SCORE
        return StepKind.GREEDY if self._rows.is_plain_greedy[slots].all() else StepKind.SAMPLE

    def _fill_rows(self, step: StepInput, slots: NDArray[np.int64], *, ends: NDArray[np.int64]) -> None:
        """Write what is one number per sequence."""
        rows, count = self._rows, len(slots)
        step.block_tables[:count] = rows.block_tables[slots]
        step.slots[:count] = slots
        step.sample_positions[:count] = ends
        step.choices[:count] = rows.choices[slots]
        step.seeds[:count] = rows.seeds[slots]
        step.top_k[:count] = rows.top_k[slots]
        step.mask_end[:count] = ends - rows.num_prompt_tokens[slots] < rows.min_tokens[slots]
        step.is_masked[:count] = rows.is_masked[slots]
        for name, column in rows.knobs.items():
            getattr(step, name)[:count] = column[slots]

    def _fill_tokens(
        self, step: StepInput, slots: NDArray[np.int64], firsts: NDArray[np.int64], lens: NDArray[np.int64]
    ) -> tuple[int, tuple[int, ...]]:
        """Write all rows' places and query tiles, one row after the other; returns the number of tiles and the first token of each row."""
        starts = np.cumsum(lens) - lens
        num_tiles = -(-lens // TILE)
        first_tiles = np.cumsum(num_tiles) - num_tiles

        rows = np.repeat(np.arange(len(lens)), lens)
        count = len(rows)
        places = np.arange(count) - starts[rows]  # inside the row's share of the step
        positions = firsts[rows] + places
        cache_slots = step.block_tables[rows, positions // self.block_size] * self.block_size + positions % self.block_size
        step.positions[:count] = positions
        step.cache_slots[:count] = np.where(positions < self._rows.num_shared_tokens[slots][rows], SCRATCH_BLOCK, cache_slots)
        step.token_rows[:count] = rows
        step.is_output[:count] = positions >= self._rows.num_prompt_tokens[slots][rows]
        step.tile_places[:count] = first_tiles[rows] * TILE + places
        # A token whose block was never taken would land in the scratch block.
        _check_range("cache_slots", cache_slots, first=self.block_size, end=(self.num_blocks + 1) * self.block_size)

        rows = np.repeat(np.arange(len(lens)), num_tiles)
        count = len(rows)
        offsets = (np.arange(count) - first_tiles[rows]) * TILE
        step.tile_rows[:count] = rows
        step.tile_starts[:count] = starts[rows] + offsets
        step.tile_ends[:count] = firsts[rows] + np.minimum(offsets + TILE, lens[rows])
        step.sample_at[: len(lens)] = starts + lens - 1
        return count, tuple(starts.tolist())

    def _tokens_of(self, items: tuple[ScheduledTokens, ...]) -> list[int]:
        """The scheduled tokens, `PENDING` for one that is still on the device. Raises `RuntimeError` for an id outside the vocabulary."""
        tokens: list[int] = []
        num_pending = 0
        for item in items:
            known = item.sequence.token_ids[item.start : item.start + item.num_tokens]
            tokens += known
            if len(known) < item.num_tokens:
                tokens.append(PENDING)
                num_pending += 1
        if tokens.count(PENDING) != num_pending:
            raise RuntimeError(f"step input token_ids holds {PENDING} for a token that is known")
        return tokens

    def _check_ranges(self, step: StepInput) -> None:
        """The indices among the fields; padding is zero and so in range."""
        _check_range("token_ids", step.token_ids, first=PENDING, end=self.vocab_size)
        _check_range("targets", step.targets, end=self.vocab_size)
        _check_range("block_tables", step.block_tables, end=self.num_blocks + 1)
        _check_range("slots", step.slots, end=self.num_slots)


def _targets_of(items: tuple[ScheduledTokens, ...]) -> list[int]:
    """The token after each scheduled one; 0 where that is not known yet."""
    tokens: list[int] = []
    for item in items:
        known = item.sequence.token_ids[item.start + 1 : item.start + 1 + item.num_tokens]
        tokens += known
        tokens += [0] * (item.num_tokens - len(known))
    return tokens


def _check_range(name: str, values: NDArray[np.integer], *, end: int, first: int = 0) -> None:
    if values.min() < first or values.max() >= end:
        raise RuntimeError(f"step input {name} holds {values.min()} to {values.max()}, must be {first} to {end - 1}")
