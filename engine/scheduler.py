"""Scheduler: who computes how many tokens in this step.

A pure function of its state and of what it is told: no clock, no I/O, no randomness. It spends the step's token budget on running
sequences first (those that need a single token before those that still read their prompt), then on waiting ones. What it schedules counts
as computed from then on, so that the next step can be planned before this one has run.

Rank, the order of first admission, is seniority. A sequence takes the blocks of all its tokens when it is admitted and one more whenever
these are full. When the pool is empty the running sequence of the highest rank is preempted: it gives back all its blocks, waits before
everybody else, and computes again what the prefix cache has lost by then. Three consequences:

- Every preempted sequence is younger than every running one: the youngest gives way, nobody new comes in while a preempted one waits, and
  these are admitted oldest first. So `running` stays sorted by appending, and the preempted ones are a stack.
- The oldest never gives way, so with work pending every step makes progress. Only single tokens take blocks while running, and they are
  scheduled in order of rank, so who gives way has nothing scheduled in this step that others may already count on.
- Preemptions of one sequence are bounded. One that gave way `MAX_PREEMPTIONS` times is admitted only when the pool holds all that it and
  the running sequences may ever need. All its elders are among these, so once its juniors have given way, nobody can lack a block.

Slots and blocks go from one tenant to another as `fair_queue` has it. Where those whose turn it is lack either, the youngest of who may be
asked yield: they queue again as newcomers of the same age, and find what they computed in the prefix cache when they come back. So do the
preempted ones, if all may be asked. The oldest never yields, and no sequence more than `MAX_YIELDS` times.
"""

from dataclasses import dataclass
from typing import NamedTuple

from engine.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.fair_queue import FairQueue
from engine.prefix_cache import PrefixCache
from engine.sequence import Sequence

WATERMARK_SHARE = 0.01  # of the pool's blocks kept free when admitting, against thrashing
MAX_PREEMPTIONS = 3  # of one sequence
MAX_YIELDS = 3  # of one sequence


class ScheduledTokens(NamedTuple):
    """`num_tokens` tokens of one sequence. It says all that the step's result is read by, because the sequence itself moves on.

    A tuple, not a dataclass: hundreds are made in every step, at a third of the cost.
    """

    sequence: Sequence
    start: int  # position of the first one
    num_tokens: int
    chooses_token: bool  # the step's result gives the token after the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step's work."""

    items: tuple[ScheduledTokens, ...]
    admitted: tuple[Sequence, ...]  # have a new slot, whose state on the device must be reset before the step


