"""Constraints: which tokens a sequence may choose next, and the threads that find it out where that can take long.

A `Constraint` is made for a sequence with a grammar, allowed tokens, or token runs that must not come about ("bad words"). Its `words` are
the mask for the next token. Some masks never change; the rest depend on the tokens before, so the host has to see these first.

Compiling a grammar can take seconds and one mask of a hostile grammar a tenth of a second, while other sequences want their next step. So
whatever has a grammar is worked on in the threads of `Grammars`: a few for compiling, a few for masks, and one more for those that had a
slow mask lately, so that nobody else's waits behind them. Tenants take turns at each of these. The core hands work over and takes back what
is done. It waits a moment for masks that come soon; the others' sequences sit out a step.

What wins where rules contradict each other: a grammar that nothing may follow ends the sequence, whatever `min_tokens` and `ignore_eos`
say; so does one that is whole where no token is left to go on with. Otherwise no token left is an end by `FinishReason.GRAMMAR`.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import GrammarError, RequestError
from engine.stop import end_token_ids
from engine.types import FinishReason, GenerationRequest

PATIENCE_S = 0.01  # how long the choice of a step waits for masks, at most; the device computes meanwhile
QUICK_S = 0.005  # a mask that took longer is a slow one
NUM_SLOW = 8  # masks after a slow one that count as slow, too; twice as many each time that this turned out too few
NUM_COMPILE_THREADS = 2
MAX_QUICK_THREADS = 4

Words = NDArray[np.int32]  # a bit per token of the vocabulary: bit b of word w for token 32 w + b


class Matcher(Protocol):
    """A sequence's place in its grammar; `engine/grammar.py` has the real one."""

    @property
    def error(self) -> str | None: ...
    @property
    def is_accepting(self) -> bool: ...
    @property
    def is_stopped(self) -> bool: ...
    def fill_mask(self, row: Words) -> None: ...
    def advance(self, token: int) -> None: ...


def is_constrained(request: GenerationRequest) -> bool:
    """Whether some tokens may not be chosen."""
    sampling = request.sampling
    return request.grammar is not None or bool(sampling.allowed_token_ids) or bool(sampling.bad_words)


