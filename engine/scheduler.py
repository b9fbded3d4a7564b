"""Scheduler: who computes how many tokens in this step.

A pure function of its state and of what it is told: no clock, no I/O, no randomness. It spends the step's token budget on running
sequences first (those that need a single token before those that still read their prompt), then on waiting ones, oldest first. Blocks are
taken as tokens need them; when the pool is empty the youngest running sequence is preempted: it gives back all its blocks and
computes again later. The oldest is never preempted, so with work pending every step makes progress.

Nobody overtakes in the queue, so every running sequence is older than every waiting one. That bounds preemption: a sequence that was
preempted `MAX_PREEMPTIONS` times is admitted once the pool holds all that it and its elders may ever need, and who comes later goes first.
"""

from collections import OrderedDict
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.sequence import Sequence

WATERMARK_SHARE = 0.01  # of the pool's blocks kept free when admitting, against thrashing
MAX_PREEMPTIONS = 3  # of one sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTokens:
    """`num_tokens` tokens of one sequence, starting at its `num_computed_tokens`."""

    sequence: Sequence
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """True if the next token can be chosen after this step."""
        return self.num_tokens == self.sequence.num_remaining_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step's work."""

    items: tuple[ScheduledTokens, ...]
    admitted: tuple[Sequence, ...]  # have a new slot, whose state on the device must be reset before the step


class Scheduler:
    """Owns the queues, the slots and, through the pool, every sequence's blocks."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, *, block_size: int):
        self.config = config
        self.pool = pool
        self.block_size = block_size
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()  # by arrival, oldest first; anyone can leave at once
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._watermark = int(pool.num_blocks * WATERMARK_SHARE)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Oldest first."""
        return tuple(self._waiting.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others."""
        self._waiting[sequence.arrival] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished or was aborted; its blocks and its slot are free at once."""
        if sequence.slot is None:
            del self._waiting[sequence.arrival]
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def schedule(self) -> Schedule:
        """Choose this step's tokens and give every chosen sequence the blocks they need."""
        budget = self.config.max_num_batched_tokens
        items: list[ScheduledTokens] = []
        preemptions_before = self.num_preemptions
        for sequence in sorted(self.running, key=lambda running: running.num_remaining_tokens > 1):
            if sequence.slot is None:  # preempted in favour of an older one in this very loop
                continue
            num_tokens = min(sequence.num_remaining_tokens, budget)
            if num_tokens and self._make_room(sequence, num_tokens, items):
                items.append(ScheduledTokens(sequence=sequence, num_tokens=num_tokens))
                budget -= num_tokens

        admitted: list[Sequence] = []
        is_under_pressure = self.num_preemptions > preemptions_before
        while self._waiting and budget and self._free_slots and not is_under_pressure:
            sequence = next(iter(self._waiting.values()))
            if not self._can_admit(sequence):
                break
            del self._waiting[sequence.arrival]
            self.running.append(sequence)
            sequence.slot = self._free_slots.pop()
            num_tokens = min(sequence.num_remaining_tokens, budget)
            self._take_blocks(sequence, num_tokens)
            items.append(ScheduledTokens(sequence=sequence, num_tokens=num_tokens))
            admitted.append(sequence)
            budget -= num_tokens
        return Schedule(items=tuple(items), admitted=tuple(admitted))

    def _can_admit(self, sequence: Sequence) -> bool:
        """Whether all its tokens so far would fit, not only this step's: it would be preempted halfway and compute them in vain."""
        if not self.running:
            return True
        if sequence.num_preemptions < MAX_PREEMPTIONS:
            return self._num_missing_blocks(sequence, sequence.num_tokens) <= self.pool.num_free - self._watermark
        return sum(self._num_blocks(each.max_len) for each in (*self.running, sequence)) <= self.pool.num_blocks

    def _make_room(self, sequence: Sequence, num_tokens: int, items: list[ScheduledTokens]) -> bool:
        """Take the missing blocks, preempting the youngest while there are too few; False if that was `sequence` itself."""
        while self._num_missing_blocks(sequence, num_tokens) > self.pool.num_free:
            youngest = self.running[-1]
            items[:] = [item for item in items if item.sequence is not youngest]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._take_blocks(sequence, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting[sequence.arrival] = sequence
        self._waiting.move_to_end(sequence.arrival, last=False)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.block_ids)
        del sequence.block_ids[:]
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to take before the next `num_tokens` tokens have their places."""
        return self._num_blocks(sequence.num_computed_tokens + num_tokens) - len(sequence.block_ids)

    def _take_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        if count := self._num_missing_blocks(sequence, num_tokens):
            sequence.block_ids.extend(self.pool.take(count))
