"""A server of the terminal's own, for the time that `complete` or `chat` runs and finds none.

`OwnServer` is the client's side: it starts this module as a process on a free port of this machine, shows how far the start has come, and
ends it. `main` is the process: a server as `grok-server serve` runs it, which ends when its stdin does. The system closes that for whoever
held the other end, so a client that is killed leaves nothing behind; the engine ends with its server as ever. It is in a session of its
own: Ctrl-C in the terminal is the client's alone. A key that nobody else knows keeps the other users of the machine out.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from engine.errors import EngineError
from server.engine_process import child_environment
from server.settings import ENV_PREFIX, load_settings

COMMAND = (sys.executable, "-P", "-m", "server.own_server")
OURS = {"host": "127.0.0.1", "port": 0, "nnodes": 1, "node_rank": 0, "engine_standby": False, "shutdown_notice": 0, "shutdown_timeout": 0}
NOT_OURS = ("API_KEY_FILE", "METRICS_PORT")  # settings of the operator's real server
END_GRACE_S = 10.0  # between the end of stdin and the end by force
POLL_S = 0.1


class OwnServerError(EngineError):
    """It did not start; the message is what it said."""

    def __init__(self, message: str, *, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class OwnServer:
    """Runs from the beginning of a `with` block, ready, to its end. Raises `OwnServerError` where it cannot start."""

    def __init__(self, *, model: Path | None) -> None:
        """`model` is a directory; None: what the settings name, else the model that comes along."""
        self.api_key = secrets.token_urlsafe(32)
        self._model = model
        self._url: str | None = None
        self._has_url = threading.Event()

    @property
    def url(self) -> str:
        assert self._url is not None, "known once it is ready"
        return self._url

    def __enter__(self) -> Self:
        environment = child_environment() | {f"{ENV_PREFIX}API_KEY": self.api_key}
        for name in NOT_OURS:
            environment.pop(f"{ENV_PREFIX}{name}", None)
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*COMMAND, *([str(self._model)] if self._model is not None else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )
        try:
            threading.Thread(target=self._read_output, daemon=True).start()
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end()

    def _read_output(self) -> None:
        """Its first line says where it listens. The rest is for operators, and read so that it never waits."""
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                if self._url is None and line.startswith(b"Starting "):
                    self._url = line.decode().split()[-1]
                    self._has_url.set()
        self._has_url.set()

    def _wait_until_ready(self) -> None:
        import httpx
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        terminal = Console(stderr=True)
        if terminal.is_terminal:
            terminal.print("No server runs here: starting one for the time being.", soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with (
            Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bars,
            httpx.Client(trust_env=False, timeout=None) as client,
        ):
            bar = bars.add_task("imports", total=100)
            self._has_url.wait()
            while self._process.poll() is None and self._url is not None:
                try:
                    answer = client.get(f"{self._url}/readyz")
                except httpx.TransportError:  # it ends
                    time.sleep(POLL_S)
                    continue
                if answer.status_code == 200:
                    return
                progress = cast("dict[str, Any]", answer.json())
                bars.update(bar, description=progress.get("phase") or "imports", completed=progress.get("percent") or 0)
                time.sleep(POLL_S)
        raise self._start_error()

    def _start_error(self) -> OwnServerError:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        told = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
        return OwnServerError(told or f"the server for the time being ended with status {status}", exit_status=max(status, 1))

    def _end(self) -> None:
        """Close its stdin and wait; a second Ctrl-C, or one that does not end, is no longer waited for."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=END_GRACE_S)
        except BaseException as error:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            self._log.close()


def main() -> None:
    """The process: serve the model directory of the command line, if there is one, until stdin ends."""
    from server.lifecycle import serve

    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        serve(load_settings(OURS | ({"model": sys.argv[1]} if sys.argv[1:] else {})))
    except EngineError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 2))


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
