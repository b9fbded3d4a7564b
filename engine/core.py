"""EngineCore: the step loop and the owner of all mutable state of the engine.

Runs in the engine process, on one thread. A step: schedule, launch, then collect and emit what the step before it computed. So the device
has its next work before the host looks at the last result, and the host works while the device does. The price: a sequence that ends by
its token is found finished one step late, and what that step computed for it is thrown away.

What a sequence may choose can depend on its last token (`engine/constraints.py`). Its next step is launched all the same, but only up to
the choice; the last token is read and its mask found while the device computes, then the choice follows. Where a mask takes long, the row
is dropped from the choice, and the sequence sits out until the mask is there: its token counts as pending that long. One with a grammar
joins the scheduler when that is compiled.

The core deals in token ids only and gets its runner handed in, so this file and everything under it start without jax.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch, Batcher, StepLayout
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.constraints import Constraint, Grammars, is_constrained
from engine.errors import RequestError
from engine.prefix_cache import PrefixCache
from engine.prompt_scorer import PromptScorer
from engine.prompt_scores import ScoreCollector
from engine.request_check import check_request
from engine.scheduler import Schedule, ScheduledTokens, Scheduler
from engine.sequence import Sequence
from engine.stop import end_token_ids, finish_reason, is_end, is_past_deadline
from engine.types import EngineInfo, EngineStats, FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprob

IDLE_WAIT_S = 0.005  # for threads, while there is nothing else to do; then messages are looked for


class Runner(Protocol):
    """What the core needs of a model: see `engine/runner.py`."""

    layouts: tuple[StepLayout, ...]

    @property
    def num_late_compilations(self) -> int: ...
    def reset_slot(
        self,
        slot: int,
        sampling: SamplingParams,
        end_token_ids: tuple[int, ...],
        *,
        prompt_token_ids: Iterable[int] = (),
        output_token_ids: Iterable[int] = (),
    ) -> None: ...
    def write_masks(self, masks: list[tuple[int, NDArray[np.int32]]]) -> None: ...
    def launch(self, batch: Batch) -> Any: ...
    def choose(self, launched: Any, *, dropped: list[int] = ...) -> Any: ...
    def is_done(self, output: Any) -> bool: ...
    def collect(self, output: Any) -> Any: ...


class WarmRunner(Runner, Protocol):
    """A runner that is tried once before the core gets it."""

    def warm_up(self) -> float:
        """Returns how many seconds the largest step takes."""
        ...


@dataclass(slots=True, kw_only=True)
class _InFlight:
    """A launched step that is not collected yet."""

    batch: Batch
    launched: Any
    output: Any = None  # once its tokens are being chosen
    dropped: list[int] = field(default_factory=list[int])  # rows that choose no token after all


class _Chosen(NamedTuple):
    """A token that counts as pending until the host knows what may follow it."""

    sequence: Sequence
    token: int
    logprobs: tuple[TokenLogprob, ...]
    scores: tuple[TokenLogprob, ...]


class EngineCore:
    """Sequences come in by `submit`, leave by finishing or by `abort`, and advance by `step`."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        info: EngineInfo,
        *,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Without `grammars`, requests with a grammar are refused."""
        self.info = info
        self.config = config
        self.runner = runner
        self.clock = clock
        self.on_begin: Callable[[list[str]], object] | None = None  # told, before a step, which requests come in with it
        self.pool = BlockPool(config.cache.num_blocks)
        self.cache = PrefixCache(self.pool, block_size=config.cache.block_size)
        self.scorer = PromptScorer(self.cache, block_size=config.cache.block_size)
        self.scheduler = Scheduler(config.scheduler, self.pool, self.cache, block_size=config.cache.block_size)
        self.batcher = Batcher(
            runner.layouts,
            block_size=config.cache.block_size,
            num_blocks=config.cache.num_blocks,
            vocab_size=config.model.vocab_size,
            num_slots=config.scheduler.max_num_seqs,
        )
        self._eos_token = config.model.eos_token
        self._max_model_len = config.scheduler.max_model_len
        self._max_len = min(config.scheduler.max_model_len, config.cache.num_blocks * config.cache.block_size)
        self._sequences: dict[str, Sequence] = {}
        self._grammars = grammars
        self._constraints: dict[Sequence, Constraint] = {}  # of those that have one
        self._compiling: dict[Constraint, Sequence] = {}  # not in the scheduler yet
        self._advancing: dict[Constraint, _Chosen] = {}
        self._masks: dict[int, NDArray[np.int32]] = {}  # by slot: what the device knows of the sequence in it
        self._in_flight: _InFlight | None = None
        self._ahead: _InFlight | None = None  # launched behind it by a call that did not wait for it
        self._next_deadline_s = math.inf  # nobody's deadline is earlier
        self._num_arrivals = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._compiling)

    def check(self, request: GenerationRequest, output_token_ids: tuple[int, ...]) -> None:
        """Raises `RequestError` for a request that could never run."""
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id} is already running")
        check_request(request, output_token_ids, vocab_size=self.config.model.vocab_size, max_len=self._max_len)

    def submit(self, request: GenerationRequest, *, output_token_ids: tuple[int, ...] = (), num_scored_tokens: int = 0) -> bool:
        """Queue a request; True if it only waits, until `on_begin` is told of it. Raises `RequestError` for one that could never run.

        A generation that another engine began goes on behind the output tokens and prompt log-probabilities that it has given already.
        """
        self.check(request, output_token_ids)
        constraint = self._constraint(request, output_token_ids)
        is_scored = request.sampling.prompt_logprobs is not None
        sequence = Sequence(
            request=request,
            arrival=self._num_arrivals,
            token_ids=[*request.prompt_token_ids, *output_token_ids],
            num_scored_tokens=num_scored_tokens,
            score_collector=ScoreCollector(self.config.cache.block_size) if is_scored else None,
        )
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        if request.deadline_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)
        if constraint is not None:
            self._constraints[sequence] = constraint
        if constraint is not None and constraint.grammar is not None and self._grammars is not None:
            self._compiling[constraint] = sequence
            self._grammars.start(constraint, output_token_ids)
            return False
        self.scheduler.add(sequence)
        return True

    def abort(self, request_id: str) -> None:
        """Forget a request; its blocks are free at once. Unknown ids have just finished and are no error."""
        if sequence := self._sequences.get(request_id):
            self._end(sequence)

    def step(self, *, may_wait: bool = True) -> list[TokenDelta]:
        """Launch a step and return what the one before it made known. Where only threads can bring the work on, wait for them a moment.

        With `may_wait=False` wait for neither device nor threads: what is not there yet is a later call's. Raises `RuntimeError` if work is
        pending and none can be done.
        """
        deltas = self._expire()
        if self._grammars is not None:
            deltas += self._resume(self._grammars.take())
        if self._ahead is None:
            self._ahead = self._launch(self.scheduler.schedule())
        if not may_wait and self._in_flight is not None and not self.runner.is_done(self._in_flight.output):
            return deltas
        collected, self._in_flight, self._ahead = self._in_flight, self._ahead, None
        launched = self._in_flight
        if collected is not None:
            deltas += self._commit(collected)
        elif launched is None and self.has_work:
            deltas += self._wait(IDLE_WAIT_S if may_wait else 0.0)
        if launched is not None and launched.output is None:
            self._choose_late(launched)
        return deltas

    def stats(self) -> EngineStats:
        """Gauges and totals as of now."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting + len(self._compiling),
            num_blocks_used=self.pool.num_held,
            num_blocks_cached=self.pool.num_cached,
            num_blocks=self.pool.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_lookup_tokens=self.cache.num_lookup_tokens,
            num_hit_tokens=self.cache.num_hit_tokens,
            num_late_compilations=self.runner.num_late_compilations,
        )

    def _constraint(self, request: GenerationRequest, output_token_ids: tuple[int, ...]) -> Constraint | None:
        """What limits its choices, if anything does and it has any. Raises `RequestError` where that cannot be, or leaves nothing."""
        if request.grammar is not None and self._grammars is None:
            raise RequestError("this engine has no tokenizer and so can follow no grammar")
        if not is_constrained(request) or not request.sampling.max_tokens:
            return None
        constraint = Constraint(request, vocab_size=self.config.model.vocab_size, eos_token=self._eos_token)
        if constraint.grammar is None:
            constraint.start(None, output_token_ids)
        return constraint

    def _expire(self) -> list[TokenDelta]:
        """End what is past its deadline."""
        now = self.clock()
        if now < self._next_deadline_s:
            return []
        expired = [sequence for sequence in self._sequences.values() if is_past_deadline(sequence, now)]
        deltas = [self._delta(sequence, FinishReason.DEADLINE) for sequence in expired]
        deadlines = (sequence.request.deadline_s for sequence in self._sequences.values())
        self._next_deadline_s = min((deadline for deadline in deadlines if deadline is not None), default=math.inf)
        return deltas

    def _launch(self, schedule: Schedule) -> _InFlight | None:
        """Start the scheduled step, if there is anything in it."""
        if not schedule.items:
            return None
        if schedule.admitted and self.on_begin is not None:
            self.on_begin([sequence.request.request_id for sequence in schedule.admitted])
        for sequence in schedule.admitted:
            self._reset_slot(sequence)
        batch = self.batcher.build(schedule)
        self._num_steps += 1
        step = _InFlight(batch=batch, launched=self.runner.launch(batch))
        if not self._constraints or not any(self._is_undecided(item) for item in batch.items):
            self._let_choose(step)
        return step

    def _is_undecided(self, item: ScheduledTokens) -> bool:
        """Whether it chooses under a mask that depends on a token which is not known yet."""
        constraint = self._constraints.get(item.sequence)
        return constraint is not None and constraint.needs_host and item.chooses_token and item.sequence.num_pending_tokens > 1

    def _choose_late(self, step: _InFlight) -> None:
        """Let a step choose now that the one before it is known; rows whose mask is not there in time are dropped."""
        for row, item in enumerate(step.batch.items):
            sequence = item.sequence
            if sequence.is_over:
                step.dropped.append(row)
            elif self._is_undecided(item):
                step.dropped.append(row)
                sequence.needs_host = True
                sequence.num_computed_tokens -= 1
                sequence.num_pending_tokens -= 1
        self._let_choose(step)

    def _let_choose(self, step: _InFlight) -> None:
        """Enter the masks that the step needs and the device has not, then start its choice."""
        if self._constraints and (masks := self._new_masks(step)):
            self.runner.write_masks(masks)
        step.output = self.runner.choose(step.launched, dropped=step.dropped)

    def _reset_slot(self, sequence: Sequence) -> None:
        """Hand a slot over, with the tokens that count for penalties but that no step will show to it: those of a prefix hit."""
        sampling = sequence.request.sampling
        assert sequence.slot is not None, "an admitted sequence has a slot"
        self._masks.pop(sequence.slot, None)
        num_hit = min(sequence.num_shared_tokens, len(sequence.token_ids) - 1) if sampling.has_penalties else 0
        self.runner.reset_slot(
            sequence.slot,
            sampling,
            end_token_ids(sampling, self._eos_token),
            prompt_token_ids=sequence.token_ids[: min(num_hit, sequence.num_prompt_tokens)],
            output_token_ids=sequence.token_ids[sequence.num_prompt_tokens : num_hit],
        )

    def _new_masks(self, step: _InFlight) -> list[tuple[int, NDArray[np.int32]]]:
        """By slot."""
        masks: list[tuple[int, NDArray[np.int32]]] = []
        for row, item in enumerate(step.batch.items[: step.batch.num_sampled]):
            slot, constraint = item.sequence.slot, self._constraints.get(item.sequence)
            if constraint is None or slot is None or row in step.dropped or self._masks.get(slot) is constraint.words:
                continue
            self._masks[slot] = constraint.words
            masks.append((slot, constraint.words))
        return masks

    def _commit(self, step: _InFlight) -> list[TokenDelta]:
        """Enter a step's results into its sequences; those that are over meanwhile are passed by."""
        output = self.runner.collect(step.output)
        token_ids, is_finite = output.token_ids.tolist(), output.is_finite.tolist()
        deltas: list[TokenDelta] = []
        for row, item in enumerate(step.batch.items):
            sequence = item.sequence
            if sequence.is_over or row in step.dropped:
                continue
            scores = self.scorer.news(item, output.scores, step.batch.token_starts[row])
            if (item.chooses_token and not is_finite[row]) or (scores and not _are_finite(scores)):
                deltas.append(self._delta(sequence, FinishReason.ERROR))
            elif item.chooses_token:
                num_top = sequence.request.sampling.logprobs
                logprobs = () if num_top is None else (_logprob(output.logprobs, row, token_ids[row], num_top),)
                deltas += self._choose(_Chosen(sequence, token_ids[row], logprobs, scores))
            elif _is_all(item):
                deltas.append(self._delta(sequence, FinishReason.LENGTH, scores=scores))
            elif scores:
                deltas.append(self._delta(sequence, None, scores=scores))
        if self._advancing and self._grammars is not None:
            deltas += self._resume(self._grammars.take_quick())
        return deltas

    def _choose(self, chosen: _Chosen) -> list[TokenDelta]:
        """Enter a token, unless a thread has to find first what may follow it."""
        sequence = chosen.sequence
        constraint = self._constraints.get(sequence)
        if constraint is None or not constraint.needs_host or is_end(chosen.token, sequence.request.sampling, eos_token=self._eos_token):
            return [self._add_token(chosen)]
        if constraint.grammar is None or self._grammars is None:
            constraint.advance(chosen.token)
            return [self._add_token(chosen)]
        self._advancing[constraint] = chosen
        self._grammars.advance(constraint, chosen.token)
        return []

    def _resume(self, done: list[Constraint]) -> list[TokenDelta]:
        """Let sequences go on, or come in, whose next choice is known; those that are over meanwhile are passed by."""
        deltas: list[TokenDelta] = []
        for constraint in done:
            if (sequence := self._compiling.get(constraint)) is not None:
                if constraint.finish is not None:
                    deltas.append(self._delta(sequence, constraint.finish))
                else:
                    del self._compiling[constraint]
                    sequence.needs_host = constraint.is_slow
                    self.scheduler.add(sequence)
            elif (chosen := self._advancing.pop(constraint, None)) is not None:
                deltas.append(self._add_token(chosen))
        return deltas

    def _wait(self, wait_s: float) -> list[TokenDelta]:
        """There is work and no step: only threads can bring it on."""
        if self._grammars is None or not (self._compiling or self._advancing):
            raise RuntimeError(f"nothing can be computed: {self.stats()}")
        return self._resume(self._grammars.take(wait_s=wait_s))

    def _add_token(self, chosen: _Chosen) -> TokenDelta:
        """The pending token is known."""
        sequence, token, logprobs, scores = chosen
        sequence.token_ids.append(token)
        sequence.num_pending_tokens -= 1
        reason = finish_reason(sequence, eos_token=self._eos_token, max_model_len=self._max_model_len)
        constraint = self._constraints.get(sequence)
        if constraint is not None:
            sequence.needs_host = constraint.is_slow
            if reason is None or constraint.finish is FinishReason.STOP:
                reason = constraint.finish
        return self._delta(sequence, reason, token_ids=(token,), logprobs=logprobs, scores=scores)

    def _delta(
        self,
        sequence: Sequence,
        reason: FinishReason | None,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        scores: tuple[TokenLogprob, ...] = (),
    ) -> TokenDelta:
        """Tell it; with a reason, as the last that is told of this sequence."""
        if reason is not None:
            self._end(sequence, is_sound=reason is not FinishReason.ERROR)
        return TokenDelta(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=scores,
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _end(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Give back all that it holds; nobody finds in the prefix cache what a failed sequence computed."""
        del self._sequences[sequence.request.request_id]
        constraint = self._constraints.pop(sequence, None)
        is_scheduled = constraint is None or self._compiling.pop(constraint, None) is None
        if constraint is not None:
            constraint.is_over = True
            self._advancing.pop(constraint, None)
        if is_scheduled:
            self.scheduler.remove(sequence, discard=not is_sound)
        sequence.is_over = True


def _are_finite(scores: tuple[TokenLogprob, ...]) -> bool:
    return all(math.isfinite(score.logprob) for score in scores)


def _is_all(item: ScheduledTokens) -> bool:
    """True if this was the end of a sequence that generates nothing."""
    sequence = item.sequence
    return sequence.request.sampling.max_tokens == 0 and item.start + item.num_tokens == sequence.num_prompt_tokens


def _logprob(logprobs: Any, row: int, token_id: int, num_top: int) -> TokenLogprob:
    top = zip(logprobs.top_ids[row, :num_top].tolist(), logprobs.top[row, :num_top].tolist(), strict=True)
    return TokenLogprob(token_id=token_id, logprob=float(logprobs.chosen[row]), top=tuple(top))