class Constraint:
    """What one sequence may choose. Used by one thread at a time."""

    def __init__(self, request: GenerationRequest, *, vocab_size: int, eos_token: int) -> None:
        """Raises `RequestError` where the fields of the request leave no token at all."""
        sampling = request.sampling
        self.grammar = request.grammar
        self.tenant = request.tenant
        self.finish: FinishReason | None = None  # nothing may follow
        self.is_over = False  # the sequence is; what was not begun for it is left undone
        self._num_slow = 0  # masks that count as slow from now on
        self._num_slow_next = NUM_SLOW  # after the next slow one
        self._banned = _banned_by_beginning(sampling.bad_words)
        longest = max((len(run) for run in sampling.bad_words), default=1)
        self._recent = deque[int](maxlen=longest - 1)  # output
        self._num_output_tokens = 0
        self._min_tokens = sampling.min_tokens
        self._ends = words_of(end_token_ids(sampling, eos_token), vocab_size=vocab_size)
        self._allowed = words_of(sampling.allowed_token_ids or slice(vocab_size), vocab_size=vocab_size)
        self._allowed &= ~words_of([run[0] for run in sampling.bad_words if len(run) == 1], vocab_size=vocab_size)
        self._matcher: Matcher | None = None
        self.words = self._allowed  # never written to: a launch may still read it
        if not (self._allowed & ~self._ends if sampling.min_tokens else self._allowed).any():
            raise RequestError("no token may be chosen: allowed_token_ids holds nothing but bad_words, or ends before min_tokens")

    @property
    def needs_host(self) -> bool:
        """Whether the tokens before decide about the next one."""
        return self.grammar is not None or bool(self._banned)

    @property
    def is_slow(self) -> bool:
        """Whether a mask lately took so long that nobody should wait for the next."""
        return self._num_slow > 0

    def start(self, compile_grammar: Callable[[str], Matcher] | None, output_token_ids: Iterable[int]) -> None:
        """Compile the grammar, if there is one, and go on behind the tokens that were generated already."""
        if not self.needs_host:
            return
        if self.grammar is not None:
            assert compile_grammar is not None, "a grammar is refused where none can be compiled"
            try:
                self._matcher = compile_grammar(self.grammar)
            except GrammarError:
                self.finish = FinishReason.GRAMMAR
                return
        self._go_on(output_token_ids)

    def advance(self, token: int) -> None:
        """Take the next token, and find what may follow it."""
        self._go_on((token,))

    def _go_on(self, token_ids: Iterable[int]) -> None:
        start_s = time.thread_time()
        for token in token_ids:
            self._take(token)
        self._decide()
        was_slow, self._num_slow = self.is_slow, max(0, self._num_slow - 1)
        if time.thread_time() - start_s > QUICK_S:
            self._num_slow = self._num_slow_next
            self._num_slow_next *= 1 if was_slow else 2

    def _take(self, token: int) -> None:
        self._num_output_tokens += 1
        self._recent.append(token)
        if self._matcher is not None:
            self._matcher.advance(token)

    def _decide(self) -> None:
        """Set `words`, or `finish` where no token is left to go on with."""
        permitted = self._allowed.copy()
        recent = tuple(self._recent)
        for beginning, banned in self._banned.get(recent[-1], ()) if recent else ():
            if recent[-len(beginning) :] == beginning:
                np.bitwise_and.at(permitted.view(np.uint32), banned // 32, ~(np.uint32(1) << banned % 32))
        words, is_whole = permitted, False
        if self._matcher is not None:
            following = np.zeros_like(permitted)
            self._matcher.fill_mask(following)
            if self._matcher.is_stopped:
                self.finish = FinishReason.STOP
                return
            words, is_whole = permitted & following, self._matcher.is_accepting
        is_early = self._num_output_tokens < self._min_tokens
        if is_early:
            words = words & ~self._ends
        if not words.any():
            self.finish = FinishReason.STOP if is_whole else FinishReason.GRAMMAR
        elif is_whole and not is_early:
            words = words | (self._ends & permitted)
        self.words = words


class Grammars:
    """The threads, and what they have done. All methods are the core's; `compile_grammar` is called by any thread."""

    def __init__(self, compile_grammar: Callable[[str], Matcher]) -> None:
        """`compile_grammar` raises `GrammarError` for what does not compile."""
        self._compile = compile_grammar
        self._done: SimpleQueue[tuple[Constraint, BaseException | None]] = SimpleQueue()
        self._compilers = _Threads("grammar compiler", NUM_COMPILE_THREADS, self._done)
        self._quick = _Threads("masks", min(MAX_QUICK_THREADS, max(2, (os.cpu_count() or 1) // 2)), self._done)
        self._slow = _Threads("slow masks", 1, self._done)
        self._awaited: set[Constraint] = set()  # whose mask comes soon

    def twin(self) -> "Grammars":
        """The same for another core, with threads of its own."""
        return Grammars(self._compile)

    def start(self, constraint: Constraint, output_token_ids: Iterable[int]) -> None:
        """Have its grammar compiled."""
        self._compilers.submit(constraint, lambda: constraint.start(self._compile, output_token_ids))

    def advance(self, constraint: Constraint, token: int) -> None:
        """Have the mask after this token found."""
        if not constraint.is_slow:
            self._awaited.add(constraint)
        (self._slow if constraint.is_slow else self._quick).submit(constraint, lambda: constraint.advance(token))

    def take(self, *, wait_s: float = 0.0) -> list[Constraint]:
        """What is done. Waits up to `wait_s` for the first one."""
        done: list[Constraint] = []
        try:
            self._take_one(done, timeout_s=wait_s)
            while True:
                self._take_one(done)
        except Empty:
            return done

    def take_quick(self) -> list[Constraint]:
        """What is done once all masks that come soon are there, or after `PATIENCE_S`."""
        done: list[Constraint] = []
        deadline_s = time.monotonic() + PATIENCE_S
        try:
            while self._awaited:
                self._take_one(done, timeout_s=deadline_s - time.monotonic())
        except Empty:
            self._awaited.clear()
        return done + self.take()

    def _take_one(self, done: list[Constraint], *, timeout_s: float = 0.0) -> None:
        constraint, error = self._done.get(timeout=timeout_s) if timeout_s > 0 else self._done.get_nowait()
        if error is not None:
            raise error
        self._awaited.discard(constraint)
        done.append(constraint)


class _Threads:
    """Threads that do one job after the other, of each tenant in turn, started when the first one comes."""

    def __init__(self, name: str, count: int, done: "SimpleQueue[tuple[Constraint, BaseException | None]]") -> None:
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(count)]
        self._jobs: dict[str, deque[tuple[Constraint, Callable[[], None]]]] = {}  # by tenant, the next one's first
        self._lock = threading.Lock()  # of `_jobs`
        self._calls: SimpleQueue[None] = SimpleQueue()  # one per job
        self._done = done
        self._is_started = False

    def submit(self, constraint: Constraint, job: Callable[[], None]) -> None:
        if not self._is_started:
            self._is_started = True
            for thread in self._threads:
                thread.start()
        with self._lock:
            self._jobs.setdefault(constraint.tenant, deque()).append((constraint, job))
        self._calls.put(None)

    def _next(self) -> tuple[Constraint, Callable[[], None]]:
        """Waits for a job."""
        self._calls.get()
        with self._lock:
            tenant = next(iter(self._jobs))
            jobs = self._jobs.pop(tenant)
            job = jobs.popleft()
            if jobs:
                self._jobs[tenant] = jobs
        return job

    def _run(self) -> None:
        while True:
            constraint, job = self._next()
            try:
                if not constraint.is_over:
                    job()
            except BaseException as error:  # the core raises it
                self._done.put((constraint, error))
            else:
                self._done.put((constraint, None))


def _banned_by_beginning(runs: Iterable[tuple[int, ...]]) -> dict[int, list[tuple[tuple[int, ...], NDArray[np.uint32]]]]:
    """What the longer ones of these begin with, and the tokens that must not follow that; by the last token of the beginning."""
    ends: dict[tuple[int, ...], list[int]] = {}
    for *beginning, end in runs:
        if beginning:
            ends.setdefault(tuple(beginning), []).append(end)
    banned: dict[int, list[tuple[tuple[int, ...], NDArray[np.uint32]]]] = {}
    for beginning, tokens in ends.items():
        banned.setdefault(beginning[-1], []).append((beginning, np.array(tokens, np.uint32)))
    return banned


def words_of(token_ids: Sequence[int] | slice, *, vocab_size: int) -> Words:
    """The mask that allows exactly these tokens."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[token_ids if isinstance(token_ids, slice) else list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
