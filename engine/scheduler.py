"""Scheduler: who computes how many tokens in this step.

A pure function of its state and of what it is told: no clock, no I/O, no randomness. It spends the step's token budget on running
sequences first (those that need a single token before those that still read their prompt), then on waiting ones, oldest first. Blocks are
taken as tokens need them; when the pool is empty the youngest running sequence is preempted: it gives back all its blocks and
computes again later. The oldest is never preempted, so with work pending every step makes progress.
"""

from collections import deque
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.sequence import Sequence

WATERMARK_SHARE = 0.01  # of the pool's blocks kept free when admitting, against thrashing


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
        self.waiting: deque[Sequence] = deque()  # oldest first
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._watermark = int(pool.num_blocks * WATERMARK_SHARE)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished or was aborted; its blocks and its slot are free at once."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
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
        while self.waiting and budget and self._free_slots and not is_under_pressure:
            sequence = self.waiting[0]
            num_tokens = min(sequence.num_remaining_tokens, budget)
            reserve = self._watermark if self.running else 0
            if self._num_missing_blocks(sequence, num_tokens) > self.pool.num_free - reserve:
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.slot = self._free_slots.pop()
            self._take_blocks(sequence, num_tokens)
            items.append(ScheduledTokens(sequence=sequence, num_tokens=num_tokens))
            admitted.append(sequence)
            budget -= num_tokens
        return Schedule(items=tuple(items), admitted=tuple(admitted))

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
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.block_ids)
        sequence.block_ids.clear()
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        num_needed = -(-(sequence.num_computed_tokens + num_tokens) // self.block_size)
        return num_needed - len(sequence.block_ids)

    def _take_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.block_ids += self.pool.take(self._num_missing_blocks(sequence, num_tokens))
