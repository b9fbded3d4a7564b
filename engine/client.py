"""The only door from the server to the engine.

The server's process holds one `RemoteEngineClient` for its whole life; `server/supervisor.py` connects it to one engine process after the
other. `generate` sends the request when it is first awaited and yields what the engine's steps add, up to and including the delta with a
finish reason. Closing the generator before that, by `aclose` or by cancelling the task that awaits it, aborts the generation, and the
engine frees its blocks within one step. When the process dies, every open generator raises `EngineDiedError`.

One callback decodes a frame, that is all deltas of a step, and wakes the generators concerned; there is no task per request in between.
What a slow reader leaves behind in its mailbox is bounded by the length of its own generation.
"""

import asyncio
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from engine.config import EngineOptions
from engine.errors import EngineDiedError, RequestError
from engine.messages import (
    Abort,
    Configure,
    Deltas,
    Failed,
    Ready,
    Refused,
    Report,
    Submit,
    decode_from_engine,
    encode,
)
from engine.transport import Channel, open_channel
from engine.types import EngineInfo, EngineStats, GenerationRequest, Progress, TokenDelta


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
        """After the last step that had news; zeros while no engine is ready."""
        ...

    @property
    def is_ready(self) -> bool:
        """Requests are taken now."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield the deltas of one generation; the last one, and only that, has a finish reason.

        Raises `RequestError` when the engine refuses the request, `EngineDiedError` when no engine is ready or its process ends meanwhile.
        """
        ...


class RemoteEngineClient:
    """An `EngineClient` over a channel to another process. Lives on one event loop and is called only there."""

    def __init__(
        self, *, on_progress: Callable[[Progress], None] | None = None, on_ready: Callable[[EngineInfo], None] | None = None
    ) -> None:
        self.info: EngineInfo | None = None
        self.progress: Progress | None = None
        self.stats = EngineStats()
        self.failure: str | None = None  # why the connected engine cannot start
        self.num_frames = 0  # received so far: a sign of life for whoever watches
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._channel: Channel | None = None
        self._is_ready = False
        self._disconnected = asyncio.Event()
        self._mailboxes: dict[str, _Mailbox] = {}

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @property
    def num_open(self) -> int:
        """Generations that have begun and not ended."""
        return len(self._mailboxes)

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
        mailbox = self._open(request)
        try:
            while True:
                delta = await mailbox.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._abandon(request.request_id, mailbox)

    def fail_open(self, reason: str) -> None:
        """Abort every open generation; its generator raises `EngineDiedError` with `reason`."""
        for request_id, mailbox in list(self._mailboxes.items()):
            mailbox.fail(EngineDiedError(reason))
            self._abandon(request_id, mailbox)

    def frame_received(self, payload: bytes) -> None:
        """Called by the channel. Raises `TransportError` for an unreadable message, upon which the channel closes."""
        self.num_frames += 1
        match decode_from_engine(payload):
            case Deltas(deltas=deltas, stats=stats):
                self.stats = stats
                self._deliver(deltas)
            case Refused(request_id=request_id, message=message):
                if mailbox := self._mailboxes.pop(request_id, None):
                    mailbox.fail(RequestError(message))
            case Report(progress=progress):
                self.progress = progress
                if self._on_progress is not None:
                    self._on_progress(progress)
            case Ready(info=info):
                self.info = info
                self.progress = None
                self.stats = EngineStats(num_blocks=info.num_blocks)
                self._is_ready = True
                if self._on_ready is not None:
                    self._on_ready(info)
            case Failed(message=message):
                self.failure = message

    def channel_closed(self) -> None:
        """Called by the channel when the engine process is gone."""
        self._channel = None
        self._is_ready = False
        self.progress = None
        self.stats = EngineStats()
        self.fail_open("the engine process ended")
        self._disconnected.set()

    def _open(self, request: GenerationRequest) -> "_Mailbox":
        if self._channel is None or not self._is_ready:
            raise EngineDiedError("no engine is ready; it is starting or restarting")
        assert request.request_id not in self._mailboxes, f"request id {request.request_id} is in use"
        mailbox = self._mailboxes[request.request_id] = _Mailbox()
        self._channel.send(encode(Submit(request)))
        return mailbox

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if delta.finish_reason is not None:
                self._mailboxes.pop(delta.request_id, None)
            if mailbox is not None:  # else it was aborted while the delta was on its way
                mailbox.put(delta)

    def _abandon(self, request_id: str, mailbox: "_Mailbox") -> None:
        if self._mailboxes.get(request_id) is mailbox:
            del self._mailboxes[request_id]
            if self._channel is not None:
                self._channel.send(encode(Abort(request_id)))


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
