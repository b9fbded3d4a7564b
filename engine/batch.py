"""Batch: a schedule laid out in one packed int32 array, and how the device reads it back.

This is the last file that knows only NumPy. Every array of the step travels in one buffer, because each separate argument of a compiled call
costs time; floats travel as their bits. `pack` and `unpack` use the same `StepLayout`, which also names the compiled shape (the bucket).

Rows are sequences, in the order of the batch: first those whose next token is chosen in this step. Query tiles are runs of up to `TILE` tokens of
one sequence: attention works on one tile at a time.

    tokens of A: 1, of B: 11      token      0 | 1 2 3 4 5 6 7 8 | 9 10 11
                                  tile       0 | 1               | 2
                                  row        0 | 1               | 1
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
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

    def shapes(self) -> StepInput:
        """The shape of every field."""
        t, s, q = (self.num_tokens,), (self.num_seqs,), (self.num_tiles,)
        by_token = dict.fromkeys(("token_ids", "positions", "cache_slots", "token_rows", "is_output", "tile_places", "targets"), t)
        by_tile = dict.fromkeys(("tile_rows", "tile_starts", "tile_ends"), q)
        special = {"counts": (3,), "block_tables": (self.num_seqs, self.blocks_per_seq), "seeds": (self.num_seqs, 2)}
        shapes: dict[str, tuple[int, ...]] = {**by_token, **by_tile, **special}
        return StepInput(**{name: shapes.get(name, s) for name in StepInput._fields})

    @property
    def packed_len(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes())

    def unpack(self, packed: Any, as_float: Callable[[Any], Any]) -> StepInput:
        """Views into `packed` int32 [packed_len], a NumPy or a device array; `as_float` reads int32 bits as float32."""
        fields: list[Any] = []
        start = 0
        for index, shape in enumerate(self.shapes()):
            end = start + int(np.prod(shape))
            field = packed[start:end].reshape(shape)
            fields.append(as_float(field) if index >= FIRST_FLOAT else field)
            start = end
        return StepInput(*fields)


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
    """True if log-probabilities of prompt tokens are still to be sent and this step computes some."""
    sequence = item.sequence
    is_asked = sequence.request.sampling.prompt_logprobs is not None
    return is_asked and sequence.num_scored_tokens < sequence.num_prompt_tokens - 1


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
        items = tuple(sorted(schedule.items, key=lambda item: not chooses_token(item)))
        num_tokens = sum(item.num_tokens for item in items)
        layout = next(each for each in self.layouts if each.num_tokens >= num_tokens and each.num_seqs >= len(items))
        packed = np.zeros(layout.packed_len, np.int32)
        step = layout.unpack(packed, lambda bits: bits.view(np.float32))

        token_starts: list[int] = []
        start = tile = 0
        for row, item in enumerate(items):
            token_starts.append(start)
            tile = self._fill_tokens(step, item, row=row, start=start, tile=tile)
            self._fill_row(step, item, row=row, sample_at=start + item.num_tokens - 1)
            start += item.num_tokens
        num_sampled = sum(chooses_token(item) for item in items)
        step.counts[:] = num_tokens, num_sampled, tile
        self._check_ranges(step)
        return Batch(
            layout=layout,
            kind=step_kind(items),
            packed=packed,
            items=items,
            num_sampled=num_sampled,
            token_starts=tuple(token_starts),
        )

    def _fill_tokens(self, step: StepInput, item: ScheduledTokens, *, row: int, start: int, tile: int) -> int:
        """Write one sequence's tokens and query tiles; returns the next free tile."""
        sequence, first = item.sequence, item.sequence.num_computed_tokens
        end, last = start + item.num_tokens, first + item.num_tokens
        step.token_ids[start:end] = sequence.token_ids[first:last]
        step.token_rows[start:end] = row
        table = step.block_tables[row]
        table[: len(sequence.block_ids)] = sequence.block_ids
        if item.num_tokens == 1:  # most rows of most steps
            step.positions[start] = first
            step.cache_slots[start] = table[first // self.block_size] * self.block_size + first % self.block_size
            step.is_output[start] = first >= sequence.num_prompt_tokens
            step.tile_places[start] = tile * TILE
            if first + 1 < sequence.num_tokens:
                step.targets[start] = sequence.token_ids[first + 1]
        else:
            positions = np.arange(first, last, dtype=np.int32)
            step.positions[start:end] = positions
            step.cache_slots[start:end] = table[positions // self.block_size] * self.block_size + positions % self.block_size
            step.is_output[start:end] = positions >= sequence.num_prompt_tokens
            step.tile_places[start:end] = tile * TILE + np.arange(item.num_tokens)
            following = sequence.token_ids[first + 1 : last + 1]
            step.targets[start : start + len(following)] = following
        for offset in range(0, item.num_tokens, TILE):
            step.tile_rows[tile] = row
            step.tile_starts[tile] = start + offset
            step.tile_ends[tile] = min(first + offset + TILE, last)
            tile += 1
        return tile

    def _fill_row(self, step: StepInput, item: ScheduledTokens, *, row: int, sample_at: int) -> None:
        sequence, sampling = item.sequence, item.sequence.request.sampling
        step.sample_at[row] = sample_at
        step.slots[row] = sequence.slot
        step.sample_positions[row] = sequence.num_tokens
        step.choices[row] = sequence.request.choice
        high, low = divmod(sampling.seed & 0xFFFF_FFFF_FFFF_FFFF, 1 << 32)
        step.seeds[row] = np.array([high, low], np.uint32).view(np.int32)
        step.top_k[row] = min(sampling.top_k, self.vocab_size)
        step.mask_end[row] = sequence.num_output_tokens < sampling.min_tokens
        step.temperature[row] = sampling.temperature
        step.top_p[row] = sampling.top_p
        step.min_p[row] = sampling.min_p
        step.presence_penalty[row] = sampling.presence_penalty
        step.frequency_penalty[row] = sampling.frequency_penalty
        step.repetition_penalty[row] = sampling.repetition_penalty

    def _check_ranges(self, step: StepInput) -> None:
        limits = {
            "token_ids": self.vocab_size,
            "targets": self.vocab_size,
            "block_tables": self.num_blocks + 1,
            "cache_slots": (self.num_blocks + 1) * self.block_size,
            "slots": self.num_slots,
        }
        for name, limit in limits.items():
            values = getattr(step, name)
            if values.min() < 0 or values.max() >= limit:
                raise RuntimeError(f"step input {name} holds {values.min()} to {values.max()}, must be 0 to {limit - 1}")