class Scheduler:
    """Owns the queues, the slots and, through the pool, every sequence's blocks."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, cache: PrefixCache, *, block_size: int):
        self.config = config
        self.pool = pool
        self.cache = cache
        self.block_size = block_size
        self.running: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self._preempted: list[Sequence] = []  # by rank, the oldest last
        # No more than the budget has tokens: whoever needs a single one gets it in every step.
        num_slots = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._free_slots = list(reversed(range(num_slots)))
        self._newcomers = FairQueue(num_slots=num_slots, num_cache_tokens=pool.num_blocks * block_size)
        self._num_ranks = 0
        self._refusal: tuple[Sequence, int] | None = None  # who found too few blocks last, and how many
        self._watermark = int(pool.num_blocks * WATERMARK_SHARE)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The preempted ones by rank, then the newcomers of each tenant in their order."""
        return *reversed(self._preempted), *self._newcomers

    @property
    def num_waiting(self) -> int:
        return len(self._preempted) + len(self._newcomers)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._preempted or self._newcomers)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._newcomers.add(sequence)

    def remove(self, sequence: Sequence, *, discard: bool = False) -> None:
        """Forget a sequence that finished or was aborted; its blocks and its slot are free at once.

        With `discard` the prefix cache forgets its blocks, too: their numbers are not to be trusted.
        """
        self._refusal = None
        if sequence.rank is None:
            self._newcomers.remove(sequence)
        else:
            self._newcomers.settle(sequence)
            if sequence.slot is None:
                self._preempted.remove(sequence)
            else:
                self.running.remove(sequence)
                self._release(sequence)
        if discard:
            self.cache.forget(sequence)

    def schedule(self) -> Schedule:
        """Choose this step's tokens, give every chosen sequence the blocks they need, and count the tokens as computed."""
        preemptions_before = self.num_preemptions
        heirs = self._make_way()
        items, readers = self._go_on()
        budget = self.config.max_num_batched_tokens - len(items)
        for sequence in readers:
            if not budget:
                break
            budget -= self._read(sequence, budget, items)
        # Who gave way in this pass may come back in the next one, but not before its pending token is known.
        admitted = self._admit(budget, items, heirs) if self.num_preemptions == preemptions_before else []
        return Schedule(items=tuple(items), admitted=tuple(admitted))

    def _make_way(self) -> list[Sequence]:
        """Where those whose turn it is lack a slot or blocks, let others yield theirs; returns who may come in then."""
        if not len(self._newcomers) or not self.running:
            return []
        self._newcomers.advance_clock()
        heirs, spare = self._newcomers.exchange()
        if not heirs:
            return []
        if self._preempted and spare and self._queue_preempted(spare, heirs[0].request.tenant):
            heirs, spare = self._newcomers.exchange()
        able = [each for each in self.running[1:] if each in spare and each.num_yields < MAX_YIELDS and not _awaits_host(each)]
        if not able or self._preempted:
            return []
        served: list[Sequence] = []
        num_running = len(self.running)
        budget = self._budget_left(without=set(able))
        num_needed = 0  # blocks, for those served
        num_able = sum(len(each.block_ids) for each in able)  # blocks, perhaps fewer: some are shared
        for heir in heirs:
            num_available = self.pool.num_free + num_able
            if budget <= 0 or heir.num_preemptions >= MAX_PREEMPTIONS or heir.num_pending_tokens or self._is_refused(heir, num_available):
                break
            num_needed += self._num_blocks_needed(heir)
            if num_needed > num_available - self._watermark:
                if not served:
                    self._refuse(heir, num_available)
                break
            served.append(heir)
            budget -= heir.num_tokens
            while able and not (len(served) <= len(self._free_slots) and num_needed <= self._num_spare_blocks()):
                num_able -= len(able[-1].block_ids)
                self._yield(able.pop())
        return served if len(self.running) < num_running else []

    def _queue_preempted(self, spare: set[Sequence], tenant: str) -> bool:
        """Let the preempted ones wait for their tenants' turns, if all are spare or of the tenant whose turn it is."""
        if not all(each.num_yields < MAX_YIELDS and (each in spare or each.request.tenant == tenant) for each in self._preempted):
            return False
        while self._preempted:
            self._yield(self._preempted[0])
        return True

    def _budget_left(self, *, without: set[Sequence]) -> int:
        """Tokens of a step that the others do not want. Where they want all, a slot that is freed would stay empty."""
        return self.config.max_num_batched_tokens - sum(each.num_remaining_tokens for each in self.running if each not in without)

    def _num_blocks_needed(self, sequence: Sequence) -> int:
        """To admit it, besides those that others hold."""
        return self._num_blocks(sequence.num_tokens) - sum(self.pool.is_held(block) for block in self.cache.lookup(sequence))

    def _num_spare_blocks(self) -> int:
        return self.pool.num_free - self._watermark

    def _yield(self, sequence: Sequence) -> None:
        """Back into the queue of its tenant."""
        if sequence.slot is None:
            self._preempted.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)
        sequence.rank = None
        self._newcomers.take_back(sequence)

    def _go_on(self) -> tuple[list[ScheduledTokens], list[Sequence]]:
        """Schedule every sequence that needs a single token; returns also those that need more.

        This loop runs over every sequence in every step, hence no calls in it that a comparison can spare.
        """
        items: list[ScheduledTokens] = []
        readers: list[Sequence] = []
        block_size = self.block_size
        for sequence in self.running:  # the loop body removes at the end of the list only
            start = sequence.num_computed_tokens
            num_pending = sequence.num_pending_tokens
            num_remaining = len(sequence.token_ids) + num_pending - start
            if num_remaining != 1:
                if num_remaining > 1:
                    readers.append(sequence)
                continue
            if num_pending and (sequence.needs_host or start + 1 >= sequence.max_len):
                continue
            if start == len(sequence.block_ids) * block_size and not self._extend(sequence):
                break
            chooses_token = num_pending > 0 or sequence.request.sampling.max_tokens > 0
            sequence.num_computed_tokens = start + 1
            sequence.num_pending_tokens = num_pending + chooses_token
            items.append(ScheduledTokens(sequence, start, 1, chooses_token))
        return items, readers

    def _extend(self, sequence: Sequence) -> bool:
        """Register its last block, which is full, and take another one, preempting the youngest; False if that was `sequence` itself."""
        self._register_last_block(sequence)
        while not self.pool.num_free:
            youngest = self.running.pop()
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.block_ids.extend(self.pool.take(1))
        return True

    def _read(self, sequence: Sequence, budget: int, items: list[ScheduledTokens]) -> int:
        """Schedule as much of what it has left as the budget allows; returns how much that is."""
        start = sequence.num_computed_tokens
        num_tokens = min(sequence.num_tokens - start, budget)
        reaches_end = start + num_tokens == sequence.num_tokens
        chooses_token = reaches_end and sequence.request.sampling.max_tokens > 0
        sequence.num_computed_tokens = start + num_tokens
        sequence.num_pending_tokens += chooses_token
        # At once: a step writes all its keys and values before it reads any, so the next one admitted may share these blocks.
        self.cache.insert(sequence, start=start)
        items.append(ScheduledTokens(sequence, start, num_tokens, chooses_token))
        return num_tokens

    def _admit(self, budget: int, items: list[ScheduledTokens], heirs: list[Sequence]) -> list[Sequence]:
        """Let in who waits while there is room, or only the heirs that slots were freed for; nobody overtakes one that does not fit yet."""
        admitted: list[Sequence] = []
        candidates = iter(heirs) if heirs else iter(self._next, None)
        while budget and self._free_slots and (sequence := next(candidates, None)):
            if sequence.num_pending_tokens or self._is_refused(sequence, self.pool.num_free):
                break
            hit = self.cache.lookup(sequence)
            if self._is_being_scored(sequence, len(hit)):
                break
            if not self._fits(sequence, hit):
                self._refuse(sequence, self.pool.num_free)
                break
            self._start(sequence, hit)
            budget -= self._read(sequence, budget, items)
            admitted.append(sequence)
        return admitted

    def _is_being_scored(self, sequence: Sequence, num_found: int) -> bool:
        """The next block that this scored prompt lacks is computed for another one, and will be found with its scores in a step or two."""
        if sequence.score_collector is None or len(sequence.block_keys) <= num_found:
            return False
        key, end = sequence.block_keys[num_found], (num_found + 1) * self.block_size
        return any(
            other.block_keys[num_found : num_found + 1] == [key] and other.num_scored_tokens < min(end, other.num_prompt_tokens - 1)
            for other in self.running
            if other.score_collector is not None
        )

    def _next(self) -> Sequence | None:
        return self._preempted[-1] if self._preempted else self._newcomers.head()

    def _fits(self, sequence: Sequence, hit: list[int]) -> bool:
        """Whether the pool has room for all its tokens so far, not only for this step's."""
        if not self.running:
            return True
        if sequence.num_preemptions < MAX_PREEMPTIONS:
            num_found = sum(self.pool.is_held(block) for block in hit)
            return self._num_blocks(sequence.num_tokens) - num_found <= self.pool.num_free - self._watermark
        return sum(self._num_blocks(each.max_len) for each in (*self.running, sequence)) <= self.pool.num_blocks

    def _is_refused(self, sequence: Sequence, num_available: int) -> bool:
        """It had no room among as many blocks before: to look up a long prompt in every step takes longer than the rest of the step.

        One that is found to share more meanwhile comes in when the next block is free.
        """
        if self._refusal is None or not self.running:
            return False
        refused, num_found = self._refusal
        return sequence is refused and num_available <= num_found

    def _refuse(self, sequence: Sequence, num_available: int) -> None:
        if sequence.num_preemptions < MAX_PREEMPTIONS:  # the others wait for sequences, not for blocks
            self._refusal = sequence, num_available

    def _start(self, sequence: Sequence, hit: list[int]) -> None:
        """Give it a slot and the blocks of all its tokens; those found are computed already."""
        self._refusal = None
        num_tokens = sequence.num_tokens
        self.pool.share(hit)
        sequence.block_ids.extend(hit)
        sequence.block_ids.extend(self.pool.take(self._num_blocks(num_tokens) - len(hit)))
        sequence.slot = self._free_slots.pop()
        sequence.num_shared_tokens = len(hit) * self.block_size
        # The last token is computed in any case: its result is the next token.
        sequence.num_computed_tokens = min(sequence.num_shared_tokens, num_tokens - 1)
        sequence.cached_scores = self.cache.scores(sequence, len(hit))
        self.running.append(sequence)
        if sequence.rank is not None:
            self._preempted.pop()
            return
        self._newcomers.admit(sequence)
        sequence.rank = self._num_ranks
        self._num_ranks += 1
        if not sequence.num_yields:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            self.cache.count(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take back slot and blocks, keeping for the cache what is full. `cached_scores` stay: a launched step may still ask for them."""
        self._register_last_block(sequence)
        self.pool.give_back(sequence.block_ids)
        del sequence.block_ids[:]
        assert sequence.slot is not None, "a running sequence has a slot"
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.num_computed_tokens = 0
        sequence.num_shared_tokens = 0

    def _register_last_block(self, sequence: Sequence) -> None:
        """All its blocks before that of the newest token are registered; shared ones by others, who may have withdrawn them since."""
        self.cache.insert(sequence, start=max(sequence.num_shared_tokens, sequence.num_computed_tokens - self.block_size))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _awaits_host(sequence: Sequence) -> bool:
    """Its next choice takes long to prepare. Were it to yield now, it could not come in again before that, nor could those behind it."""
    return sequence.needs_host and sequence.num_pending_tokens > 0
