"""What the server answers when it does not answer what was asked, and the one translation of all of it to OpenAI's error body.

    ApiError                         status  code
    ├── InvalidRequest               400     null             `param` names the field
    │   ├── ContextLengthExceeded    400     context_length_exceeded
    │   ├── PreviousResponseNotFound 400     previous_response_not_found
    │   └── GrammarLimit             400     grammar_limit
    ├── WrongKey                     401     invalid_api_key
    ├── ModelNotFound                404     model_not_found
    ├── ResponseNotFound             404     null
    ├── BodyTimeout                  408     body_timeout
    ├── BodyTooLarge                 413     body_too_large
    ├── UnsupportedBody              415     unsupported_body
    ├── QuotaExceeded                429     rate_limit_exceeded
    ├── HeadersTooLarge              431     headers_too_large
    ├── InternalError                500     internal_error
    ├── Unavailable                  503     server_overloaded, shutting_down, model_loading, engine_restarting
    └── DeadlineExceeded             504     deadline_exceeded

The body is `{"error": {"message", "type", "param", "code"}}`: all four always there, `type` is `invalid_request_error` below 500 and
`server_error` from there on (with 429, as OpenAI has it, what there is too much of: `requests` or `tokens`), `code` a string or null,
`param` a bare field name or null. On Anthropic's paths it has the shape of `server/anthropic_errors.py`. What a retry cannot cure says
`x-should-retry: false`; 429 and 503 say when to come back. Messages are bounded and hold no prompt, no path and no traceback.
"""

import math
from typing import Any, cast

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from engine.errors import EngineDiedError, NoEngineError, RequestError
from server.anthropic_errors import anthropic_error_body, is_anthropic_path
from server.limits import Limits

log = structlog.get_logger(__name__)

MAX_SHOWN_VALUE_CHARS = 60
CONTENT_FIELDS = frozenset({"prompt", "messages", "input", "instructions", "system"})  # what stands there is nobody's to repeat


class ApiError(Exception):
    """Base of every refusal; `message` is for the client."""

    status = 500
    code: str | None = None
    is_retryable = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def kind(self) -> str:
        """The body's `type`."""
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go out with this error."""
        return {} if self.is_retryable else {"x-should-retry": "false"}


class InvalidRequest(ApiError):
    """The request itself is wrong; `param` names the field where one is to blame."""

    status = 400


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus output can never fit."""

    code = "context_length_exceeded"


class PreviousResponseNotFound(InvalidRequest):
    """There is no such response to go on from, or it is another's, or not kept any more."""

    code = "previous_response_not_found"


class GrammarLimit(InvalidRequest):
    """A grammar or schema that costs too much to follow; known only while it is followed."""

    code = "grammar_limit"


class WrongKey(ApiError):
    """No API key, or none of this server's."""

    status = 401
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return super().headers | {"www-authenticate": "Bearer"}


class ModelNotFound(ApiError):
    """Another model than the one served here."""

    status = 404
    code = "model_not_found"


class ResponseNotFound(ApiError):
    """There is no such stored response or item, or it is another's, or not kept any more."""

    status = 404


class _UnreadableRequest(ApiError):
    """Refused before the body was read to its end, so the connection cannot be used again."""

    @property
    def headers(self) -> dict[str, str]:
        return super().headers | {"connection": "close"}


class BodyTimeout(_UnreadableRequest):
    """The body came too slowly."""

    status = 408
    code = "body_timeout"
    is_retryable = True


class BodyTooLarge(_UnreadableRequest):
    """More bytes than the limit."""

    status = 413
    code = "body_too_large"


class UnsupportedBody(_UnreadableRequest):
    """Not JSON, or encoded in a way that is not read here."""

    status = 415
    code = "unsupported_body"


class HeadersTooLarge(_UnreadableRequest):
    """More header bytes than the limit."""

    status = 431
    code = "headers_too_large"


class InternalError(ApiError):
    """This request failed through no fault of its own; the message says nothing about the inside."""

    status = 500
    code = "internal_error"


class _NotNow(ApiError):
    """The same request may be taken later; the client may come back after `retry_after_s`."""

    is_retryable = True

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(math.ceil(self.retry_after_s)), "retry-after-ms": str(math.ceil(self.retry_after_s * 1000))}


class QuotaExceeded(_NotNow):
    """One tenant has too much open already. `kind` is what: `requests` or `tokens`."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self._kind = kind

    @property
    def kind(self) -> str:
        return self._kind


class Unavailable(_NotNow):
    """Nobody is served more now; `code` says why."""

    status = 503

    def __init__(self, message: str, *, code: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code


class DeadlineExceeded(ApiError):
    """The request's own time was up before anything could be answered."""

    status = 504
    code = "deadline_exceeded"


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object, with all four fields."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def refusal_response(error: ApiError, scope: Scope) -> JSONResponse:
    """The whole answer to a request that ended in `error`: its path alone says whose shape an error has there."""
    if not is_anthropic_path(scope["path"]):
        return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)
    request_id = scope.get("state", {}).get("request_id")
    body = anthropic_error_body(status=error.status, message=error.message, request_id=request_id)
    return JSONResponse(body, status_code=error.status, headers=error.headers | ({"request-id": request_id} if request_id else {}))


