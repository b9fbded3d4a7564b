"""A server as its client in a terminal sees it: requests out, text in pieces back, every way to fail as one line.

Used by `server/terminal.py` alone. Speaks what OpenAI's clients speak, so it knows nothing of this server's inside.
"""

import ipaddress
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import httpx

from engine.errors import EngineError

CONNECT_TIMEOUT_S = 5.0
RETRY_S = 1.0  # between two looks at a server that still loads its model
MAX_SHOWN_BYTES = 64 * 1024  # of an answer that is not what was asked for

_HINTS = {401: "; name a key with --api-key or GROK_SERVER_API_KEY", 429: "; try again in a while"}
# A terminal takes control characters for orders: they are shown as their pictures, those without one as U+FFFD.
_HARMLESS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)
_NOT_YET = frozenset({"model_loading", "engine_restarting"})


class RemoteError(EngineError):
    """The server did not answer, or not with text. `exit_status` is 2 where the user can help it, 1 where not."""

    def __init__(self, message: str, *, exit_status: int = 2, code: str | None = None) -> None:
        super().__init__(harmless(message))
        self.exit_status = exit_status
        self.code = code  # the server's own word for it


class Remote:
    """A connection to one server. Leaving the iteration over an answer closes it, which ends the generation there."""

    def __init__(self, url: str, *, api_key: str | None, waiting: Callable[[], None] = lambda: None) -> None:
        """`waiting` is called once where the server says that its model is still loading. Raises `RemoteError` for what is no URL."""
        host = _host_of(url)
        if host is None:
            raise RemoteError(f"--url: {url!r} is no address of a server; it looks like http://127.0.0.1:8000")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise RemoteError("--api-key: a key is printable ASCII, and this one is not")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._is_local = _is_loopback(host)
        self._headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
        self._waiting = waiting

    def completion(self, fields: Mapping[str, Any]) -> Generator[str]:
        """Pieces of the text that continues `fields["prompt"]`. Raises `RemoteError`."""
        for choice in self._choices("/v1/completions", fields):
            yield str(choice.get("text") or "")

    def chat(self, fields: Mapping[str, Any]) -> Generator[str]:
        """Pieces of the answer to `fields["messages"]`. Raises `RemoteError`."""
        for choice in self._choices("/v1/chat/completions", fields):
            delta: dict[str, Any] = choice.get("delta") or {}
            yield str(delta.get("content") or "")

    def _choices(self, path: str, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The first choice of each event. A client per request: one that an interruption left in mid-work is never used again."""
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        try:
            with (
                httpx.Client(headers=self._headers, timeout=timeout, trust_env=not self._is_local) as client,
                self._answer(client, path, {**fields, "stream": True}) as response,
            ):
                yield from self._read(response)
        except UnicodeEncodeError:
            raise RemoteError("what was typed is no UTF-8 text, so that no server can be told") from None
        except httpx.ConnectError as error:
            raise RemoteError(
                f"no server answers at {self.url} ({_reason(error)}); start one with `grok-server serve`, or name another with --url"
            ) from None
        except httpx.HTTPError as error:
            raise RemoteError(f"the connection to {self.url} broke ({_reason(error)}); try again", exit_status=1) from None

    @contextmanager
    def _answer(self, client: httpx.Client, path: str, body: Mapping[str, Any]) -> Generator[httpx.Response]:
        """The answer, once there is one: a server that still loads its model is asked again and again."""
        has_told = False
        while True:
            with client.stream("POST", self.url + path, json=body) as response:
                if response.status_code == 200:
                    yield response
                    return
                refusal = self._refusal(response)
            if refusal.code not in _NOT_YET:
                raise refusal
            if not has_told:
                self._waiting()
                has_told = True
            time.sleep(RETRY_S)

    def _read(self, response: httpx.Response) -> Iterator[dict[str, Any]]:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise RemoteError(f"{self.url} answered with something else than a stream of text; name another server with --url")
        for event in _events(response.iter_bytes()):
            if event == b"[DONE]":
                return
            match _parsed(event):
                case {"error": {"message": str(message)}}:
                    raise RemoteError(message, exit_status=1)
                case {"choices": [{"index": 0} as choice, *_]}:
                    yield cast("dict[str, Any]", choice)
                case _:
                    continue
        raise RemoteError(f"{self.url} ended its answer in the middle; try again", exit_status=1)

    def _refusal(self, response: httpx.Response) -> RemoteError:
        """What a status other than 200 says."""
        status = response.status_code
        match _parsed(b"".join(_at_most(response.iter_bytes(), MAX_SHOWN_BYTES))):
            case {"error": {"message": str(message), "code": code}}:
                hint = _HINTS.get(status, "")
                return RemoteError(message + hint, exit_status=1 if status >= 500 else 2, code=str(code))
            case _:
                return RemoteError(f"{self.url} answered {status}, not as this program's server would; name another with --url")


def harmless(text: str) -> str:
    """What a server said, for a terminal."""
    return text.translate(_HARMLESS)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event; comments and other fields are passed over. A line ends with a line feed alone."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _at_most(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk[:limit]
        limit -= len(chunk)
        if limit <= 0:
            return


def _host_of(url: str) -> str | None:
    """None for what is no URL of a server."""
    try:
        parts = urlsplit(url)
        return parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:  # a port or an address that is none
        return None


def _is_loopback(host: str) -> bool:
    """Whether no proxy can have a part in reaching it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: Exception) -> str:
    """The system's own words, without the number in front."""
    return str(error).rpartition("] ")[2].lower() or type(error).__name__
