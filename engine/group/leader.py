"""Group: the leading process's side of several engine processes that serve one model together.

The engine process that the server talks to leads: it has the scheduler, and listens for the others. It starts those of its own machine
itself; those of other machines are `grok-server serve` with another node rank. Nobody serves before all are here and agree on version,
model and settings: whoever does not is dismissed with the reason. From then on the group lives and dies as one. The end of any
connection, or silence on it, ends this process from the thread that notices, whatever the main thread waits for on the device; the others
see that and end.

Two threads per follower, one that reads and one that beats. The main thread sends each call of the runner (`engine/group/calls.py`).
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Never, cast

from engine.config import EngineConfig, EngineOptions, GroupConfig
from engine.core import WarmRunner
from engine.errors import ConfigError, TransportError
from engine.group.calls import LeadingRunner
from engine.group.channel import SILENCE_S, START_SILENCE_S, GroupChannel, listen
from engine.group.fingerprint import fingerprint
from engine.group.messages import (
    Build,
    Built,
    Described,
    Devices,
    Dismissed,
    FromLeader,
    Hello,
    Join,
    Unable,
    decode_from_follower,
    encode,
)
from engine.messages import Follow
from engine.messages import encode as encode_for_engine
from engine.transport import to_frame
from engine.types import Progress

ENGINE_COMMAND = (sys.executable, "-P", "-m", "engine")
MAX_FRAME_BYTES = 1 << 20  # from a follower; what it says is small
MAX_STRANGERS = 64  # connections at a time of which it is not known who they are
HELLO_TIMEOUT_S = 10.0
FAREWELL_S = 2.0  # for the others to read why they are dismissed
NAME_TIMEOUT_S = 60.0  # for the leader's own name to be known
START_FAILED = 2  # status of an engine process that a restart does not cure
SIBLING_TIMEOUT_S = 120.0  # of a process on this machine, to say hello: importing the runtime from a cold disk takes long
LOOK_S = 0.2  # between looks at the processes that were started here


def hello(group: GroupConfig, process_id: int) -> Hello:
    """What this process says of itself."""
    return Hello(version("grok-server"), version("jax"), process_id, group.num_processes)


class Group:
    """Made complete by `gather`. `on_lost` and `on_unable` are called in a thread of its own, with the cause, and end the process."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        report: Callable[[Progress], None],
        on_lost: Callable[[str], Never],
        on_unable: Callable[[str], Never],
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        assert options.group is not None, "a single process is no group"
        self.config = options.group
        self._options = options
        self._fingerprint = fingerprint(options.model, Path(options.model_dir))
        self._report = report
        self._on_lost = on_lost
        self._on_unable = on_unable
        self._command = command
        self._changed = threading.Condition()  # guards all below
        self._members: dict[int, GroupChannel] = {}
        self._devices: dict[int, Devices] = {}
        self._built: set[int] = set()
        self._num_strangers = 0
        self._refusal = ""  # the last one
        self._is_complete = False
        self._is_dismissed = False
        self._siblings: dict[int, tuple[subprocess.Popen[bytes], socket.socket]] = {}

    def gather(self) -> None:
        """Wait until everybody is here. Raises `ConfigError` where the address cannot be had, or somebody does not come in time."""
        group = self.config
        try:
            listener = _listen(group)
        except OSError as error:
            raise ConfigError(
                f"cannot wait for the other processes on {group.host}:{group.port} ({error.strerror}): --master-addr must be an address of "
                "the node with rank 0, and --master-port free there"
            ) from None
        with listener:
            threading.Thread(target=self._accept, args=(listener,), name="group", daemon=True).start()
            port = int(listener.getsockname()[1])
            for process_id in range(1, group.processes_per_node):
                self._start_sibling(process_id, port=port)
            self._wait_until_all_are_here(port)
            with suppress(OSError):  # who comes now finds nobody, rather than a queue that nobody looks at any more
                listener.shutdown(socket.SHUT_RDWR)

    def join(self, coordinator: str) -> None:
        """Tell everybody where the runtimes meet."""
        self._send(Join(coordinator))

    def devices(self) -> list[Devices]:
        """What the others compute on, once all have told it."""
        self._wait(lambda: len(self._devices) == self.config.num_processes - 1)
        return [devices for _, devices in sorted(self._devices.items())]

    def build(self, config: EngineConfig) -> None:
        """Let everybody build the same."""
        self._send(Build(config))

    def wait_until_built(self) -> None:
        """From here on the others follow every call, and silence is noticed sooner."""
        self._wait(lambda: len(self._built) == self.config.num_processes - 1)
        for channel in self._members.values():
            channel.expect_within(SILENCE_S)

    def lead(self, runner: WarmRunner, *, replica: int) -> LeadingRunner:
        """The same runner, with every call made by the others, too."""
        return LeadingRunner(runner, replica=replica, send=self._send)

    def dismiss(self, reason: str) -> None:
        """End all others for a reason that a restart does not cure, before this process ends for it."""
        with self._changed:
            self._is_dismissed = True
        self._send(Dismissed(reason))
        with self._changed:
            self._changed.wait_for(lambda: not self._members, timeout=FAREWELL_S)

    def _send(self, message: FromLeader) -> None:
        frame = to_frame(encode(message))
        for channel in list(self._members.values()):
            channel.send_frame(frame)

    def _wait(self, is_so: Callable[[], bool]) -> None:
        """However long it takes: who is lost or unable ends this process, and the server ends one that gets nowhere."""
        with self._changed:
            self._changed.wait_for(is_so)

    def _start_sibling(self, process_id: int, *, port: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*self._command, "--fd", str(theirs.fileno())], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2
            )
        ours.shutdown(socket.SHUT_RD)  # what it has to say it says over the group's connection
        options = replace(self._options, group=replace(self.config, port=port))
        with suppress(OSError):  # it has ended already, which shows while it is waited for
            ours.sendall(to_frame(encode_for_engine(Follow(options, process_id))))
        self._siblings[process_id] = process, ours  # ours stays open: its end would end the sibling

    def _wait_until_all_are_here(self, port: int) -> None:
        group = self.config
        siblings_late_s, give_up_s = (time.monotonic() + wait_s for wait_s in (SIBLING_TIMEOUT_S, group.start_timeout_s))
        num_here = -1
        while True:
            with self._changed:
                if len(self._members) == num_here:
                    self._changed.wait(LOOK_S)
                num_here, missing = len(self._members), sorted(set(range(1, group.num_processes)) - self._members.keys())
                self._is_complete = not missing  # from here on whoever leaves is lost
            detail = f"waiting on {group.host}:{port}" if missing else ""
            self._report(Progress(phase="group", done=num_here + 1, total=group.num_processes, unit="processes", detail=detail))
            if not missing:
                return
            for process_id in self._siblings.keys() & set(missing):
                self._look_at_sibling(process_id, is_late=time.monotonic() >= siblings_late_s)
            if time.monotonic() >= give_up_s:
                raise ConfigError(
                    f"{len(missing)} of {group.num_processes} processes of the group did not come to {group.host}:{port} within "
                    f"{group.start_timeout_s:g} s: start the nodes with rank {_nodes(missing, group)}, with the same --nnodes, "
                    f"--processes-per-node, --master-addr and --master-port{self._refusal}"
                )

    def _look_at_sibling(self, process_id: int, *, is_late: bool) -> None:
        """Of one that is not here yet. Where it was killed, or is stopped, the next start may do better; else raises `ConfigError`."""
        status = self._siblings[process_id][0].poll()
        if status is None and is_late:
            self._on_lost(f"process {process_id} of the group said nothing for {SIBLING_TIMEOUT_S:g} s after its start")
        if status is not None:
            cause = f"process {process_id} of the group ended with status {status} before it was here{self._refusal}"
            if status != START_FAILED:
                self._on_lost(cause)
            raise ConfigError(cause)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed: everybody is here
                return
            with self._changed:
                is_one_too_many = self._num_strangers == MAX_STRANGERS
                self._num_strangers += not is_one_too_many
            if is_one_too_many:
                sock.close()
            else:
                threading.Thread(target=self._listen_to, args=(sock,), name="follower", daemon=True).start()

    def _listen_to(self, sock: socket.socket) -> None:
        """From hello to the end of one connection, in a thread of its own."""
        try:
            channel = GroupChannel(sock, max_frame_bytes=MAX_FRAME_BYTES, silence_s=HELLO_TIMEOUT_S)
            process_id = self._admit(channel)
        except OSError:  # gone already
            return
        finally:
            with self._changed:
                self._num_strangers -= 1
        if process_id is None:
            return
        channel.expect_within(START_SILENCE_S)
        cause = "has ended"
        try:
            for payload in channel.payloads():
                self._take(process_id, decode_from_follower(payload))
        except TransportError as error:
            cause = str(error)
        self._lose(process_id, channel, cause)

    def _admit(self, channel: GroupChannel) -> int | None:
        """The process's number; None where it was dismissed, or no follower at all."""
        try:
            payloads = channel.payloads()
            with _closing(channel, after_s=HELLO_TIMEOUT_S):  # a byte now and then is no hello
                first, second = next(payloads), next(payloads)
            said = decode_from_follower(first)
            if not isinstance(said, Hello):
                raise TransportError("a following process did not say hello")
            objection = self._objection(said) or self._objection_to(decode_from_follower(second))
        except (TransportError, StopIteration) as error:
            objection, said = str(error), None
        with self._changed:
            if said is not None and not objection and (self._is_complete or said.process_id in self._members):
                objection = f"process {said.process_id} is in the group already: each node needs a rank of its own"
            if said is not None and not objection:
                self._members[said.process_id] = channel
                channel.keep_beating()
                self._changed.notify_all()
                return said.process_id
        if said is not None or objection:
            who = f"process {said.process_id} at {channel.peer}" if said is not None else channel.peer
            print(f"engine: {who} is dismissed: {objection}", file=sys.stderr, flush=True)
            self._refusal = f"; {who} came and was dismissed: {objection}"
            channel.send(encode(Dismissed(objection)))
        channel.finish()
        return None

    def _objection(self, said: Hello) -> str:
        """Why a process of this kind cannot be here; empty if it can."""
        group, ours = self.config, hello(self.config, 0)
        if (said.version, said.jax_version) != (ours.version, ours.jax_version):
            return (
                f"it runs grok-server {said.version} with jax {said.jax_version}, the leader {ours.version} with {ours.jax_version}: "
                "install the same everywhere"
            )
        if said.num_processes != group.num_processes or not 0 < said.process_id < group.num_processes:
            return (
                f"it is process {said.process_id} of {said.num_processes}, the leader counts {group.num_processes}: give all nodes "
                "the same --nnodes and --processes-per-node, and ranks from 0 up"
            )
        return ""

    def _objection_to(self, described: Any) -> str:
        """Why it cannot serve the same; empty if it can."""
        if not isinstance(described, Described):
            raise TransportError("a following process did not describe itself")
        if difference := _difference(described.options, self._options):
            return f"its settings differ: {difference}; give all nodes the same settings and the same model"
        if described.fingerprint != self._fingerprint:
            return "its model directory holds files of other names or sizes than the leader's: copy the same checkpoint to all nodes"
        return ""

    def _take(self, process_id: int, message: object) -> None:
        with self._changed:
            if isinstance(message, Devices):
                self._devices[process_id] = message
            elif isinstance(message, Built):
                self._built.add(process_id)
            self._changed.notify_all()
        if isinstance(message, Unable):
            self._on_unable(f"process {process_id} at {self._members[process_id].peer}: {message.reason}")

    def _lose(self, process_id: int, channel: GroupChannel, cause: str) -> None:
        channel.close()
        with self._changed:
            self._members.pop(process_id)
            self._changed.notify_all()
            is_end = self._is_complete and not self._is_dismissed
        if is_end:
            self._on_lost(f"process {process_id} at {channel.peer} {cause}, and the group ends with it")


