"""uvicorn's connection, with bounds on all that is not yet, or not any more, a request of the application's.

uvicorn hands a request over when its headers are complete, and until then keeps whatever arrives for as long as it takes; it takes any
number of connections, requests in advance, and clients that never read. Here each of these has a limit, and a refusal is in our envelope:

    the head                  too large 431, too slow 408, not to be parsed 400; each closes
    around the body           400 for what cannot be parsed, or is mostly not body; trailers are dropped
    requests sent in advance  more than the limit close the connection
    a body after its answer   read for a while, so that the client sees the answer, then the connection is closed
    an answer nobody reads    ends the connection, and with it what the request runs
    connections               past the limit, the one that has waited longest for a request goes; where none waits, the new one is spare:
                              it may ask for the probes and is refused all else with 503, and of too many spare ones the oldest goes

`bounded_http(limits)` is what `uvicorn.Config(http=...)` takes, one class for each server.
"""

import asyncio
import fcntl
import struct
import termios
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import ClassVar
from urllib.parse import unquote

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.auth import is_open
from server.errors import ApiError, BodyTimeout, HeadersTooLarge, InvalidRequest, Unavailable, refusal_response
from server.limits import Limits
from server.middleware import RequestContext

_OFFER_TOKENS = (b"upgrade", b"http2-settings")
SPARE_CONNECTIONS = 32  # beyond the limit, for probes and to say no
MAX_FRAME_BYTES_PER_BYTE = 8  # of a chunked body; chunks of one byte have 5
MIN_TAKEN_BYTES = 16 * 1024  # what a client must take of its answer in each `write_timeout_s`, or all that is left


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[Limits] = Limits()
    waiting: ClassVar[dict["BoundedHttp", None]] = {}  # those of this server without a request, the longest first
    spare: ClassVar[dict["BoundedHttp", None]] = {}  # those beyond the limit, the oldest first

    _is_in_head = True
    _num_head_bytes = 0
    _num_body_bytes = 0
    _num_frame_bytes = 0  # around the body: lengths of chunks and what comes with them, trailers
    _num_late_bytes = 0  # of a body whose request is answered
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > self.limits.max_connections:
            if not self.waiting:
                self.spare[self] = None
                if len(self.spare) > SPARE_CONNECTIONS:
                    next(iter(self.spare))._leave()
                return
            next(iter(self.waiting))._leave()
        self.waiting[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_watching_reader()
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._is_in_head:
            self._num_head_bytes += len(data)
        else:
            self._num_frame_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._read_as_without_offer(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(InvalidRequest("this is not a valid HTTP request"))
        if self._is_in_head and self._num_head_bytes > self.limits.max_header_bytes:
            self._refuse(HeadersTooLarge(f"the request line and headers exceed {self.limits.max_header_bytes:,} bytes"))
        elif self._num_frame_bytes > max(self.limits.max_header_bytes, MAX_FRAME_BYTES_PER_BYTE * self._num_body_bytes):
            self._refuse(InvalidRequest("the body came in chunks that are mostly not body"))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self.limits.max_pipelined:
            raise InvalidRequest("too many requests were sent in advance")  # into the parser, which gives up
        super().on_message_begin()
        self._start_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise InvalidRequest("this is no proxy")  # into the parser, which gives up
        if self.parser.get_http_version() == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            raise InvalidRequest("not one Host")  # RFC 9112, 3.2; into the parser, which gives up
        if self.parser.should_upgrade():
            return
        self._num_body_bytes = self._num_frame_bytes = self._num_late_bytes = 0
        self._stop_timer()
        self.waiting.pop(self, None)
        if self in self.spare:
            if len(self.connections) <= self.limits.max_connections:
                del self.spare[self]
            elif not is_open(self._scope_so_far()):
                self.app = RequestContext(self._no_room)
        super().on_headers_complete()
        self._is_in_head = False

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._num_body_bytes += len(body)
        self._num_frame_bytes -= len(body)
        if self.cycle.response_complete:
            self._num_late_bytes += len(body)
            if self._num_late_bytes > self.limits.max_discarded_bytes:
                self._close()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_in_head = True
        self._num_head_bytes = self._num_frame_bytes = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self._stop_timer()
            self._wait_for_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()
        if not self.cycle.response_complete:  # of a request that was sent in advance
            return
        if self._is_in_head:
            self._wait_for_request()
        else:
            self._start_timer(self._close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_watching_reader()
        super().resume_writing()

    def _read_as_without_offer(self, rest: bytes) -> None:
        """Read a request that offers another protocol, HTTP/2 mostly, as if it did not: the parser stops behind the head of such a one,
        yet the body still belongs to it.
        """
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(token for token in value.split(b",") if token.strip().lower() not in _OFFER_TOKENS)
            if name != b"upgrade":
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self._num_head_bytes = 0
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _wait_for_request(self) -> None:
        """Be the one that has waited shortest."""
        if self.transport.is_closing():
            return
        if self not in self.spare:
            self.waiting.pop(self, None)
            self.waiting[self] = None
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _leave(self) -> None:
        """Make room at once, without a word."""
        self._forget()
        self.connections.discard(self)
        self.transport.abort()

    def _forget(self) -> None:
        self.waiting.pop(self, None)
        self.spare.pop(self, None)

    async def _no_room(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = Unavailable(
            f"the server is full: {self.limits.max_connections:,} connections are open",
            code="server_overloaded",
            retry_after_s=self.limits.retry_after_s,
        )
        response = refusal_response(refusal, scope)
        response.headers["connection"] = "close"
        await response(scope, receive, send)

    def _scope_so_far(self) -> Scope:
        """Method and path, before uvicorn fills its own scope."""
        return {"method": self.parser.get_method().decode("ascii"), "raw_path": self.url.partition(b"?")[0]}

    def _path_so_far(self) -> str:
        """Of the request whose head is being read, or has been; the empty string before there is one."""
        url: bytes = getattr(self, "url", b"")
        return unquote(url.partition(b"?")[0].decode("latin-1"))

    def _close(self) -> None:
        """Once what has been written is out."""
        self.transport.close()
        self._watch_reader()

    def _start_timer(self, then: Callable[[], None] | None = None) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.limits.body_timeout_s, then or self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(BodyTimeout(f"the headers did not arrive within {self.limits.body_timeout_s:g} seconds"))

    def _watch_reader(self) -> None:
        """See to it that the client takes what is there for it."""
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self._look_at_reader, self._num_unread_bytes())

    def _look_at_reader(self, num_unread_before: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() and num_unread_before - self._num_unread_bytes() < MIN_TAKEN_BYTES:
            self.transport.abort()
        else:
            self._watch_reader()

    def _num_unread_bytes(self) -> int:
        """Ours and the system's, which takes from us in large pieces only, however steadily the client reads."""
        (of_system,) = struct.unpack("i", fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4)))
        return self.transport.get_write_buffer_size() + of_system

    def _stop_watching_reader(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _can_answer(self) -> bool:
        if self.pipeline:
            return False
        if not self._is_in_head:
            return not self.cycle.response_started
        is_free = self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]
        return is_free and self._num_head_bytes > 0

    def _refuse(self, error: ApiError) -> None:
        """Answer and close; only close where the answer would land inside or before another one, or where nobody has asked anything."""
        if self.transport.is_closing():
            return
        if self._can_answer():
            if not self._is_in_head:
                self.cycle.disconnected = True  # what the application may still say comes too late
            request_id = uuid.uuid4().hex
            response = refusal_response(error, {"path": self._path_so_far(), "state": {"request_id": request_id}})
            response.headers.update({"x-request-id": request_id, "connection": "close"})
            head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
            head += [name + b": " + value for name, value in response.raw_headers]
            self.transport.write(b"\r\n".join([*head, b"", bytes(response.body)]))
        self._close()


def bounded_http(limits: Limits) -> type[BoundedHttp]:
    """The connection class that keeps these limits."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits, "waiting": {}, "spare": {}})
