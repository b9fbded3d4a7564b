"""Frames between server and engine process: a version, a length, a payload.

Three channels carry the same payloads. `BlockingChannel` is the engine's end of the socket pair (threads), `AsyncChannel` the server's
(asyncio), and `LoopbackChannel` the in-process twin for tests and simulation, in which nothing moves until `deliver` is called. What the
payloads mean is `engine/messages.py`'s business.

Memory stays bounded without queues of our own: the engine writes into the socket's buffer and waits when it is full, because a server that
falls behind should slow the engine down; after `SEND_TIMEOUT_S` without a byte taken, the reader counts as gone. The server reads whenever
bytes arrive and never waits for the engine, so that the two cannot block each other; it gives no further request to an engine that does
not read (`is_congested`).
"""

import asyncio
import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Protocol, cast

from engine.errors import TransportError

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 << 20  # the largest message is a request of a full context, some hundred kilobytes
MAX_UNSENT_BYTES = 1 << 20  # beside the kernel's buffers; the frame that reaches it is still taken
SEND_TIMEOUT_S = 30

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<BI")  # version, length of the payload
_RECEIVE_BYTES = 256 << 10
_BUFFER_BYTES = 1 << 20


class Channel(Protocol):
    """One end of a connection, as its user sees it."""

    def send(self, payload: bytes) -> None:
        """Frames leave in the order of the calls. On a closed channel this does nothing: its end is told in another way."""
        ...

    @property
    def is_congested(self) -> bool:
        """So much waits here for the other side, `MAX_UNSENT_BYTES`, that what can wait elsewhere should."""
        ...

    def close(self) -> None: ...


class FrameHandler(Protocol):
    """Whoever listens at an `AsyncChannel` or a `LoopbackChannel`."""

    def frame_received(self, payload: bytes) -> None: ...

    def channel_closed(self) -> None:
        """Called once, by either side's end."""
        ...


def to_frame(payload: bytes) -> bytes:
    """Raises `TransportError` for a payload over `MAX_FRAME_BYTES`."""
    _check_length(len(payload))
    return _HEADER.pack(PROTOCOL_VERSION, len(payload)) + payload


class FrameParser:
    """Cuts a stream of bytes, in pieces of any size, into payloads."""

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()
        self._wanted = _HEADER.size

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads completed by `data`. Raises `TransportError` for another version or a frame that is too long."""
        self._buffer += data
        if len(self._buffer) < self._wanted:
            return []
        received = bytes(self._buffer)
        payloads: list[bytes] = []
        start, end = 0, 0
        self._wanted = _HEADER.size
        while len(received) - start >= _HEADER.size:
            version, length = _HEADER.unpack_from(received, start)
            if version != PROTOCOL_VERSION:
                raise TransportError(
                    f"the other process speaks protocol version {version}, this one {PROTOCOL_VERSION}; "
                    "was the installation changed while the server ran? restart it"
                )
            _check_length(length, limit=self._max_frame_bytes)
            end = start + _HEADER.size + length
            if end > len(received):
                self._wanted = end - start
                break
            payloads.append(received[start + _HEADER.size : end])
            start = end
        del self._buffer[:start]
        return payloads


class BlockingChannel:
    """The engine's end. One thread iterates over `payloads`, any thread sends."""

    def __init__(self, sock: socket.socket, *, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        sock.set_inheritable(False)  # nothing that this process starts may hold the connection open after its death
        sock.setblocking(True)
        seconds = int(send_timeout_s)
        timeval = struct.pack("ll", seconds, int((send_timeout_s - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    def send(self, payload: bytes) -> None:
        """Raises `TransportError` when the other side took nothing for the send timeout; does nothing when it is gone."""
        frame = to_frame(payload)
        try:
            with self._sending:
                self._socket.sendall(frame)
        except BlockingIOError:
            raise TransportError("the server has stopped reading from the engine") from None
        except OSError:
            return

    def payloads(self) -> Iterator[bytes]:
        """Everything the other side sends, until it closes or dies. Raises `TransportError` as `FrameParser.feed` does."""
        parser = FrameParser()
        while data := self._receive():
            yield from parser.feed(data)

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except OSError:
            return b""


class AsyncChannel(asyncio.Protocol):
    """The server's end, on the running event loop; made by `open_channel`."""

    def __init__(self, handler: FrameHandler) -> None:
        self._handler = handler
        self._parser = FrameParser()
        self._transport: asyncio.Transport | None = None

    def send(self, payload: bytes) -> None:
        """Queues the frame, however many wait already: see `is_congested`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(to_frame(payload))

    @property
    def is_congested(self) -> bool:
        return self._transport is not None and self._transport.get_write_buffer_size() >= MAX_UNSENT_BYTES

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the base class

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._parser.feed(data):
                self._handler.frame_received(payload)
        except TransportError as error:
            log.error("the connection to the engine is closed: %s", error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._handler.channel_closed()


async def open_channel(sock: socket.socket, handler: FrameHandler) -> AsyncChannel:
    """Owns `sock` from here on."""
    sock.setblocking(False)
    _, channel = await asyncio.get_running_loop().create_unix_connection(lambda: AsyncChannel(handler), sock=sock)
    return channel


class LoopbackChannel:
    """One end of the in-process twin. Frames keep their encoded form and wait in order until the receiving end calls `deliver`."""

    def __init__(self) -> None:
        self.handler: FrameHandler | None = None
        self._parser = FrameParser()
        self._arrived: deque[bytes] = deque()
        self._peer: LoopbackChannel | None = None

    @classmethod
    def pair(cls) -> "tuple[LoopbackChannel, LoopbackChannel]":
        """Two connected ends; set `handler` on each before delivering."""
        one, other = cls(), cls()
        one._peer, other._peer = other, one
        return one, other

    @property
    def num_arrived(self) -> int:
        """Frames that wait to be delivered at this end."""
        return len(self._arrived)

    def send(self, payload: bytes) -> None:
        if self._peer is not None:
            self._peer._arrived.append(to_frame(payload))

    @property
    def is_congested(self) -> bool:
        return self._peer is not None and sum(map(len, self._peer._arrived)) >= MAX_UNSENT_BYTES

    def deliver(self, count: int | None = None) -> int:
        """Hand the first `count` frames, or all, to the handler; returns how many."""
        assert self.handler is not None, "set a handler before delivering"
        count = len(self._arrived) if count is None else min(count, len(self._arrived))
        for _ in range(count):
            for payload in self._parser.feed(self._arrived.popleft()):
                self.handler.frame_received(payload)
        return count

    def close(self) -> None:
        """Ends both directions: what has not been delivered is lost, as when a process dies."""
        peer, self._peer = self._peer, None
        if peer is None:
            return
        peer._peer = None
        for end in (self, peer):
            end._arrived.clear()
            if end.handler is not None:
                end.handler.channel_closed()


def _check_length(length: int, *, limit: int = MAX_FRAME_BYTES) -> None:
    if length > limit:
        raise TransportError(f"a frame of {length:,} bytes is over the limit of {limit:,}")
