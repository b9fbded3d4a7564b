"""The only door from the server to the engine.

The server's process holds one `RemoteEngineClient` for its whole life; `server/supervisor.py` connects it to one engine process after the
other. `generate` sends the request when it is first awaited and yields what the engine's steps add, up to and including the delta with a
finish reason. Closing the generator before that, by `aclose` or by cancelling the task that awaits it, aborts the generation, and the
engine frees its blocks within one step.

The death of an engine process is a pause: `engine/journal.py` keeps what every open generation needs to go on, and the next process is
given all of it as soon as it is ready. Deadlines that pass meanwhile are kept here, by one timer.

One callback decodes a frame, that is all deltas of a step, and wakes the generators concerned; there is no task per request in between.
What a slow reader leaves behind in its mailbox is bounded by the length of its own generation.
"""

import asyncio
import math
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from typing import Protocol

from engine.config import EngineOptions
from engine.errors import NoEngineError
from engine.journal import Entry, Journal
from engine.messages import (
    FOLLOWING,
    Abort,
    Begun,
    Configure,
    Deltas,
    Failed,
    Follow,
    Prepare,
    Queued,
    Ready,
    Refused,
    Report,
    decode_from_engine,
    encode,
)
from engine.transport import Channel, FrameParser, open_channel, to_frame
from engine.types import EngineInfo, EngineStats, GenerationRequest, Progress, TokenDelta

START_SILENCE_S = 120.0  # of a process that follows a group's leader, before it is ready
FOLLOWING_SILENCE_S = 6.0


class EngineClient(Protocol):
    """What the HTTP side knows of the engine."""

    @property
    def info(self) -> EngineInfo | None:
        """None until the first engine process is ready; stays while a later one starts."""
        ...

    @property
    def progress(self) -> Progress | None:
        """How far a start has come; None before its first report and once it is over."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Gauges of the engine as of its last news, zeros while none is ready; totals over all engine processes so far."""
        ...

    @property
    def is_ready(self) -> bool:
        """An engine runs. Without one, requests wait, once the first has been ready."""
        ...

    @property
    def num_held(self) -> int:
        """Open generations that no engine has now: they wait for the next one, or while others are tried."""
        ...

    @property
    def num_restarts(self) -> int:
        """Engine processes that became ready after the first one."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield the deltas of one generation; the last one, and only that, has a finish reason.

        Raises `RequestError` when an engine refuses the request; `EngineDiedError` when the engine process ends wherever this request runs;
        `NoEngineError` before the first engine is ready, and at the end of the server.
        """
        ...


