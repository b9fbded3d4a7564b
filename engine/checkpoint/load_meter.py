"""How far loading is, counted by the threads that load and told in one voice: never backwards, and whole at the end."""

import threading
import time
from collections.abc import Callable, Mapping

from engine.types import Progress

SECONDS_BETWEEN_REPORTS = 0.1  # each finished tensor is reported besides


class LoadMeter:
    """Counts the bytes that this process reads, by tensor."""

    def __init__(
        self, bytes_of: Mapping[str, int], *, report: Callable[[Progress], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left_of = dict(bytes_of)
        self._total = sum(bytes_of.values())
        self._num_tensors = len(bytes_of)
        self._report = report
        self._clock = clock
        self._start_s = self._last_s = clock()
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, name: str, num_bytes: int) -> None:
        """Some more of a tensor is read. What is told of it stays below all of it until it is `finished`."""
        with self._lock:
            counted = min(num_bytes, self._left_of[name])
            self._left_of[name] -= counted
            self._done += counted
            if self._clock() - self._last_s >= SECONDS_BETWEEN_REPORTS:
                self._tell(name)

    def finished(self, name: str) -> None:
        """A tensor is on its devices."""
        with self._lock:
            self._done += self._left_of.pop(name)
            self._tell(name)

    def _tell(self, name: str) -> None:
        self._last_s = self._clock()
        progress = Progress(
            phase="load",
            done=self._done,
            total=self._total,
            unit="bytes",
            detail=name,
            tensors_done=self._num_tensors - len(self._left_of),
            tensors_total=self._num_tensors,
            elapsed_s=self._last_s - self._start_s,
        )
        self._report(progress)
