"""What must hold in the simulated world, checked after every event.

`EngineChecks` watches one engine process from outside: what it was asked, what it says, and between the turns the books of core, scheduler,
pool and prefix cache. `ListenerChecks` watches one client: what it is told must be the beginning of what the same request gets in an engine
of its own, and it must end once, for a reason that is there.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as List

from scripted_runner import ScriptedRunner, check_conservation, expected

from engine.core import EngineCore
from engine.messages import Abort, Deltas, FromEngine, Refused, Submit
from engine.scheduler import MAX_PREEMPTIONS
from engine.sequence import Sequence
from engine.types import FinishReason, GenerationRequest, TokenDelta


class EngineChecks:
    """Told of every message and every turn of one engine."""

    def __init__(self, core: EngineCore, runner: ScriptedRunner, *, gone_s: Mapping[str, float], patience_s: float) -> None:
        self._core = core
        self._runner = runner
        self._gone_s = gone_s  # when the clients got the ends of their requests
        self._patience_s = patience_s  # within which an engine has heard of it
        self._open: dict[str, GenerationRequest] = {}  # submitted, and neither ended nor aborted
        self._aborted: set[str] = set()
        self._num_cached: dict[str, int] = {}  # as the first delta said
        self._before: tuple[bool, int, list[tuple[Sequence, int]]] = (False, 0, [])
        self._num_idle_turns = 0

    def submitted(self, message: Submit) -> None:
        assert message.request.request_id not in self._open, "a request was submitted twice"
        self._open[message.request.request_id] = message.request
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
        ranked = [each for each in (*self._core.scheduler.running, *self._core.scheduler.waiting) if each.rank is not None]
        oldest = [min(ranked, key=lambda sequence: sequence.rank or 0)] if ranked else []
        self._before = self._core.has_work, len(self._runner.batches), [(each, each.num_preemptions) for each in oldest]

    def after_turn(self, said: List[FromEngine]) -> None:
        had_work, num_batches, oldest = self._before
        core = self._core
        for batch in self._runner.batches[num_batches:]:
            assert sum(item.num_tokens for item in batch.items) <= core.config.scheduler.max_num_batched_tokens, "a step is over its budget"
            assert all(item.sequence.request.request_id in self._open for item in batch.items), "a step computes what nobody asked for"
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
        is_idle = had_work and not num_deltas and len(self._runner.batches) == num_batches
        self._num_idle_turns = self._num_idle_turns + 1 if is_idle else 0
        assert self._num_idle_turns < 2, "no progress: two turns in a row neither computed nor told anything"
        assert all(each.num_preemptions == count for each, count in oldest), "the oldest gave way"
        now_s = core.clock()
        assert all(each.deadline_s is None or each.deadline_s > now_s for each in self._open.values()), "a deadline was passed over"
        check_books(core)

    def check_idle(self) -> None:
        """Nothing is left when all have ended."""
        stats = self._core.stats()
        assert not self._open, f"never ended: {list(self._open)}"
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0), f"an idle engine holds something: {stats}"
        assert not self._core.has_work
        assert stats.num_hit_tokens <= stats.num_lookup_tokens

    def _said(self, delta: TokenDelta) -> None:
        assert delta.request_id in self._open, "a delta after the end, after an abort, or of nobody's request"
        num_prompt = len(self._open[delta.request_id].prompt_token_ids)
        assert 0 <= delta.num_cached_tokens <= num_prompt, "more tokens were cached than the prompt has"
        if delta.token_ids or delta.prompt_logprobs:
            first = self._num_cached.setdefault(delta.request_id, delta.num_cached_tokens)
            assert delta.num_cached_tokens == first, "the number of cached tokens changed"
        if delta.finish_reason is not None:
            del self._open[delta.request_id]


def check_books(core: EngineCore) -> None:
    """Queues, slots, blocks and their reference counts."""
    check_conservation(core)
    holders: dict[int, int] = {}
    for sequence in core.scheduler.running:
        assert sequence.num_preemptions <= MAX_PREEMPTIONS, "preempted too often"
        for block in sequence.block_ids:
            holders[block] = holders.get(block, 0) + 1
    assert core.pool._num_holders == holders, "a reference count is not the number of holders"
    assert core.pool._kept == core.cache._keys.keys(), "pool and prefix cache disagree on what is kept"
    assert len(core.cache._entries) == len(core.cache._keys), "two entries of the prefix cache share a block"


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
