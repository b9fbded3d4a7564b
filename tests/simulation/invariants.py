"""What must hold in the simulated world, checked after every event.

`EngineChecks` watches one engine process from outside: what it was asked, what it says, and between the turns the books of core, scheduler,
pool and prefix cache. `ListenerChecks` watches one client: what it is told must be the beginning of what the same request gets in an engine
of its own, and it must end once, for a reason that is there.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass

from scripted_runner import ScriptedRunner, check_conservation, expected

from engine.batch import Batch
from engine.core import EngineCore
from engine.fair_queue import FairQueue
from engine.messages import Abort, Deltas, FromEngine, Refused, Submit
from engine.scheduler import MAX_PREEMPTIONS, MAX_YIELDS
from engine.sequence import Sequence
from engine.types import FinishReason, GenerationRequest, TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """What a turn is compared with."""

    has_work: bool
    num_batches: int
    running: list[Sequence]
    oldest: Sequence | None
    num_open_tokens: int | None  # if the clock of fairness is looked at
    ranked: list[tuple[Sequence, int | None, int]]  # with rank and number of yields
    due: list[Sequence]  # running and in need of a single token, which they get in every step


class EngineChecks:
    """Told of every message and every turn of one engine."""

    def __init__(self, core: EngineCore, runner: ScriptedRunner, *, gone_s: Mapping[str, float], patience_s: float) -> None:
        self._core = core
        self._runner = runner
        self._gone_s = gone_s  # when the clients got the ends of their requests
        self._patience_s = patience_s  # within which an engine has heard of it
        self._open: dict[str, GenerationRequest] = {}  # submitted, and neither ended nor aborted
        self._aborted: set[str] = set()
        self._num_found: dict[str, int] = {}  # prompt tokens that were there when its first step came
        self._num_looked_up = 0  # prompt tokens of these
        self._num_preemptions: dict[str, int] = {}
        self._sequences: dict[str, Sequence] = {}  # of the submitted ones
        self._before = _Before(has_work=False, num_batches=0, running=[], oldest=None, num_open_tokens=None, ranked=[], due=[])
        self._num_idle_turns = 0
        self._clock = 0  # of fairness

    def submitted(self, message: Submit) -> None:
        assert message.request.request_id not in self._open, "a request was submitted twice"
        self._open[message.request.request_id] = message.request
        if (sequence := self._core._sequences.get(message.request.request_id)) is not None:
            self._sequences[message.request.request_id] = sequence
        check_books(self._core)

    def aborted(self, message: Abort) -> None:
        """What is aborted has left the core when the next step begins."""
        self._open.pop(message.request_id, None)
        self._aborted.add(message.request_id)
        sequences = (*self._core.scheduler.running, *self._core.scheduler.waiting)
        assert all(sequence.request.request_id != message.request_id for sequence in sequences), "an aborted sequence is still there"
        check_books(self._core)

    def before_turn(self) -> None:
        latest_s = self._core.clock() - self._patience_s - 1e-9
        assert all(self._gone_s.get(request_id, math.inf) > latest_s for request_id in self._open), "work for a client who is gone"
        running, queue = self._core.scheduler.running, self._core.scheduler._newcomers
        ranked = [each for each in (*running, *self._core.scheduler.waiting) if each.rank is not None]
        oldest = min(ranked, key=lambda sequence: sequence.rank or 0, default=None)
        self._before = _Before(
            has_work=self._core.has_work,
            num_batches=len(self._runner.batches),
            running=list(running),
            oldest=oldest,
            num_open_tokens=num_open_tokens(queue) if running and len(queue) else None,
            ranked=[(each, each.rank, each.num_yields) for each in ranked],
            due=[sequence for sequence in running if _is_due(sequence)],
        )

    def after_turn(self, said: List[FromEngine]) -> None:
        core, before = self._core, self._before
        batches = self._runner.batches[before.num_batches :]
        for batch in batches:
            assert sum(item.num_tokens for item in batch.items) <= core.config.scheduler.max_num_batched_tokens, "a step is over its budget"
            assert all(item.sequence.request.request_id in self._open for item in batch.items), "a step computes what nobody asked for"
            self._look_up(batch)
        gave_way = [sequence for sequence in before.running if sequence.slot is None and not sequence.is_over]
        for sequence in gave_way:
            if sequence.rank is not None:
                self._count_preemption(sequence)
        for sequence, rank, num_yields in before.ranked:  # who yielded is nobody's elder any more
            assert sequence.num_yields == num_yields + (sequence.rank != rank), "a yield was not counted"
            assert sequence.num_yields <= MAX_YIELDS, "yielded too often"
        for sequence in before.running:  # and got its last token in the same turn
            if sequence.is_over and sequence.num_preemptions:
                self._num_preemptions[sequence.request.request_id] = sequence.num_preemptions
        stepped = [item.sequence for batch in batches for item in batch.items]
        assert all(each in stepped or each in gave_way or each.is_over for each in before.due), "a running sequence was passed over"
        assert before.oldest not in gave_way, "the oldest gave way"
        deltas = [delta for message in said if isinstance(message, Deltas) for delta in message.deltas]
        self._check_clock(has_expired=any(delta.finish_reason is FinishReason.DEADLINE for delta in deltas))
        num_deltas = 0
        for message in said:
            match message:
                case Deltas(deltas=deltas):
                    num_deltas += len(deltas)
                    for delta in deltas:
                        self._said(delta)
                case Refused(request_id=request_id):
                    assert request_id in self._open or request_id in self._aborted, "a request was refused that was never there"
                    self._open.pop(request_id, None)
        is_idle = before.has_work and not num_deltas and not batches
        self._num_idle_turns = self._num_idle_turns + 1 if is_idle else 0
        assert self._num_idle_turns < 2, "no progress: two turns in a row neither computed nor told anything"
        now_s = core.clock()
        assert all(each.deadline_s is None or each.deadline_s > now_s for each in self._open.values()), "a deadline was passed over"
        check_books(core)

    def check_idle(self) -> None:
        """Nothing is left when all have ended."""
        stats = self._core.stats()
        assert not self._open, f"never ended: {list(self._open)}"
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0), f"an idle engine holds something: {stats}"
        assert not self._core.has_work
        assert stats.num_steps == len(self._runner.batches), "another number of steps was launched than is told"
        assert stats.num_hit_tokens == sum(self._num_found.values()), "another number of tokens was found than is told"
        assert stats.num_lookup_tokens == self._num_looked_up, "another number of tokens was looked up than is told"
        assert stats.num_preemptions == sum(self._num_preemptions.values()), "another number of preemptions happened than is told"
        tenants = self._core.scheduler._newcomers._tenants.values()
        assert not any(tenant.admitted for tenant in tenants), "a tenant is charged for what has ended"

    def _said(self, delta: TokenDelta) -> None:
        assert delta.request_id in self._open, "a delta after the end, after an abort, or of nobody's request"
        assert delta.num_cached_tokens == self._num_found.get(delta.request_id, 0), "another number of tokens was cached than is told"
        if delta.finish_reason is FinishReason.ERROR:
            self._check_forgotten(self._sequences[delta.request_id])
        if delta.finish_reason is not None:
            del self._open[delta.request_id]

    def _check_clock(self, *, has_expired: bool) -> None:
        """Under equal sharing the tenants would still have to get what they really had to get before this turn."""
        queue = self._core.scheduler._newcomers
        assert queue._clock >= self._clock, "the clock of fairness went back"
        self._clock = queue._clock
        if self._before.num_open_tokens is not None and not has_expired:  # perhaps all that waited
            tenants = queue._tenants.values()
            num_ahead = sum(max(0, tenant.finish - queue._clock) for tenant in tenants)
            num_unforeseen = 2 * self._core.config.scheduler.max_num_seqs  # received since, and charged
            assert num_ahead <= self._before.num_open_tokens + len(tenants) + num_unforeseen, "the clock of fairness is slow"

    def _look_up(self, batch: Batch) -> None:
        """A sequence's first step begins behind what was found of it."""
        for item in batch.items:
            request = item.sequence.request
            if request.request_id not in self._num_found:
                self._num_found[request.request_id] = min(item.start, len(request.prompt_token_ids))
                self._num_looked_up += len(request.prompt_token_ids)

    def _count_preemption(self, sequence: Sequence) -> None:
        counts = self._num_preemptions
        count = counts[sequence.request.request_id] = counts.get(sequence.request.request_id, 0) + 1
        assert count == sequence.num_preemptions, "a preemption was not counted"
        assert count <= MAX_PREEMPTIONS, "preempted too often"

    def _check_forgotten(self, failed: Sequence) -> None:
        """Nobody finds what a failed sequence computed, unless a companion that computes the same has not failed yet, or just left."""
        others = (*self._before.running, *self._core.scheduler.running, *self._core.scheduler.waiting)
        companions = [each for each in others if each is not failed and each.block_keys[:1] == failed.block_keys[:1]]
        assert companions or not any(key in self._core.cache._entries for key in failed.block_keys), "what failed can still be found"


