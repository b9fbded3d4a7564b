"""EngineProcess: a child and our end of the connection to it.

Nothing else connects the two, and each sees the other's death as the end of the connection. Started on the server's main thread, with
whose end the kernel kills it. What is said over the connection is the client's business, when to start one the supervisor's.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from engine import config
from server.settings import ENV_PREFIX

STOP_GRACE_S = 5.0  # between the end of the connection and SIGKILL


class EngineProcess:
    """Runs from the moment it is made. Raises `OSError` where the system gives no further process or socket."""

    def __init__(self, command: Sequence[str]) -> None:
        self.socket, theirs = socket.socketpair()  # no path on disk, and passed on to the child alone
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # our stderr: stdout belongs to what the operator asked to see
                    env=child_environment(),
                )
        except BaseException:
            self.socket.close()
            raise

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wake(self) -> None:
        """Let it go on if somebody has stopped it."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()

    def reap(self) -> int:
        """Wait for a process whose connection is closed; blocks for the grace period at most. Returns its status, negative for a signal."""
        try:
            return self._process.wait(timeout=STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def child_environment() -> dict[str, str]:
    """Ours without the API keys, plus the way to the same `engine` package where it runs from a checkout that is not installed."""
    environment = {name: value for name, value in os.environ.items() if name != f"{ENV_PREFIX}API_KEY"}
    root = Path(config.__file__).parents[1]
    if root.name in ("site-packages", "dist-packages"):
        return environment
    path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(path)}
