"""What happens to every request before and after its route: pure ASGI classes, outermost first as `server/app.py` lists them.

`RequestContext` gives the request an id, says it on the answer, and writes the access log. `LastAnswers` closes connections when the server
leaves. `HeaderLimit` refuses oversized headers.
`TidyPath` lets `/v1/models/` and `//v1/models` mean `/v1/models`. `BodyLimit` guards the body while a route reads it: a route that reads
nothing (an unknown one, a wrong method) is never asked for a content type.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTimeout, BodyTooLarge, HeadersTooLarge, Unavailable, UnsupportedBody, refusal_response, shortened
from server.limits import Limits

access_log = structlog.get_logger("access")

PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # asked every few seconds; logged at debug level only


class RequestContext:
    """A server-made id on every answer, bound to every log line of the request; one access-log line at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                log = access_log.debug if scope["path"] in PROBES else access_log.info
                log(
                    "request",
                    method=shortened(scope["method"], 20),
                    path=shortened(scope["path"], 100),
                    status=status,
                    duration_s=round(time.monotonic() - started, 4),
                )


class LastAnswers:
    """Close each connection after its next answer once the server is leaving: its client then finds another server, or the next one."""

    def __init__(self, app: ASGIApp, *, is_leaving: Callable[[], bool]) -> None:
        self.app = app
        self.is_leaving = is_leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self.is_leaving():
                headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"connection"]
                message["headers"] = [*headers, (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, send_last if scope["type"] == "http" else send)


class HeaderLimit:
    """Refuse a request whose path, query and headers together exceed the limit, or whose headers are too many."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self.app = app
        self.max_bytes = limits.max_header_bytes
        self.max_headers = limits.max_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complaint = self._complaint(scope) if scope["type"] == "http" else None
        if complaint is None:
            await self.app(scope, receive, send)
        else:
            await refusal_response(HeadersTooLarge(complaint), scope)(scope, receive, send)

    def _complaint(self, scope: Scope) -> str | None:
        target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size = target + sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self.max_bytes:
            return f"the request line and headers are {size:,} bytes, the limit is {self.max_bytes:,}"
        if len(scope["headers"]) > self.max_headers:
            return f"the request has {len(scope['headers']):,} headers, the limit is {self.max_headers:,}"
        return None


class TidyPath:
    """Drop doubled and trailing slashes, so that a base URL may end in one. No redirect: the Host header is never trusted."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/"
        await self.app(scope, receive, send)


class BodyLimit:
    """Decide about a body while it is read: its type and declared length before the first byte, its size and pace with every one."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.held = _HeldBytes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _GuardedBody(receive, headers=Headers(scope=scope), limits=self.limits, held=self.held)
        try:
            await self.app(scope, body, send)
        finally:
            self.held.num -= body.num_bytes  # a request keeps its body to its end


@dataclass(slots=True)
class _HeldBytes:
    """Of all bodies together."""

    num: int = 0


class _GuardedBody:
    """The `receive` of one request; raises the refusals of `server/errors.py` into whoever reads."""

    def __init__(self, receive: Receive, *, headers: Headers, limits: Limits, held: _HeldBytes) -> None:
        self.num_bytes = 0
        self._receive = receive
        self._headers = headers
        self._limits = limits
        self._held = held
        self._give_up_at: float | None = None
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        if self._give_up_at is None:
            self._give_up_at = asyncio.get_running_loop().time() + self._limits.body_timeout_s
            await self._check_declaration()
        message = await self._next_message()
        if message["type"] == "http.request":
            self._hold(len(message.get("body", b"")))
            self._is_complete = not message.get("more_body", False)
            if self.num_bytes > self._limits.max_body_bytes:
                await self._refuse_size(f"more than {self._limits.max_body_bytes:,} bytes")
        return message

    def _hold(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._held.num += num_bytes
        if self._held.num > self._limits.max_all_body_bytes:
            raise Unavailable(
                f"the server is full: the bodies of open requests are {self._held.num:,} bytes, "
                f"{self._limits.max_all_body_bytes:,} may be held at once",
                code="server_overloaded",
                retry_after_s=self._limits.retry_after_s,
            )

    async def _check_declaration(self) -> None:
        content_type = self._headers.get("content-type", "")
        essence, _, parameters = content_type.partition(";")
        charset = re.search(r"charset\s*=\s*\"?([^\s\";]*)", parameters, re.IGNORECASE)
        if essence.strip().lower() != "application/json" or (charset and charset[1].lower() not in ("utf-8", "utf8")):
            raise UnsupportedBody(
                f"the body's type is {shortened(content_type, 80)!r}; send it with 'Content-Type: application/json', in UTF-8"
            )
        encoding = self._headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedBody(f"the body is encoded as {shortened(encoding, 80)!r}; send it plain")
        declared = self._headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._limits.max_body_bytes:
            await self._refuse_size(f"{int(declared[:20]):,} bytes")

    async def _next_message(self) -> Message:
        try:
            async with asyncio.timeout_at(self._give_up_at):
                return await self._receive()
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {self._limits.body_timeout_s:g} seconds") from None

    async def _refuse_size(self, found: str) -> None:
        """Read on for a while before refusing: closing on a client that still sends would cost it the answer."""
        wants_permission = self._headers.get("expect", "").lower() == "100-continue" and self.num_bytes == 0
        discarded = 0
        while not wants_permission and not self._is_complete and discarded < self._limits.max_discarded_bytes:
            message = await self._next_message()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            discarded += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
        raise BodyTooLarge(f"the body is {found}, the limit is {self._limits.max_body_bytes:,}; send fewer or shorter prompts per request")