def as_api_error(error: Exception, *, request_id: str, limits: Limits) -> ApiError:
    """The one translation: whatever was raised, as what the client is told. The unexpected becomes a generic `InternalError`.

    Requests are taken only once an engine has been ready, so what has none has none any more.
    """
    match error:
        case ApiError():
            return error
        case ValidationError():
            return _from_validation(error, max_chars=limits.max_message_chars)
        case RequestValidationError():
            return _from_parameters(error, max_chars=limits.max_message_chars)
        case RequestError():
            return InvalidRequest(shortened(str(error), limits.max_message_chars))
        case NoEngineError():
            return Unavailable("the server is shutting down", code="shutting_down", retry_after_s=limits.retry_after_s)
        case EngineDiedError():
            return InternalError(
                "the engine ended each time it ran this request, which was given up; other requests are not affected, "
                f"and the server's log has more under request id {request_id}"
            )
        case _:
            return InternalError(f"internal error; the server's log has the details under request id {request_id}")


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, printable, with the middle left out."""
    clean = "".join(char if char.isprintable() else "?" for char in (text if len(text) <= 4 * limit else text[:limit] + text[-limit:]))
    if len(clean) <= limit:
        return clean
    return f"{clean[: limit // 2]} ... {clean[-limit // 2 + 5 :]}"


def shown(value: object) -> str:
    """A client's value inside a message: short, printable and never expensive to make."""
    match value:
        case str():
            return shortened(repr(value[:MAX_SHOWN_VALUE_CHARS]), MAX_SHOWN_VALUE_CHARS)
        case list():
            return f"a list of {len(cast('list[Any]', value))}"
        case dict():
            return f"an object with {len(cast('dict[str, Any]', value))} fields"
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case int() if value.bit_length() > 128:
            return "an integer of more than 128 bits"
        case _:
            return shortened(repr(value), MAX_SHOWN_VALUE_CHARS)


def _from_validation(error: ValidationError, *, max_chars: int) -> InvalidRequest:
    """The first complaint, in one line; the others would only grow the answer."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(shortened(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}", max_chars))
    if not first["loc"]:
        return InvalidRequest(shortened(first["msg"].removeprefix("Value error, "), max_chars))
    param = shortened(str(first["loc"][0]), MAX_SHOWN_VALUE_CHARS)
    where = shortened(".".join(str(part) for part in first["loc"][:6]), MAX_SHOWN_VALUE_CHARS)
    complaint = first["msg"].removeprefix("Value error, ")
    is_content = first["loc"][0] in CONTENT_FIELDS and first["loc"][-1] not in ("role", "type") and isinstance(first["input"], str)
    found = "a string" if is_content else shown(first["input"])
    return InvalidRequest(shortened(f"{where}: {complaint[:1].lower()}{complaint[1:]}, found {found}", max_chars), param=param)


def _from_parameters(error: RequestValidationError, *, max_chars: int) -> InvalidRequest:
    """The first complaint about the query string, which FastAPI reads."""
    first: dict[str, Any] = error.errors()[0]
    param = shortened(str(first["loc"][-1]), MAX_SHOWN_VALUE_CHARS)
    complaint: str = first["msg"]
    return InvalidRequest(
        shortened(f"{param}: {complaint[:1].lower()}{complaint[1:]}, found {shown(first['input'])}", max_chars), param=param
    )


def install_error_handlers(app: FastAPI) -> None:
    """Make every way a route can end speak the same error body."""
    for kind in (ApiError, ValidationError, RequestValidationError, RequestError, EngineDiedError):
        app.add_exception_handler(kind, _answer_known)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unexpected)


def translated(request: Request, error: Exception) -> ApiError:
    """`as_api_error` with what is known about the request and the application that serves it."""
    services = request.app.state.services
    return as_api_error(error, request_id=request.state.request_id, limits=services.limits)


async def _answer_known(request: Request, error: Exception) -> Response:
    told = translated(request, error)
    if isinstance(told, InternalError):
        log.error("a request failed", error=str(error))
    if told.is_retryable and told.code is not None:
        request.app.state.services.metrics.refused.labels(code=told.code).inc()
    return refusal_response(told, request.scope)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, which the router reports."""
    assert isinstance(error, HTTPException)
    allowed = ", ".join(_methods_here(request)) if error.status_code == 405 else ""
    if error.status_code == 405 and request.method == "OPTIONS" and allowed:
        return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
    told = ApiError(_http_message(request, error.status_code))
    told.status = error.status_code
    response = refusal_response(told, request.scope)
    if allowed:
        response.headers["allow"] = allowed
    return response


def _methods_here(request: Request) -> list[str]:
    """What the path answers, over all its routes: the router itself names those of the first alone."""
    scopes = [{**request.scope, "method": method} for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")]
    routes = request.app.router.routes
    return [scope["method"] for scope in scopes if any(route.matches(scope)[0] is Match.FULL for route in routes)]


def _http_message(request: Request, status: int) -> str:
    path = shown(request.url.path)
    match status:
        case 404:
            paths = [path for path in request.app.openapi()["paths"] if "{" not in path]
            return f"there is no route {path}; this server has {', '.join(paths)}"
        case 405:
            return f"{path} does not answer {shown(request.method)}"
        case _:
            return "the request could not be read"


async def _answer_nobody(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """The client left: the status is for the access log alone."""
    return Response(status_code=499)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    """A bug of ours. The error goes on to the server's log with its traceback; the client gets the id to find it by."""
    request_id = request.state.request_id
    log.error("unhandled error", request_id=request_id, error=type(error).__name__)
    response = refusal_response(translated(request, error), request.scope)
    response.headers["x-request-id"] = request_id
    return response
