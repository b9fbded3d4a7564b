"""Keeps one engine process running and the client connected to it.

The engine is a child with one end of a socket pair; nothing else connects the two, and each sees the other's death as the end of the
connection. A death is answered with a new process, at once the first time and after growing pauses while deaths repeat; what becomes of
the generations that ran in the dead one is the client's business. A process that its `Watchdog` finds hanging is killed, which makes a hang
one more death. An engine that says why it cannot start (`Failed`) is not tried again.

Runs on the server's event loop in its main thread, with whose end the kernel kills the engine; knows neither HTTP nor the terminal. What
happens is told to a `Watcher`.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from engine import config
from engine.client import RemoteEngineClient
from engine.config import EngineOptions
from engine.errors import EngineError
from engine.types import EngineInfo, Progress
from server.watchdog import Watchdog

ENGINE_COMMAND = (sys.executable, "-P", "-m", "engine")  # -P: a folder called engine where we were started is not ours
MAX_FAILED_STARTS = 3  # in a row
STABLE_S = 60.0  # an engine that was ready this long has left earlier deaths behind
LONGEST_PAUSE_S = 30.0
STOP_GRACE_S = 5.0  # between the end of the connection and SIGKILL
LOOKS_PER_TIMEOUT = 10  # at the engine


class EngineStartError(EngineError):
    """There will be no engine: it said why it cannot start, or ended too often before it was ready."""

    def __init__(self, message: str, *, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status  # what the server should end with


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
    ) -> None:
        self.client = RemoteEngineClient(on_progress=watcher.engine_progressed, on_ready=self._engine_ready)
        self._options = options
        self._watcher = watcher
        self._command = command
        self._stall_timeout_s = stall_timeout_s
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._ready_since_s: float | None = None
        self._stalled_s: float | None = None  # how long the last engine did nothing, where it was killed for that
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keep an engine running until `stop`. Raises `EngineStartError` when that is hopeless."""
        num_failed_starts = num_quick_deaths = 0
        while not self._stopping.is_set():
            status = await self._run_one_engine()
            if self._stopping.is_set():
                return
            if self.client.failure is not None:
                raise EngineStartError(self.client.failure, exit_status=2)
            ready_s = 0.0 if self._ready_since_s is None else time.monotonic() - self._ready_since_s
            num_failed_starts = num_failed_starts + 1 if self._ready_since_s is None else 0
            num_quick_deaths = num_quick_deaths + 1 if ready_s < STABLE_S else 1
            cause = self._describe(status)
            if num_failed_starts == MAX_FAILED_STARTS:
                raise EngineStartError(f"the engine {cause} {num_failed_starts} times in a row before it was ready", exit_status=1)
            pause_s = pause_before_restart(num_quick_deaths)
            self._watcher.engine_died(cause, pause_s=pause_s)
            await self._pause(pause_s)

    def stop(self) -> None:
        """Let `run` come to its end: the connection closes, the process ends, and if it does not, it is killed."""
        self._stopping.set()
        self.client.disconnect()

    def kill(self) -> None:
        """End the process now, whatever it does."""
        if self._process is not None:
            self._process.kill()

    async def _run_one_engine(self) -> int:
        """From the start of a process to its end; returns its exit status, negative for a signal."""
        self._ready_since_s = self._stalled_s = None
        ours, theirs = socket.socketpair()  # no path on disk, and passed on to the child alone
        with theirs:
            process = self._process = _start(self._command, theirs.fileno())
        watchdog: asyncio.Task[None] | None = None
        try:
            await self.client.connect_socket(ours, self._options)
            if self._stopping.is_set():
                self.client.disconnect()
            watchdog = asyncio.create_task(self._watch(process))
            await self.client.wait_disconnected()
        except asyncio.CancelledError:
            process.kill()
            raise
        finally:
            if watchdog is not None:
                watchdog.cancel()
            status = await asyncio.shield(asyncio.to_thread(_reap, process))
        return status

    async def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill an engine that hangs."""
        look_s = min(self._stall_timeout_s, self._start_timeout_s) / LOOKS_PER_TIMEOUT
        watchdog = Watchdog(stall_timeout_s=self._stall_timeout_s, start_timeout_s=self._start_timeout_s, look_s=look_s)
        while self._stalled_s is None:
            await asyncio.sleep(look_s)
            client = self.client
            step_s = client.info.step_s if client.is_ready and client.info is not None else None
            self._stalled_s = watchdog.look(num_frames=client.num_frames, progress=client.progress, step_s=step_s)
        process.kill()

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
        if self._stalled_s is not None:
            return f"made no progress for {self._stalled_s:g} s and was killed"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def pause_before_restart(num_quick_deaths: int) -> float:
    """Seconds: none after the first death, then 0.5 doubling up to `LONGEST_PAUSE_S`."""
    return 0.0 if num_quick_deaths < 2 else min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(num_quick_deaths - 2, 10))


def _start(command: Sequence[str], descriptor: int) -> "subprocess.Popen[bytes]":
    """The child's stdout is our stderr: stdout belongs to what the operator asked to see."""
    return subprocess.Popen(
        [*command, "--fd", str(descriptor)], pass_fds=(descriptor,), stdin=subprocess.DEVNULL, stdout=2, env=child_environment()
    )


def child_environment() -> dict[str, str]:
    """Ours, plus the way to the same `engine` package where it runs from a checkout that is not installed."""
    root = Path(config.__file__).parents[1]
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def _reap(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a process whose connection has closed; blocks for the grace period at most."""
    try:
        return process.wait(timeout=STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