def _is_due(sequence: Sequence) -> bool:
    """It needs one token more, and nothing keeps the engine from computing it now."""
    is_last = sequence.num_tokens >= sequence.max_len
    return sequence.num_remaining_tokens == 1 and not (sequence.num_pending_tokens and (sequence.needs_host or is_last))


def check_books(core: EngineCore) -> None:
    """Queues, slots, blocks and their reference counts."""
    check_conservation(core)
    holders: dict[int, int] = {}
    for sequence in core.scheduler.running:
        for block in sequence.block_ids:
            holders[block] = holders.get(block, 0) + 1
    assert core.pool._num_holders == holders, "a reference count is not the number of holders"
    assert core.pool._kept == core.cache._keys.keys(), "pool and prefix cache disagree on what is kept"
    assert len(core.cache._entries) == len(core.cache._keys), "two entries of the prefix cache share a block"
    check_accounts(core.scheduler._newcomers)


def check_accounts(queue: FairQueue) -> None:
    """What waits is what tenants pay for."""
    for tenant in queue._tenants.values():
        size = sum(each.num_foreseen_tokens - each.num_paid_tokens for _, _, each in tenant.waiting)
        assert tenant.backlog == size, "a tenant's backlog is not what it has waiting"


def num_open_tokens(queue: FairQueue) -> int:
    """What all tenants together still have to get."""
    tenants = queue._tenants.values()
    admitted = (each for tenant in tenants for each in tenant.admitted)
    return sum(tenant.backlog for tenant in tenants) + sum(max(0, each.num_foreseen_tokens - each.num_tokens) for each in admitted)


