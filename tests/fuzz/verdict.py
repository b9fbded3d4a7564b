"""What must hold of every answer, whatever was sent: no failure of ours, the route's error envelope, a stream that says how it ended."""

import json
from typing import Any

MAX_ERROR_BYTES = 4000


def complaint(path: str, status: int, headers: Any, content: bytes) -> str | None:
    """What is wrong with an answer; None if nothing is. A timeout that the request itself asked for is nothing wrong."""
    if "x-request-id" not in headers:
        return "no x-request-id"
    if status == 200:
        return _complaint_of_answer(headers.get("content-type", ""), content)
    if status >= 500 and status != 504:
        return f"status {status}"
    if len(content) > MAX_ERROR_BYTES:
        return f"an error of {len(content)} bytes"
    error = json.loads(content).get("error")
    if path.startswith("/v1/messages"):
        is_error = isinstance(error, dict) and {"type", "message"} <= set(error)
    else:
        is_error = isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}
    return None if is_error else f"not the error envelope: {content[:200]!r}"


def _complaint_of_answer(content_type: str, content: bytes) -> str | None:
    if not content_type.startswith("text/event-stream"):
        json.loads(content)
        return None
    events = [event for event in content.decode().split("\n\n") if event and not event.startswith(":")]
    if not events:
        return "a stream without an event"
    data = events[-1].rpartition("data: ")[2]
    if data == "[DONE]":
        return None
    last = json.loads(data)
    is_end = "error" in last or last.get("type") in (
        "message_stop",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    )
    return None if is_end else f"a stream that ends in {data:.200}"
