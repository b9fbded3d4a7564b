"""The shape that errors have on Anthropic's paths: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

`server/errors.py` asks here for whatever refuses a request there, `server/answers/messages.py` for a stream that breaks. The status codes
are those of the other endpoints: what Anthropic answers with 529 is 503 here.
"""

from typing import Any

PATH = "v1/messages"  # and what is below it

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_anthropic_path(path: str) -> bool:
    """Whether a path is one of Anthropic's, however many slashes it has."""
    tidy = "/".join(part for part in path.split("/") if part)
    return tidy == PATH or tidy.startswith(f"{PATH}/")


def anthropic_error_body(*, status: int, message: str, request_id: str | None) -> dict[str, Any]:
    """Anthropic's error object; its type follows from the status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
