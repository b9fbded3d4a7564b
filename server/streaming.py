"""Server-sent events: pieces of an answer as `data:` lines, comments while nothing comes, `[DONE]` at a normal end.

The status line is held back until the first piece is there (or the silence grows long enough for a keep-alive), so whatever fails before
still gets its own status. After that a failure is one `data: {"error": ...}` and the end: no finish reason, no `[DONE]`. A client that
leaves cancels the writer where it waits, and with it everything the request runs in the engine.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, InternalError
from server.generation import Generations, Update

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
Translation = Callable[[Exception], ApiError]

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves first: then `ClientDisconnect` is raised.

    `receive` must have given the whole body already; from then on all it has to tell is the disconnect.
    """
    async with asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(_outcome(work))
        listener = tasks.create_task(_wait_for_disconnect(receive))
        await asyncio.wait((worker, listener), return_when=asyncio.FIRST_COMPLETED)
        worker.cancel()
        listener.cancel()
    if worker.cancelled():
        raise ClientDisconnect
    result, error = worker.result()
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


class StreamedAnswer(Protocol):
    """What is written: see `server/answers/answer.py`."""

    @property
    def num_sequences(self) -> int: ...
    def run(self) -> Generations: ...
    def opening(self) -> list[bytes]: ...
    def events(self, updates: Iterable[Update]) -> list[bytes]: ...
    def closing(self) -> list[bytes]: ...
    def failure(self, error: ApiError) -> list[bytes]: ...


class EventStream(StreamingResponse):
    """A streamed answer. Raises, like a route, what goes wrong before the first byte."""

    def __init__(self, answer: StreamedAnswer, *, keep_alive_s: float, translate: Translation, headers: Mapping[str, str]) -> None:
        super().__init__((), media_type="text/event-stream", headers={**STREAM_HEADERS, **headers})
        self._answer = answer
        self._keep_alive_s = keep_alive_s
        self._translate = translate
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await unless_disconnected(receive, self.stream_response(send))
        except ClientDisconnect:
            if not self._has_started:  # afterwards there is no answer left to choose: Starlette would report its handler's as an error
                raise

    async def stream_response(self, send: Send) -> None:
        """Write everything, from the status line to the last byte."""
        async with self._answer.run() as generations:
            updates = await generations.next_updates(patience_s=self._keep_alive_s)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._has_started = True
            writer = _EventWriter(send, keep_alive_s=self._keep_alive_s)
            try:
                if opening := self._answer.opening():
                    await writer.write(opening)
                await self._write_pieces(updates, generations=generations, writer=writer)
                await writer.write(self._answer.closing())
            except Exception as error:
                await writer.write(self._failure(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write_pieces(self, updates: list[Update], *, generations: Generations, writer: "_EventWriter") -> None:
        num_open = self._answer.num_sequences
        while True:
            num_open -= sum(update.chunk.finish_reason is not None for update in updates)
            await writer.write(self._answer.events(updates))
            if not num_open:
                return
            updates = await generations.next_updates(patience_s=self._keep_alive_s)

    def _failure(self, error: Exception) -> list[bytes]:
        told = self._translate(error)
        if isinstance(told, InternalError):
            log.error("a stream failed after it began", exc_info=error)
        return self._answer.failure(told)


class _EventWriter:
    """Sends events, and a comment instead where the last bytes are too long ago."""

    def __init__(self, send: Send, *, keep_alive_s: float) -> None:
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._clock = asyncio.get_running_loop().time
        self._last_sent_s = float("-inf")

    async def write(self, events: list[bytes]) -> None:
        now = self._clock()
        if not events and now - self._last_sent_s < self._keep_alive_s * 0.9:
            return
        self._last_sent_s = now
        await self._send({"type": "http.response.body", "body": b"".join(events) or KEEPALIVE_COMMENT, "more_body": True})


def event(data: bytes, *, name: str | None = None) -> bytes:
    """One server-sent event of one line of data."""
    return format_sse_event(data_str=data.decode(), event=name)


async def _outcome(work: Coroutine[Any, Any, Result]) -> tuple[Result | None, Exception | None]:
    """What became of `work`, as a value: a task group would wrap an exception and cancel the neighbours."""
    try:
        return await work, None
    except Exception as error:
        return None, error


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
