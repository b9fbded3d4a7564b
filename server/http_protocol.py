"""uvicorn's connection, with bounds on what comes before a request exists: bytes and seconds of its head, and refusals in our envelope.

uvicorn hands a request to the application when its headers are complete, and until then keeps whatever arrives for as long as it takes.
`bounded_http(limits)` is what `uvicorn.Config(http=...)` takes.
"""

import asyncio
import json
import uuid
from http import HTTPStatus
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import ApiError, BodyTimeout, HeadersTooLarge, InvalidRequest, error_body
from server.limits import Limits


class BoundedHttp(HttpToolsProtocol):
    """One connection. A head that is too large is 431, one that comes too slowly 408, one that cannot be parsed 400; each closes."""

    limits: ClassVar[Limits] = Limits()

    _is_in_head = True
    _num_head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > self.limits.max_header_bytes:
            self._refuse(HeadersTooLarge(f"the request line and headers exceed {self.limits.max_header_bytes:,} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        self._num_head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(InvalidRequest("this is not a valid HTTP request"))

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.limits.body_timeout_s, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(BodyTimeout(f"the headers did not arrive within {self.limits.body_timeout_s:g} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Answer and close; only close where the answer would land inside another one, or where nobody has asked anything."""
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]
        if self._num_head_bytes and not is_answering:
            body = json.dumps(error_body(error)).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "x-request-id": uuid.uuid4().hex,
                **error.headers,
                "connection": "close",
            }
            head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
            self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.transport.close()


def bounded_http(limits: Limits) -> type[BoundedHttp]:
    """The connection class that keeps these limits."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits})
