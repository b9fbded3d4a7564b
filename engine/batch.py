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

from engine.scheduler import Schedule, ScheduledTokens
from engine.sequence import Sequence

TILE = 8  # rows that every reduction is computed with, whatever the step's size


class StepKind(IntEnum):
    """Which compiled program a step needs; each does what the one before does and more."""

    GREEDY = 0  # every row takes its most likely token, nothing else is asked
    SAMPLE = 1  # penalties, biases, masks, randomness, log-probabilities of the chosen tokens
    SCORE = 2  # also log-probabilities of prompt tokens


class StepInput(NamedTuple):
    """All the device needs for one step; T tokens, S rows, Q query tiles, W blocks per sequence. int32 unless said otherwise."""

    counts: Any  # [3]: tokens, rows that choose a token, query tiles
    token_ids: Any  # [T]
    positions: Any  # [T]
    cache_slots: Any  # [T] block id * block size + offset; padding writes to the scratch block
    token_rows: Any  # [T]
    is_output: Any  # [T] 1 for tokens this engine generated, 0 for prompt tokens and padding
    tile_places: Any  # [T] tile * TILE + place inside the tile
    targets: Any  # [T] the token that follows, to be scored
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


def is_plain_greedy(sequence: Sequence) -> bool:
    """True if nothing but the most likely token is asked of every step of this sequence."""
    sampling = sequence.request.sampling
    return (
        sampling.temperature == 0
        and sampling.presence_penalty == 0
        and sampling.frequency_penalty == 0
        and sampling.repetition_penalty == 1
        and not sampling.logit_bias
        and not sampling.min_tokens
        and sampling.logprobs is None
    )


def wants_scores(item: ScheduledTokens) -> bool:
    """True if this step computes log-probabilities of prompt tokens that are still to be sent."""
    sequence = item.sequence
    if sequence.request.sampling.prompt_logprobs is None:
        return False
    return sequence.num_scored_tokens < min(sequence.num_computed_tokens + item.num_tokens, sequence.num_prompt_tokens - 1)


def chooses_token(item: ScheduledTokens) -> bool:
    """True if this step's result is the sequence's next token."""
    return item.reaches_end and item.sequence.request.sampling.max_tokens > 0


def step_kind(items: tuple[ScheduledTokens, ...]) -> StepKind:
    """The smallest program that serves every scheduled sequence."""
    if any(wants_scores(item) for item in items):
        return StepKind.SCORE
    return StepKind.GREEDY if all(is_plain_greedy(item.sequence) for item in items) else StepKind.SAMPLE


