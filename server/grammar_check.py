"""GrammarCheck: whether a grammar may be given to the engine, found out in processes that a hostile one may end.

Two `server/grammar_worker.py` processes are started when the first grammar comes, or one ahead of it by `start`; one that ended is replaced
at once and not when it is missed. A verdict depends on the grammar alone, because the limits are on the processor's time and on memory. So
verdicts are kept, and requests that wait for the same one share it. Where none can be had now, the client is told to come again.

What a tenant can cost others is `server/grammar_queue.py`'s to say. A grammar that nobody waits for any more is forgotten unless it runs.
"""

import asyncio
import hashlib
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog

from server.engine_process import EngineProcess
from server.errors import InvalidRequest, Unavailable, shortened
from server.grammar_messages import HEADER, Answer, frame, payload_len
from server.grammar_queue import GrammarJob, GrammarQueue, QueueFullError
from server.limits import Limits
from server.structured_output import check_num_chars

NUM_WORKERS = 2
MAX_VERDICTS = 1024
MAX_VERDICT_CHARS = 16 * 2**20  # of all verdicts together
MAX_TRIES = NUM_WORKERS + 1  # of a grammar whose workers somebody else has killed
WALL_CLOCK_FACTOR = 10.0  # a worker that has taken this many times its processor's time is not given any: the machine is too busy
START_TIMEOUT_S = 60.0
RESTART_PAUSE_S = 1.0  # after a worker that could not start

_BROKEN = (OSError, EOFError, ValueError, msgspec.MsgspecError)  # what a worker that ends, or has gone mad, looks like from here

log = structlog.get_logger(__name__)


class GrammarCheck:
    """Owns the workers and the verdicts. Made anywhere, used on one event loop, to be closed there."""

    def __init__(self, *, tokenizer_path: Path, vocab_size: int, eos_token: int, limits: Limits) -> None:
        self._limits = limits
        self._command = (
            *(sys.executable, "-P", "-m", "server.grammar_worker"),
            *("--tokenizer", str(tokenizer_path), "--vocab-size", str(vocab_size), "--eos-token", str(eos_token)),
            *("--cpu-s", str(limits.grammar_timeout_s), "--memory-bytes", str(limits.grammar_memory_bytes)),
        )
        self._queue = GrammarQueue(max_len=limits.max_queued_grammars)
        self._jobs: dict[bytes, GrammarJob] = {}  # without a verdict so far
        self._verdicts = _Verdicts()
        self._slots: list[asyncio.Task[None]] = []  # each keeps one worker
        self._num_alive = 0  # workers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def start(self) -> None:
        """Start a worker, so that the first grammar does not wait for one."""
        self._keep_workers(1)

    async def close(self) -> None:
        """End the workers; whoever still waits is told that the server is shutting down."""
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        self._slots.clear()
        for job in self._jobs.values():
            job.fail(self._unavailable("the server is shutting down", code="shutting_down"))
        self._jobs.clear()

    async def check(self, grammar: str, *, param: str | None, tenant: str = "") -> str:
        """The grammar in the form that the engine takes: what is written in EBNF is Lark then.

        Raises `InvalidRequest` for `param` where it does not compile, or goes past a limit of size, time or memory; `Unavailable` where
        too many wait.
        """
        check_num_chars(len(grammar), param=param, limits=self._limits)
        key = hashlib.sha256(grammar.encode(errors="replace")).digest()
        answer = self._verdicts.get(key) or await self._outcome(self._jobs.get(key) or self._ask(key, grammar, tenant=tenant))
        if answer.reason is not None:
            raise InvalidRequest(shortened(f"{param or 'the grammar'}: {answer.reason}", self._limits.max_message_chars), param=param)
        return answer.grammar or grammar

    def _ask(self, key: bytes, grammar: str, *, tenant: str) -> GrammarJob:
        """Put it in the queue. Raises `Unavailable` where that is full."""
        self._keep_workers(NUM_WORKERS)
        job = GrammarJob(key=key, text=grammar, tenant=tenant, outcome=asyncio.get_running_loop().create_future())
        try:
            self._queue.put(job)
        except QueueFullError:
            raise self._too_many() from None
        self._jobs[key] = job
        return job

    async def _outcome(self, job: GrammarJob) -> Answer:
        """Wait with others for a verdict; the last one to leave takes the job out of the queue."""
        job.num_waiting += 1
        try:
            return await asyncio.shield(job.outcome)
        except QueueFullError:
            raise self._too_many() from None
        finally:
            job.num_waiting -= 1
            if job.outcome.done() or (not job.num_waiting and self._queue.discard(job)):
                self._forget(job)

    def _keep_workers(self, count: int) -> None:
        while len(self._slots) < count:
            self._slots.append(asyncio.create_task(self._keep_worker(), name="grammar worker"))

    async def _keep_worker(self) -> None:
        """One worker after the other, as long as this task lives."""
        while True:
            try:
                worker = await _Worker.start(self._command)
            except _BROKEN as error:
                log.error("no process to check grammars in", error=type(error).__name__, cause=str(error))
                if not self._num_alive:
                    self._fail_all(lambda: self._unavailable("grammars cannot be checked now", code="server_overloaded"))
                await asyncio.sleep(RESTART_PAUSE_S)
                continue
            self._num_alive += 1
            try:
                while await self._run_next(worker):
                    pass
            finally:
                self._num_alive -= 1
                await worker.end()

    async def _run_next(self, worker: "_Worker") -> bool:
        """Check the next grammar; whether the worker can take another one."""
        job = await self._queue.get()
        try:
            return await self._run(job, worker)
        finally:
            self._queue.done(job)

    async def _run(self, job: GrammarJob, worker: "_Worker") -> bool:
        job.num_tries += 1
        try:
            async with asyncio.timeout(WALL_CLOCK_FACTOR * self._limits.grammar_timeout_s):
                answer = await worker.ask(job.text)
        except TimeoutError:
            self._fail(job, self._unavailable("the server is too busy to check this request's grammar", code="server_overloaded"))
            return False
        except _BROKEN:
            status = await worker.end()
            if status in (0, -signal.SIGKILL) and job.num_tries < MAX_TRIES:  # no grammar's doing
                self._queue.put_back(job)
            else:
                reason = self._reason_of_death(status)
                log.warning("a grammar ended the process that checked it", reason=reason, tenant=job.tenant, num_chars=len(job.text))
                self._settle(job, Answer(reason=reason))
            return False
        self._settle(job, answer)
        return not answer.is_last

    def _reason_of_death(self, status: int) -> str:
        """What the end of a worker says about the grammar that it had."""
        match -status:
            case signal.SIGPROF:
                return f"it took longer than {self._limits.grammar_timeout_s:g} seconds to compile; make it simpler"
            case signal.SIGABRT | signal.SIGKILL:
                return f"it needs more than {self._limits.grammar_memory_bytes / 2**20:,.0f} MiB to compile; make it simpler"
            case signal.SIGSEGV | signal.SIGBUS:
                return "it nests too deeply to compile"
            case _:
                return "it cannot be compiled"

    def _settle(self, job: GrammarJob, answer: Answer) -> None:
        self._verdicts.put(job.key, answer if answer.grammar != job.text else Answer())
        self._forget(job)
        if not job.outcome.done():
            job.outcome.set_result(answer)

    def _fail(self, job: GrammarJob, error: Exception) -> None:
        self._queue.discard(job)
        self._forget(job)
        job.fail(error)

    def _forget(self, job: GrammarJob) -> None:
        """The next one who brings this grammar begins anew."""
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]

    def _fail_all(self, make_error: Callable[[], Exception]) -> None:
        for job in [*self._jobs.values()]:
            self._fail(job, make_error())

    def _too_many(self) -> Unavailable:
        return self._unavailable("too many requests wait for their grammars to be checked", code="server_overloaded")

    def _unavailable(self, message: str, *, code: str) -> Unavailable:
        return Unavailable(message, code=code, retry_after_s=self._limits.retry_after_s)


