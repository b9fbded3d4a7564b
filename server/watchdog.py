"""Watchdog: tells a hanging engine from a slow one by what it says.

A ready engine says something twice a second, idle or busy, so silence means that its process is stopped or its step hangs. While it starts,
silence means that the process is stopped, and longer, because importing the runtime from a cold disk stalls every thread of it. A start
that goes on saying that it lives but reports nothing new for `start_timeout_s` hangs as well: one tensor or program takes minutes at most.

Knows no clock and no process: `server/supervisor.py` looks at regular times and kills.
"""

from engine.types import Progress

STEPS_PER_TIMEOUT = 20  # a step may take this many times as long as the largest one did before readiness
START_SILENCE_S = 120.0


class Watchdog:
    """Watches one engine process. Counts looks, not seconds: whoever looks may have been held up, and the engine is heard late then."""

    def __init__(self, *, stall_timeout_s: float, start_timeout_s: float, look_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._start_timeout_s = start_timeout_s
        self._look_s = look_s
        self._num_frames = -1
        self._num_silent = 0  # looks in a row
        self._progress: Progress | None = None
        self._num_stuck = 0

    def look(self, *, num_frames: int, progress: Progress | None, step_s: float | None) -> float | None:
        """Seconds without a sign of life or without progress, once they are too many.

        `num_frames` counts what the engine has sent; `step_s`, how long its largest step takes, is None until it is ready.
        """
        self._num_silent = self._num_silent + 1 if num_frames == self._num_frames else 0
        self._num_stuck = self._num_stuck + 1 if step_s is None and progress == self._progress else 0
        self._num_frames, self._progress = num_frames, progress
        if step_s is None:
            silence_s = max(START_SILENCE_S, self._stall_timeout_s)
        else:
            silence_s = max(self._stall_timeout_s, STEPS_PER_TIMEOUT * step_s)
        for num_looks, limit_s in ((self._num_silent, silence_s), (self._num_stuck, self._start_timeout_s)):
            if num_looks * self._look_s >= limit_s:
                return limit_s
        return None