class ListenerChecks:
    """One request as its client sees it."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._expected = expected(request)
        self.num_tokens = 0
        self.num_scores = 0
        self.has_ended = False

    def take(self, delta: TokenDelta, *, now_s: float) -> None:
        """The next piece, which must be the next piece of the solo run."""
        assert not self.has_ended, "a delta after the last one"
        assert delta.request_id == self._request.request_id, "someone else's delta"
        if self._expected.finish_reason is FinishReason.ERROR:
            assert not delta.token_ids, "a token of logits that are not finite"
            assert all(math.isfinite(score.logprob) for score in delta.prompt_logprobs), "a score that is not finite"
        else:
            self._compare(delta)
        if delta.finish_reason is not None:
            self.has_ended = True
            self._check_end(delta.finish_reason, now_s=now_s)

    def _compare(self, delta: TokenDelta) -> None:
        wanted = self._expected
        tokens = slice(self.num_tokens, self.num_tokens + len(delta.token_ids))
        scores = slice(self.num_scores, self.num_scores + len(delta.prompt_logprobs))
        assert delta.token_ids == wanted.token_ids[tokens], f"told {delta.token_ids} as tokens {tokens} of {wanted.token_ids}"
        assert delta.logprobs == (wanted.logprobs[tokens] if wanted.logprobs else ()), "other log-probabilities than alone"
        assert delta.prompt_logprobs == wanted.prompt_logprobs[scores], "other prompt scores than alone"
        self.num_tokens, self.num_scores = tokens.stop, scores.stop

    def _check_end(self, reason: FinishReason, *, now_s: float) -> None:
        wanted = self._expected
        if reason is FinishReason.DEADLINE:
            assert self._request.deadline_s is not None, "a deadline nobody set"
            assert self._request.deadline_s <= now_s, "ended before its deadline"
            return
        assert reason is wanted.finish_reason, f"ended by {reason}, alone by {wanted.finish_reason}"
        if reason is not FinishReason.ERROR:
            assert (self.num_tokens, self.num_scores) == (len(wanted.token_ids), len(wanted.prompt_logprobs)), "ended too early"
