"""A program at a terminal of its own, as a user sees it: what it shows, keys to press, Ctrl-C as the terminal sends it."""

import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CTRL_C, CTRL_D = "\x03", "\x04"

# In a session of its own, whose controlling terminal is stdin, where Ctrl-C counts, as it may not for tests in the background; then the
# program itself.
_LOGIN = "import os, signal, sys; os.login_tty(0); signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"


class PseudoTerminal:
    """Runs `command` until it ends."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.keyboard, screen = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOGIN, *command],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env=os.environ | {"TERM": "dumb", "COLUMNS": "200"} | environment,
        )
        os.close(screen)
        self.shown = ""
        self._num_seen = 0
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, text: str, *, within_s: float = 60.0) -> str:
        """What was shown since the last look, up to and with `text`."""
        give_up = time.monotonic() + within_s
        while (found := self.shown.find(text, self._num_seen)) < 0:
            assert time.monotonic() < give_up, f"no {text!r} in {self.shown[self._num_seen :]!r}"
            assert self._reader.is_alive() or text in self.shown[self._num_seen :], f"ended without {text!r}: {self.shown!r}"
            time.sleep(0.01)
        seen = self.shown[self._num_seen : found + len(text)]
        self._num_seen = found + len(text)
        return seen

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def wait(self, *, within_s: float = 60.0) -> int:
        """Its exit status."""
        status = self.process.wait(timeout=within_s)
        self._reader.join()
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        os.close(self.keyboard)

    def _read(self) -> None:
        with suppress(OSError):  # how a terminal says that nobody has it open any more
            while chunk := os.read(self.keyboard, 4096):
                self.shown += chunk.decode(errors="replace")


@contextmanager
def at_terminal(*command: str, **environment: str) -> Iterator[PseudoTerminal]:
    terminal = PseudoTerminal(*command, **environment)
    try:
        yield terminal
    finally:
        terminal.close()