class Batcher:
    """Chooses the bucket and fills it."""

    def __init__(self, layouts: tuple[StepLayout, ...], *, block_size: int, num_blocks: int, vocab_size: int, num_slots: int):
        self.layouts = layouts  # smallest first
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.num_slots = num_slots

    def build(self, schedule: Schedule) -> Batch:
        """Lay out a schedule that has at least one item. Raises `RuntimeError` if an index would leave its array (JAX would not)."""
        chosen: list[ScheduledTokens] = []
        others: list[ScheduledTokens] = []
        for item in schedule.items:
            (chosen if chooses_token(item) else others).append(item)
        items = (*chosen, *others)
        num_tokens = sum(item.num_tokens for item in items)
        layout = next(each for each in self.layouts if each.num_tokens >= num_tokens and each.num_seqs >= len(items))
        packed = np.zeros(layout.packed_len, np.int32)
        step = layout.unpack(packed, lambda bits: bits.view(np.float32))

        self._fill_rows(step, items)
        num_tiles, token_starts = self._fill_tokens(step, items)
        step.counts[:] = num_tokens, len(chosen), num_tiles
        self._check_ranges(step)
        return Batch(
            layout=layout, kind=step_kind(items), packed=packed, items=items, num_sampled=len(chosen), token_starts=tuple(token_starts)
        )

    def _fill_tokens(self, step: StepInput, items: tuple[ScheduledTokens, ...]) -> tuple[int, list[int]]:
        """Write all rows' tokens and query tiles, one row after the other; returns the number of tiles and the first token of each row."""
        lens = np.array([item.num_tokens for item in items])
        firsts = np.array([item.sequence.num_computed_tokens for item in items])
        starts = np.cumsum(lens) - lens
        num_tiles = -(-lens // TILE)
        first_tiles = np.cumsum(num_tiles) - num_tiles

        rows = np.repeat(np.arange(len(items)), lens)
        count = len(rows)
        places = np.arange(count) - starts[rows]  # inside the row's share of the step
        positions = firsts[rows] + places
        step.token_ids[:count] = _tokens_of(items, ahead=0)
        step.targets[:count] = _tokens_of(items, ahead=1)
        step.positions[:count] = positions
        step.cache_slots[:count] = step.block_tables[rows, positions // self.block_size] * self.block_size + positions % self.block_size
        step.token_rows[:count] = rows
        step.is_output[:count] = positions >= np.array([item.sequence.num_prompt_tokens for item in items])[rows]
        step.tile_places[:count] = first_tiles[rows] * TILE + places

        rows = np.repeat(np.arange(len(items)), num_tiles)
        count = len(rows)
        offsets = (np.arange(count) - first_tiles[rows]) * TILE
        step.tile_rows[:count] = rows
        step.tile_starts[:count] = starts[rows] + offsets
        step.tile_ends[:count] = firsts[rows] + np.minimum(offsets + TILE, lens[rows])
        step.sample_at[: len(items)] = starts + lens - 1
        return count, starts.tolist()

    def _fill_rows(self, step: StepInput, items: tuple[ScheduledTokens, ...]) -> None:
        """Write what is one number per sequence, a field at a time: NumPy takes a list much faster than its elements."""
        sequences = [item.sequence for item in items]
        samplings = [sequence.request.sampling for sequence in sequences]
        count = len(items)
        for table, sequence in zip(step.block_tables, sequences, strict=False):
            table[: len(sequence.block_ids)] = sequence.block_ids
        step.slots[:count] = [sequence.slot for sequence in sequences]
        step.sample_positions[:count] = [sequence.num_tokens for sequence in sequences]
        step.choices[:count] = [sequence.request.choice for sequence in sequences]
        seeds = np.array([sampling.seed & 0xFFFF_FFFF_FFFF_FFFF for sampling in samplings], np.uint64)
        words = np.stack((seeds >> np.uint64(32), seeds & np.uint64(0xFFFF_FFFF)), axis=1)
        step.seeds[:count] = words.astype(np.uint32).view(np.int32)
        step.top_k[:count] = [min(sampling.top_k, self.vocab_size) for sampling in samplings]
        step.mask_end[:count] = [sequence.num_output_tokens < sequence.request.sampling.min_tokens for sequence in sequences]
        step.temperature[:count] = [sampling.temperature for sampling in samplings]
        step.top_p[:count] = [sampling.top_p for sampling in samplings]
        step.min_p[:count] = [sampling.min_p for sampling in samplings]
        step.presence_penalty[:count] = [sampling.presence_penalty for sampling in samplings]
        step.frequency_penalty[:count] = [sampling.frequency_penalty for sampling in samplings]
        step.repetition_penalty[:count] = [sampling.repetition_penalty for sampling in samplings]

    def _check_ranges(self, step: StepInput) -> None:
        """The indices among the fields; padding is zero and so in range."""
        num_tokens, _, _ = step.counts
        num_places = (self.num_blocks + 1) * self.block_size
        _check_range("token_ids", step.token_ids, end=self.vocab_size)
        _check_range("targets", step.targets, end=self.vocab_size)
        _check_range("block_tables", step.block_tables, end=self.num_blocks + 1)
        # A token whose block was never taken would land in the scratch block.
        _check_range("cache_slots", step.cache_slots[:num_tokens], first=self.block_size, end=num_places)
        _check_range("slots", step.slots, end=self.num_slots)


def _tokens_of(items: tuple[ScheduledTokens, ...], *, ahead: int) -> list[int]:
    """The token `ahead` of each scheduled one; 0 where that is still to be chosen."""
    tokens: list[int] = []
    for item in items:
        first = item.sequence.num_computed_tokens + ahead
        tokens += item.sequence.token_ids[first : first + item.num_tokens]
        if item.reaches_end:
            tokens += (0,) * ahead
    return tokens


def _check_range(name: str, values: NDArray[np.int32], *, end: int, first: int = 0) -> None:
    if values.min() < first or values.max() >= end:
        raise RuntimeError(f"step input {name} holds {values.min()} to {values.max()}, must be {first} to {end - 1}")
