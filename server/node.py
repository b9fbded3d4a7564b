"""A machine that only computes: its engine processes follow the leader on the machine with node rank 0, which has the HTTP server.

No HTTP here. The processes end together, with the group, and this one with them and a status that is not 0, so that whatever runs it
starts it again: it then waits for the leader, which is restarted as well. SIGTERM lets them go on until the leader has ended, because a
cluster tells all machines at the same time and the leader still answers; a second one, or Ctrl-C, ends them at once.
"""

import queue
import signal
import threading
from collections.abc import Sequence
from functools import partial
from types import FrameType

from engine.client import have_follow, hear_follower
from engine.errors import EngineError
from engine.types import Progress
from server.console import Console
from server.engine_options import engine_options
from server.engine_process import STOP_GRACE_S, EngineProcess
from server.lifecycle import FAREWELL_S
from server.settings import Settings
from server.supervisor import ENGINE_COMMAND

START_FAILED = 2


class NodeError(EngineError):
    """The engine processes of this machine have ended, which nobody asked for."""

    def __init__(self, message: str, *, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def follow_until_signal(settings: Settings, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Run this machine's engine processes until the group or a signal ends them. Raises `NodeError` in the first case."""
    _Node(settings).run(engine_command)


class _Node:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._options = engine_options(settings)
        self._console = Console(url="", model_name=settings.model_name, has_tokenizer=False)
        self._ends: queue.SimpleQueue[tuple[int, str | None] | None] = queue.SimpleQueue()  # process and reason; None: stop now
        self._num_signals = 0

    def run(self, command: Sequence[str]) -> None:
        group = self._options.group
        assert group is not None, "a node with a rank above 0 is one of several"
        first = self._settings.node_rank * group.processes_per_node
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._signalled)
        self._console.following(self._settings.node_rank, group)
        processes = {process_id: EngineProcess(command) for process_id in range(first, first + group.processes_per_node)}
        try:
            for process_id, process in processes.items():
                have_follow(process.socket, self._options, process_id=process_id)
                threading.Thread(target=self._hear, args=(process_id, process, process_id == first), daemon=True).start()
            end = self._ends.get()
        finally:
            self._console.close()
            for process in processes.values():
                process.kill()
        statuses = {process_id: process.reap() for process_id, process in processes.items()}
        if self._num_signals or end is None:
            return
        process_id, reason = end
        if reason is not None:
            raise NodeError(reason, exit_status=START_FAILED)
        raise NodeError(f"process {process_id} of the group has ended, and this node with it", exit_status=max(1, statuses[process_id]))

    def _hear(self, process_id: int, process: EngineProcess, is_shown: bool) -> None:
        on_progress = self._console.engine_progressed if is_shown else partial(_ignore)
        try:
            reason = hear_follower(process.socket, on_progress=on_progress)
        except (OSError, EngineError):  # silent, or gone
            reason = None
        self._ends.put((process_id, reason))

    def _signalled(self, signum: int, _: FrameType | None) -> None:
        self._num_signals += 1
        if signum == signal.SIGINT or self._num_signals > 1:
            self._ends.put(None)
            return
        settings = self._settings
        longest_s = settings.shutdown_notice + settings.shutdown_timeout + FAREWELL_S + STOP_GRACE_S
        timer = threading.Timer(longest_s, self._ends.put, (None,))
        timer.daemon = True
        timer.start()


def _ignore(progress: Progress) -> None:
    """Of processes of the same machine that do the same, one is shown."""
