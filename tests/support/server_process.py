"""The installed command as a real process, until it says that it is ready; and the same server over an engine without a model."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMAND = Path(sys.executable).with_name("grok-server")
ROOT = Path(__file__).resolve().parents[2]
COMPILE_CACHE = ROOT / ".pytest_cache" / "compiled"  # the second start of a session compiles nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A ready server."""

    url: str
    pid: int
    log: Path


@contextmanager
def running_server(directory: Path, *arguments: str, num_devices: int = 1) -> Iterator[RunningServer]:
    """Start `grok-server serve` on a free port; stops it with SIGTERM and asks for exit status 0. `directory` gets its log.

    Its engine finds as many devices as are asked for.
    """
    log = directory / "server.log"
    command = [COMMAND, "serve", "--port", "0", "--compile-cache-dir", str(COMPILE_CACHE), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GROK_SERVER_CHECK_SHAPES")}
    if num_devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as server,
    ):
        assert server.stdout is not None
        try:
            ready = next((match for line in server.stdout if (match := re.match(r"Ready on (http://\S+)", line))), None)
            assert ready, f"the server ended with status {server.wait()}: {log.read_text()[-2000:]}"
            yield RunningServer(url=ready[1], pid=server.pid, log=log)
        finally:
            server.terminate()
    assert server.returncode == 0, f"status {server.returncode} after SIGTERM: {log.read_text()[-2000:]}"


@contextmanager
def running_fake_server(*engine_arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `fake_engine_server.py`; gives its process, which the test may end, and its URL. No process stands by unless asked for."""
    command = [sys.executable, ROOT / "tests/support/fake_engine_server.py", ROOT / "tests/data/tiny-a", *engine_arguments]
    environment = {**os.environ, "GROK_SERVER_ENGINE_STANDBY": "false", **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            url = next(match[1] for line in server.stdout if (match := re.match(r"Ready on (http://\S+)", line)))
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield server, url
        finally:
            server.kill()