class _Verdicts:
    """Answers by the hash of the grammar, the latest used ones, bounded in number and size."""

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._num_chars = 0

    def get(self, key: bytes) -> Answer | None:
        if key in self._answers:
            self._answers.move_to_end(key)
        return self._answers.get(key)

    def put(self, key: bytes, answer: Answer) -> None:
        self._answers[key] = answer
        self._num_chars += _num_chars(answer)
        while len(self._answers) > MAX_VERDICTS or self._num_chars > MAX_VERDICT_CHARS:
            self._num_chars -= _num_chars(self._answers.popitem(last=False)[1])


def _num_chars(answer: Answer) -> int:
    return len(answer.grammar) + len(answer.reason or "")


class _Worker:
    """A process that has said that it is ready, and the conversation with it."""

    def __init__(self, process: EngineProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, command: Sequence[str]) -> "_Worker":
        """Raises one of `_BROKEN` where there is none to be had."""
        process = EngineProcess(command)
        try:
            worker = cls(process, *await asyncio.open_unix_connection(sock=process.socket))
        except BaseException:
            process.kill()
            await asyncio.shield(asyncio.to_thread(process.reap))
            raise
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await worker._receive()
        except BaseException:
            await worker.end()
            raise
        return worker

    async def ask(self, text: str) -> Answer:
        """Raises one of `_BROKEN` where the process ends before it has answered."""
        self._writer.write(frame(text.encode(errors="replace")))
        await self._writer.drain()
        return msgspec.json.decode(await self._receive(), type=Answer)

    async def end(self) -> int:
        """Kill it where it still runs. Returns its status, negative for the signal that ended it. May be called again."""
        self._writer.close()
        self._process.kill()
        return await asyncio.shield(asyncio.to_thread(self._process.reap))

    async def _receive(self) -> bytes:
        return await self._reader.readexactly(payload_len(await self._reader.readexactly(HEADER.size)))