class RemoteEngineClient:
    """An `EngineClient` over a channel to another process. Lives on one event loop and is called only there."""

    def __init__(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_ready: Callable[[EngineInfo], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info: EngineInfo | None = None
        self.progress: Progress | None = None
        self.failure: Failed | None = None  # why the connected engine cannot start
        self.num_frames = 0  # received so far: a sign of life for whoever watches
        self.num_restarts = 0
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._clock = clock
        self._channel: Channel | None = None
        self._is_ready = False
        self._disconnected = asyncio.Event()
        self._journal = Journal()
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._stats = EngineStats()  # of the connected engine
        self._past_stats = EngineStats()  # totals of the engines before
        self._end: str | None = None  # why no generation can begin any more

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @property
    def num_open(self) -> int:
        """Generations that have begun and not ended."""
        return len(self._journal)

    @property
    def num_held(self) -> int:
        return self._journal.num_held

    @property
    def is_searching(self) -> bool:
        """Requests are being tried for ending the engine: deaths are to be expected, a bounded number of them."""
        return self._journal.is_searching

    @property
    def stats(self) -> EngineStats:
        return _with_totals(self._stats, self._past_stats)

    async def connect_socket(self, sock: socket.socket, options: EngineOptions) -> None:
        """Own a socket whose other end a new engine process holds, and tell that what to build."""
        self.connect(await open_channel(sock, self), options)

    def connect(self, channel: Channel, options: EngineOptions) -> None:
        """Start talking to a new engine process. The one before must be disconnected."""
        assert self._channel is None, "still connected to another engine"
        self._channel = channel
        self.failure = None
        self._disconnected.clear()
        channel.send(encode(Configure(options)))

    def disconnect(self) -> None:
        """Close the connection, which ends the engine process."""
        if self._channel is not None:
            self._channel.close()

    async def wait_disconnected(self) -> None:
        """Return when the engine process has closed its end, which it does by ending."""
        await self._disconnected.wait()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See `EngineClient.generate`."""
        if self.info is None or self._end is not None:
            raise NoEngineError(self._end or "no engine has been ready yet; the first one is still starting")
        mailbox = _Mailbox()
        entry = self._journal.open(request, mailbox)
        try:
            self._submit_due()
            self._watch_deadlines()
            while True:
                delta = await mailbox.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._abandon(entry)

    def fail_open(self, reason: str) -> None:
        """End every open generation, and every one that begins later: its generator raises `NoEngineError` with `reason`."""
        self._end = reason
        self._abort(self._journal.fail_all(reason))

    def frame_received(self, payload: bytes) -> None:
        """Called by the channel. Raises `TransportError` for an unreadable message, upon which the channel closes."""
        self.num_frames += 1
        match decode_from_engine(payload):
            case Deltas(deltas=deltas, stats=stats):
                self._stats = stats
                self._journal.record(deltas)
            case Queued(request_ids=request_ids):
                self._journal.queued(request_ids)
            case Begun(request_ids=request_ids):
                self._journal.begun(request_ids)
            case Refused(request_id=request_id, message=message):
                self._journal.refuse(request_id, message)
            case Report(progress=progress):
                self.progress = progress
                if self._on_progress is not None:
                    self._on_progress(progress)
            case Ready(info=info):
                self._become_ready(info)
            case Failed() as failed:
                self.failure = failed
        self._submit_due()

    def channel_closed(self) -> None:
        """Called by the channel when the engine process is gone. What it ran waits for the next one."""
        self._channel = None
        self._is_ready = False
        self.progress = None
        self._past_stats, self._stats = _with_totals(EngineStats(), self.stats), EngineStats()
        self._journal.engine_died()
        self._watch_deadlines()
        self._disconnected.set()

    def _become_ready(self, info: EngineInfo) -> None:
        self.num_restarts += self.info is not None
        self.info = info
        self.progress = None
        self._stats = EngineStats(num_blocks=info.num_blocks)
        self._is_ready = True
        if self._on_ready is not None:
            self._on_ready(info)

    def _submit_due(self) -> None:
        """Not to an engine that does not read: what clients give up meanwhile need never be sent. Its next sign of life leads here."""
        if self._is_ready and self._channel is not None and self._journal.num_held and not self._channel.is_congested:
            for submit in self._journal.due():
                self._channel.send(encode(submit))

    def _abandon(self, entry: Entry) -> None:
        if self._journal.close(entry):
            self._abort([entry.request.request_id])
        self._submit_due()

    def _abort(self, request_ids: Iterable[str]) -> None:
        if self._channel is not None:
            for request_id in request_ids:
                self._channel.send(encode(Abort(request_id)))

    def _watch_deadlines(self) -> None:
        """Be called at the next one that is to be kept here; once too often does no harm."""
        timer, expiry_s = self._deadline_timer, self._journal.next_expiry_s
        if expiry_s == math.inf:
            return
        loop = asyncio.get_running_loop()
        wait_s = max(0.0, expiry_s - self._clock())
        if timer is not None:
            if timer.when() <= loop.time() + wait_s:
                return
            timer.cancel()
        self._deadline_timer = loop.call_later(wait_s, self._expire)

    def _expire(self) -> None:
        self._deadline_timer = None
        self._abort(self._journal.expire(self._clock()))
        self._submit_due()
        self._watch_deadlines()


def _with_totals(stats: EngineStats, past: EngineStats) -> EngineStats:
    """The gauges of `stats`, and the running totals of both."""
    return replace(
        stats,
        num_steps=past.num_steps + stats.num_steps,
        num_preemptions=past.num_preemptions + stats.num_preemptions,
        num_lookup_tokens=past.num_lookup_tokens + stats.num_lookup_tokens,
        num_hit_tokens=past.num_hit_tokens + stats.num_hit_tokens,
        num_late_compilations=past.num_late_compilations + stats.num_late_compilations,
    )


def have_prepared(sock: socket.socket, options: EngineOptions, *, backend: str) -> None:
    """Tell a new engine process to stand by for `options`; `RemoteEngineClient.connect_socket` lets it become the engine.

    Raises `OSError` if it has ended already.
    """
    sock.sendall(to_frame(encode(Prepare(options, backend))))


def have_follow(sock: socket.socket, options: EngineOptions, *, process_id: int) -> None:
    """Tell a new engine process to follow the leader of the group in `options`. Raises `OSError` if it has ended already."""
    sock.sendall(to_frame(encode(Follow(options, process_id))))


def hear_follower(sock: socket.socket, *, on_progress: Callable[[Progress], None]) -> str | None:
    """What a process that follows says, until it ends; returns why it could not, if it said that.

    Raises `TimeoutError` where it is silent, and so stopped. Blocks: for a thread of its own.
    """
    parser = FrameParser()
    sock.settimeout(START_SILENCE_S)
    while data := sock.recv(1 << 16):
        for message in map(decode_from_engine, parser.feed(data)):
            if isinstance(message, Failed):
                return message.message
            if isinstance(message, Report):
                on_progress(message.progress)
                if message.progress.phase == FOLLOWING:
                    sock.settimeout(FOLLOWING_SILENCE_S)
    return None


class _Mailbox:
    """Deltas of one generation that its generator has not taken yet. A queue for exactly one reader."""

    __slots__ = ("_deltas", "_error", "_waiter")

    def __init__(self) -> None:
        self._deltas: deque[TokenDelta] = deque()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: TokenDelta) -> None:
        self._deltas.append(delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        """What arrived before is still taken first."""
        self._error = error
        self._wake()

    async def take(self) -> TokenDelta:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._deltas.popleft()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
