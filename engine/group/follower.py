"""Follower: an engine process that computes what the leader of its group tells it to, and decides nothing.

It connects to the leader, is told where the runtimes meet and what to build, builds it from its own machine's files, and from there on
makes every call of the leader's runner in the same order (`engine/group/calls.py`). Its results it never looks at.

The reader's thread ends the process where the leader does, is silent, or dismisses it: the main thread may be waiting for other processes
on the device, and would wait for ever.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Never, Protocol

from engine.config import EngineConfig
from engine.core import WarmRunner
from engine.errors import ConfigError, EngineError, TransportError
from engine.group.calls import FollowingRunner
from engine.group.channel import SILENCE_S, GroupChannel, connect
from engine.group.fingerprint import fingerprint
from engine.group.leader import FAREWELL_S, hello
from engine.group.messages import (
    Beat,
    Build,
    Built,
    Described,
    Devices,
    Dismissed,
    FromLeader,
    Join,
    Unable,
    decode_from_leader,
    encode,
)
from engine.messages import FOLLOWING, Follow
from engine.transport import MAX_FRAME_BYTES
from engine.types import Progress


class FollowingBuilder(Protocol):
    """What a follower does with jax; `engine/group/start.py` has the real one."""

    def join(self, coordinator: str) -> Devices:
        """Meet the other processes' runtimes. Raises `EngineError` for devices that cannot be shared."""
        ...

    def build(self, config: EngineConfig) -> Sequence[WarmRunner]:
        """One runner for each data shard. Raises `EngineError` as a leader's start does."""
        ...


class Follower:
    """Runs for the life of its process. `on_lost` and `on_dismissed` end it, with the cause, in whatever thread they are called."""

    def __init__(
        self,
        follow: Follow,
        *,
        report: Callable[[Progress], None],
        on_lost: Callable[[str], Never],
        on_dismissed: Callable[[str], Never],
    ) -> None:
        if follow.options.group is None:
            raise TransportError("the server lets a process follow without a group")
        self._options = follow.options
        self._group = follow.options.group
        self._process_id = follow.process_id
        self._report = report
        self._on_lost = on_lost
        self._on_dismissed = on_dismissed
        self._inbox: queue.SimpleQueue[FromLeader] = queue.SimpleQueue()
        self._is_over = threading.Event()  # this process has nothing more to do for the group

    def run(self, builder: FollowingBuilder) -> Never:
        """Raises `EngineError` where this process cannot follow, after the leader was told so."""
        described = Described(fingerprint(self._options.model, Path(self._options.model_dir)), self._options)
        channel = self._connect()
        channel.send(encode(hello(self._group, self._process_id)))
        channel.send(encode(described))
        channel.keep_beating()
        threading.Thread(target=self._read, args=(channel,), name="leader", daemon=True).start()
        try:
            runners = self._build(builder, channel)
        except EngineError as error:
            self._is_over.set()
            channel.send(encode(Unable(str(error))))
            time.sleep(FAREWELL_S)
            raise
        channel.expect_within(SILENCE_S)
        channel.send(encode(Built()))
        self._report(Progress(phase=FOLLOWING, done=1, total=1, unit="processes"))
        while True:
            call = self._inbox.get()
            if isinstance(call, Join | Build | Dismissed | Beat):
                raise TransportError(f"the leading process says {type(call).__name__} to one that follows already")
            runners[call.replica].make(call)

    def _build(self, builder: FollowingBuilder, channel: GroupChannel) -> list[FollowingRunner]:
        join = self._inbox.get()
        if not isinstance(join, Join):
            raise TransportError(f"the leading process says {type(join).__name__} first")
        channel.send(encode(builder.join(join.coordinator)))
        build = self._inbox.get()
        if not isinstance(build, Build):
            raise TransportError(f"the leading process says {type(build).__name__} where it should say what to build")
        return [FollowingRunner(runner) for runner in builder.build(build.config)]

    def _connect(self) -> GroupChannel:
        """Raises `ConfigError` where nobody is there in time."""
        host, port, timeout_s = self._group.host, self._group.port, self._group.start_timeout_s
        try:
            return GroupChannel(connect(host, port, timeout_s=timeout_s), max_frame_bytes=MAX_FRAME_BYTES)
        except OSError as error:
            raise ConfigError(
                f"no leader answers at {host}:{port} within {timeout_s:g} s ({error.strerror or error}): start the node with rank 0, and "
                "check --master-addr, --master-port and what lies between"
            ) from None

    def _read(self, channel: GroupChannel) -> None:
        cause = "has ended"
        try:
            for payload in channel.payloads():
                message = decode_from_leader(payload)
                if isinstance(message, Dismissed):
                    self._on_dismissed(message.reason)
                self._inbox.put(message)
        except TransportError as error:
            cause = str(error)
        if not self._is_over.is_set():
            self._on_lost(f"the leader of the group {cause}")
