"""Keeps one engine process running and the client connected to it.

A death is answered with a new process, at once the first time and after growing pauses while deaths repeat before anything was computed.
What becomes of the generations that ran in the dead one is the client's business; while it searches for the one to blame, nothing pauses. A
process that its `Watchdog` finds hanging is killed, which makes a hang one more death. The first engine that says why it cannot start
(`Failed`) is not tried again; a later one is, because the same options have worked: memory may be free, or a disk back, a moment later.

Beside an engine that is ready another process stands by, with imports and on a CPU all compiling behind it, but no weights and no memory of
a device: it becomes the next engine.

Runs on the server's event loop; knows neither HTTP nor the terminal. What happens is told to a `Watcher`.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from engine.client import RemoteEngineClient, have_prepared
from engine.config import EngineOptions
from engine.errors import EngineError
from engine.types import EngineInfo, Progress
from server.engine_process import EngineProcess
from server.watchdog import Watchdog

ENGINE_COMMAND = (sys.executable, "-P", "-m", "engine")  # -P: a folder called engine where we were started is not ours
MAX_FAILED_STARTS = 3  # in a row, before the first engine is ready
MAX_FAILED_RESTARTS = 10  # in a row, later: what waits is worth more patience
STABLE_S = 3.0  # an engine that was ready this long, or made a step, has left earlier deaths behind
LONGEST_PAUSE_S = 4.0
STANDBY_DELAY_S = 1.0  # between readiness and the start of the standby: the first requests come first
LOOKS_PER_TIMEOUT = 10  # at the engine


class EngineStartError(EngineError):
    """There will be no engine: it said why it cannot start, or ended too often before it was ready."""

    def __init__(self, message: str, *, exit_status: int, plan: str | None = None) -> None:
        super().__init__(message)
        self.exit_status = exit_status  # what the server should end with
        self.plan = plan  # for `show_refusal`, where memory is what is missing


class Watcher(Protocol):
    """Who wants to know how the engine is."""

    def engine_progressed(self, progress: Progress) -> None: ...

    def engine_ready(self, info: EngineInfo) -> None: ...

    def engine_died(self, cause: str, *, pause_s: float) -> None: ...


class Supervisor:
    """Owns the engine process. `client` is the same object over all restarts."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        watcher: Watcher,
        command: Sequence[str] = ENGINE_COMMAND,
        stall_timeout_s: float = 10.0,
        start_timeout_s: float = 1800.0,
        standby_delay_s: float | None = None,
    ) -> None:
        """`standby_delay_s` is how long after readiness a standby is started; None: never."""
        self.client = RemoteEngineClient(on_progress=watcher.engine_progressed, on_ready=self._engine_ready)
        self._options = options
        self._watcher = watcher
        self._command = command
        self._stall_timeout_s = stall_timeout_s
        self._start_timeout_s = start_timeout_s
        self._standby_delay_s = standby_delay_s
        self._engine: EngineProcess | None = None
        self._standby: EngineProcess | None = None
        self._had_standby = False  # in the current engine's time
        self._ready_since_s: float | None = None
        self._stalled_s: float | None = None  # how long the last engine did nothing, where it was killed for that
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keep an engine running until `stop`. Raises `EngineStartError` when that is hopeless."""
        try:
            await self._keep_running()
        finally:
            await self._end_standby()

    def stop(self) -> None:
        """Let `run` come to its end: the connection closes, the process ends, and if it does not, it is killed."""
        self._stopping.set()
        self.client.disconnect()

    def kill(self) -> None:
        """End the processes now, whatever they do."""
        for process in (self._engine, self._standby):
            if process is not None:
                process.kill()

    async def _keep_running(self) -> None:
        num_failed_starts = num_quick_deaths = 0
        while not self._stopping.is_set():
            num_steps = self.client.stats.num_steps  # a total over all engines
            cause = await self._run_one_engine()
            if self._stopping.is_set():
                return
            if self.client.failure is not None and self.client.info is None:
                raise EngineStartError(self.client.failure.message, exit_status=2, plan=self.client.failure.plan)
            ready_s = 0.0 if self._ready_since_s is None else time.monotonic() - self._ready_since_s
            num_failed_starts = num_failed_starts + 1 if self._ready_since_s is None else 0
            is_quick = ready_s < STABLE_S and self.client.stats.num_steps == num_steps
            num_quick_deaths = num_quick_deaths + 1 if is_quick else 0
            if num_failed_starts == (MAX_FAILED_STARTS if self.client.info is None else MAX_FAILED_RESTARTS):
                raise EngineStartError(f"the engine {cause} {num_failed_starts} times in a row before it was ready", exit_status=3)
            is_trial = self.client.is_searching and self._ready_since_s is not None
            pause_s = 0.0 if is_trial else pause_before_restart(num_quick_deaths)
            self._watcher.engine_died(cause, pause_s=pause_s)
            await self._pause(pause_s)

    async def _run_one_engine(self) -> str:
        """From the start of a process to its end; returns how it ended."""
        self._ready_since_s = self._stalled_s = None
        self._had_standby = False
        try:
            engine = self._engine = self._take_standby() or EngineProcess(self._command)
        except OSError as error:  # no memory or no descriptor for it, perhaps for a moment only
            return f"could not be started ({error.strerror})"
        looking_after: asyncio.Task[None] | None = None
        try:
            await self.client.connect_socket(engine.socket, self._options)
            if self._stopping.is_set():
                self.client.disconnect()
            looking_after = asyncio.create_task(self._look_after(engine))
            await self.client.wait_disconnected()
        except asyncio.CancelledError:
            engine.kill()
            raise
        finally:
            if looking_after is not None:
                looking_after.cancel()
            status = await asyncio.shield(asyncio.to_thread(engine.reap))
        return self._describe(status)

    async def _look_after(self, engine: EngineProcess) -> None:
        """Kill the engine if it hangs; once it is ready, give it a standby."""
        look_s = min(self._stall_timeout_s, self._start_timeout_s) / LOOKS_PER_TIMEOUT
        watchdog = Watchdog(stall_timeout_s=self._stall_timeout_s, start_timeout_s=self._start_timeout_s, look_s=look_s)
        client = self.client
        while self._stalled_s is None:
            await asyncio.sleep(look_s)
            step_s = client.info.step_s if client.is_ready and client.info is not None else None
            self._stalled_s = watchdog.look(num_frames=client.num_frames, progress=client.progress, step_s=step_s)
            self._tend_standby()
        engine.kill()

    def _tend_standby(self) -> None:
        """One is started per engine: if it ends by itself, another would, too."""
        if self._standby is not None and self._standby.has_ended:
            self._standby.socket.close()
            self._standby = None
        if self._had_standby or self._standby_delay_s is None or self._ready_since_s is None or self.client.info is None:
            return
        if time.monotonic() - self._ready_since_s >= self._standby_delay_s:
            self._had_standby = True
            with suppress(OSError):  # no room for one; or it has ended already, which is seen the next time
                self._standby = EngineProcess(self._command)
                have_prepared(self._standby.socket, self._options, backend=self.client.info.backend)

    def _take_standby(self) -> EngineProcess | None:
        """The process that stands by, if there is one and it lives."""
        standby, self._standby = self._standby, None
        if standby is None:
            return None
        if standby.has_ended:
            standby.socket.close()
            return None
        standby.wake()
        return standby

    async def _end_standby(self) -> None:
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.socket.close()
            standby.wake()
            await asyncio.shield(asyncio.to_thread(standby.reap))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    def _engine_ready(self, info: EngineInfo) -> None:
        self._ready_since_s = time.monotonic()
        self._watcher.engine_ready(info)

    def _describe(self, status: int) -> str:
        """How the process ended, by its exit status, negative for a signal."""
        if self._stalled_s is not None:
            return f"made no progress for {self._stalled_s:g} s and was killed"
        if self.client.failure is not None:
            return f"could not start ({self.client.failure.message})"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def pause_before_restart(num_quick_deaths: int) -> float:
    """Seconds: none after the first death, then 0.5 doubling up to `LONGEST_PAUSE_S`."""
    return 0.0 if num_quick_deaths < 2 else min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(num_quick_deaths - 2, 10))
