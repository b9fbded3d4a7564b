"""An OpenAI-like server that says what it is told to, byte by byte, and remembers what it was asked: for tests of a client."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

DONE = b"data: [DONE]\n\n"


def completion_event(text: str) -> bytes:
    return _event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})


def chat_event(text: str) -> bytes:
    return _event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def error_event(message: str) -> bytes:
    return _event({"error": {"message": message, "type": "server_error", "param": None, "code": "internal_error"}})


def _event(content: object) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


@dataclass(kw_only=True)
class ScriptedServer:
    """Answers each request with the next of `refusals`, (status, code), while there are any; then with `chunks`, a pause before each."""

    chunks: Sequence[bytes] = (completion_event("Hello"), completion_event(" world"), DONE)
    pause_s: float = 0.0
    refusals: list[tuple[int, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_left: int = 0  # clients that closed the connection before the end

    def app(self) -> Starlette:
        routes = [Route(f"/v1/{path}", self._answer, methods=["POST"]) for path in ("completions", "chat/completions")]
        return Starlette(routes=routes)

    async def _answer(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        if self.refusals:
            status, code = self.refusals.pop(0)
            error = {"message": f"refused with {code}", "type": "invalid_request_error", "param": None, "code": code}
            return JSONResponse({"error": error}, status_code=status)
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[bytes]:
        try:
            for chunk in self.chunks:
                await asyncio.sleep(self.pause_s)
                yield chunk
        except asyncio.CancelledError:
            self.num_left += 1
            raise