@contextmanager
def _closing(channel: GroupChannel, *, after_s: float) -> Generator[None]:
    """Close the channel if the context lasts longer."""
    timer = threading.Timer(after_s, channel.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _listen(group: GroupConfig) -> socket.socket:
    """Tries for a while where the name is not known: a cluster may make it when this process runs already. Raises `OSError`."""
    give_up_s = time.monotonic() + min(NAME_TIMEOUT_S, group.start_timeout_s)
    while True:
        try:
            return listen(group.host, group.port)
        except socket.gaierror:
            if time.monotonic() >= give_up_s:
                raise
        time.sleep(LOOK_S)


def free_port(host: str) -> int:
    """One that nobody listens on now, another each time."""
    with listen(host, 0) as listener:
        return int(listener.getsockname()[1])


def _difference(theirs: EngineOptions, ours: EngineOptions) -> str:
    """The first thing in which two nodes' settings differ, paths aside, which are each machine's own."""
    there, here = (asdict(replace(side, model_dir="", tokenizer_path=None, compile_cache_dir=None, group=None)) for side in (theirs, ours))
    return next(_differences(there, here), "")


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key, value in cast("dict[str, Any]", ours).items():
            yield from _differences(cast("dict[str, Any]", theirs).get(key), value, f"{name}.{key}" if name else key)
    elif theirs != ours:
        yield f"{name} is {theirs} there and {ours} at the leader"


def _nodes(process_ids: Sequence[int], group: GroupConfig) -> str:
    return ", ".join(str(rank) for rank in sorted({process_id // group.processes_per_node for process_id in process_ids}))
