"""EngineCore: the step loop and the owner of all mutable state of the engine.

Runs in the engine process, on one thread. A step: schedule, run, emit. It deals in token ids only and gets its runner handed in, so this
file and everything under it start without jax.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from engine.batch import Batch, Batcher, StepLayout
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.scheduler import ScheduledTokens, Scheduler
from engine.sequence import Sequence
from engine.stop import end_token_ids, finish_reason, is_past_deadline
from engine.types import EngineInfo, EngineStats, FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprob


class Runner(Protocol):
    """What the core needs of a model: see `engine/runner.py`."""

    layouts: tuple[StepLayout, ...]
    num_late_compilations: int

    def reset_slot(self, slot: int, sampling: SamplingParams, end_token_ids: tuple[int, ...]) -> None: ...
    def launch(self, batch: Batch) -> Any: ...
    def collect(self, output: Any) -> Any: ...


class EngineCore:
    """Sequences come in by `submit`, leave by finishing or by `abort`, and advance by `step`."""

    def __init__(self, config: EngineConfig, runner: Runner, info: EngineInfo, *, clock: Callable[[], float] = time.monotonic):
        self.info = info
        self.config = config
        self.runner = runner
        self.clock = clock
        self.pool = BlockPool(config.cache.num_blocks)
        self.scheduler = Scheduler(config.scheduler, self.pool, block_size=config.cache.block_size)
        self.batcher = Batcher(
            runner.layouts,
            block_size=config.cache.block_size,
            num_blocks=config.cache.num_blocks,
            vocab_size=config.model.vocab_size,
            num_slots=config.scheduler.max_num_seqs,
        )
        self._sequences: dict[str, Sequence] = {}
        self._next_deadline_s = math.inf  # nobody's deadline is earlier
        self._num_arrivals = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `RequestError` for one that could never run."""
        self._check(request)
        sequence = Sequence(request=request, arrival=self._num_arrivals, token_ids=list(request.prompt_token_ids))
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        if request.deadline_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request; its blocks are free at once. Unknown ids have just finished and are no error."""
        if sequence := self._sequences.pop(request_id, None):
            self.scheduler.remove(sequence)

    def step(self) -> list[TokenDelta]:
        """Advance every scheduled sequence; returns what became known. Raises `RuntimeError` if work is pending and none can be done."""
        deltas = self._expire()
        schedule = self.scheduler.schedule()
        if not schedule.items:
            if self.has_work:
                raise RuntimeError(f"nothing can be computed: {self.stats()}")
            return deltas
        for sequence in schedule.admitted:
            self._reset_slot(sequence)
        batch = self.batcher.build(schedule)
        output = self.runner.collect(self.runner.launch(batch))
        self._num_steps += 1
        return deltas + [delta for row, item in enumerate(batch.items) if (delta := self._commit(batch, output, row, item))]

    def stats(self) -> EngineStats:
        """Gauges and totals as of now."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_blocks_used=self.pool.num_held,
            num_blocks=self.pool.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_late_compilations=self.runner.num_late_compilations,
        )

    def _check(self, request: GenerationRequest) -> None:
        num_prompt, num_output = len(request.prompt_token_ids), request.sampling.max_tokens
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id} is already running")
        if not num_prompt:
            raise RequestError("the prompt has no tokens")
        vocab_size, sampling = self.config.model.vocab_size, request.sampling
        fields = {"prompt": request.prompt_token_ids, "stop_token_ids": sampling.stop_token_ids, "logit_bias": sampling.logit_bias}
        for name, ids in fields.items():
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise RequestError(f"{name} holds token ids from {min(ids)} to {max(ids)}, the vocabulary has 0 to {vocab_size - 1}")
        limit = min(self.config.scheduler.max_model_len, self.pool.num_blocks * self.config.cache.block_size)
        if num_prompt + num_output > limit:
            raise RequestError(f"{num_prompt} prompt tokens and {num_output} output tokens exceed the limit of {limit}")

    def _expire(self) -> list[TokenDelta]:
        """End what is past its deadline."""
        now = self.clock()
        if now < self._next_deadline_s:
            return []
        expired = [sequence for sequence in self._sequences.values() if is_past_deadline(sequence, now)]
        deltas = [self._finish(sequence, FinishReason.DEADLINE) for sequence in expired]
        deadlines = (sequence.request.deadline_s for sequence in self._sequences.values())
        self._next_deadline_s = min((deadline for deadline in deadlines if deadline is not None), default=math.inf)
        return deltas

    def _finish(self, sequence: Sequence, reason: FinishReason) -> TokenDelta:
        self.abort(sequence.request.request_id)
        return TokenDelta(request_id=sequence.request.request_id, finish_reason=reason)

    def _reset_slot(self, sequence: Sequence) -> None:
        sampling = sequence.request.sampling
        assert sequence.slot is not None, "an admitted sequence has a slot"
        self.runner.reset_slot(sequence.slot, sampling, end_token_ids(sampling, self.config.model.eos_token))

    def _commit(self, batch: Batch, output: Any, row: int, item: ScheduledTokens) -> TokenDelta | None:
        """Enter one row's result into its sequence; None where there is nothing to tell yet."""
        sequence = item.sequence
        sampling = sequence.request.sampling
        prompt_logprobs = self._scores(batch, output, row, item)
        sequence.num_computed_tokens += item.num_tokens
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprob, ...] = ()
        is_chosen = row < batch.num_sampled
        if (is_chosen and not output.is_finite[row]) or not all(math.isfinite(score.logprob) for score in prompt_logprobs):
            return self._finish(sequence, FinishReason.ERROR)
        if is_chosen:
            token = int(output.token_ids[row])
            sequence.token_ids.append(token)
            token_ids = (token,)
            if sampling.logprobs is not None:
                logprobs = (_logprob(output.logprobs, row, token, sampling.logprobs),)
        elif sequence.num_remaining_tokens:
            if not prompt_logprobs:
                return None
            return TokenDelta(request_id=sequence.request.request_id, prompt_logprobs=prompt_logprobs)
        reason = finish_reason(sequence, eos_token=self.config.model.eos_token, max_model_len=self.config.scheduler.max_model_len)
        if reason:
            self.abort(sequence.request.request_id)
        return TokenDelta(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
        )

    def _scores(self, batch: Batch, output: Any, row: int, item: ScheduledTokens) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of prompt tokens that this step made known for the first time."""
        sequence = item.sequence
        num_top = sequence.request.sampling.prompt_logprobs
        if num_top is None:
            return ()
        # The token at position p gives the score of the prompt token at p + 1, which is the p-th score.
        first = max(sequence.num_scored_tokens, sequence.num_computed_tokens)
        end = min(sequence.num_computed_tokens + item.num_tokens, sequence.num_prompt_tokens - 1)
        if first >= end:
            return ()
        offset = batch.token_starts[row] - sequence.num_computed_tokens
        sequence.num_scored_tokens = end
        return tuple(_logprob(output.scores, offset + p, sequence.token_ids[p + 1], num_top) for p in range(first, end))


def _logprob(logprobs: Any, row: int, token_id: int, num_top: int) -> TokenLogprob:
    top = zip(logprobs.top_ids[row, :num_top].tolist(), logprobs.top[row, :num_top].tolist(), strict=True)
    return TokenLogprob(token_id=token_id, logprob=float(logprobs.chosen[row]), top=tuple(top))
