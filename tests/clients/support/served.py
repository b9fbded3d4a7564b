"""The server under test as a check sees it: where it is, what is asked of it, and whether it still works on something.

The clients take address and key from their own environment variables (`OPENAI_BASE_URL` and the like); this is for what no client knows.
Imports the standard library alone, as each client's environment holds nothing else.
"""

import json
import os
import time
import urllib.request
from typing import Any

URL = os.environ["SERVER_URL"]  # without /v1
KEY = os.environ["SERVER_KEY"]
MODEL = os.environ["SERVER_MODEL"]
HAS_KEYS = os.environ["SERVER_HAS_KEYS"] == "true"  # whether a wrong key is refused

STORY = "Once upon a time, there was a little girl named Lily."
QUESTION = [{"role": "user", "content": "Hello, how are you today?"}]

WEATHER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Oslo", "Lima"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}


def is_weather_call(arguments: dict[str, Any]) -> bool:
    """Whether a call's arguments are what `WEATHER_SCHEMA` allows."""
    properties = WEATHER_SCHEMA["properties"]
    return (
        set(arguments) == set(properties)
        and arguments["city"] in properties["city"]["enum"]
        and arguments["unit"] in properties["unit"]["enum"]
        and type(arguments["days"]) is int
        and 1 <= arguments["days"] <= 7
    )


class Refused:
    """`with Refused(KIND) as refusal:` takes an error of that kind, which is `refusal.error` then; that none was raised is a failure."""

    def __init__(self, kind: type[Exception]) -> None:
        self._kind = kind
        self.error: Any = None

    def __enter__(self) -> "Refused":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        assert error is not None, f"no {self._kind.__name__} was raised"
        self.error = error
        return isinstance(error, self._kind)


def ask(path: str, body: Any = None) -> Any:
    """The server's JSON answer to a GET, or to a POST of `body`; what a client without any SDK gets."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"authorization": f"Bearer {KEY}", "content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def num_running() -> int:
    """Sequences that the engine runs or holds, as /metrics tells."""
    request = urllib.request.Request(f"{URL}/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return int(float(counts["grok:num_requests_running"]) + float(counts["grok:num_requests_waiting"]))


def assert_nothing_runs_within(seconds: float) -> None:
    """Raises where the engine still works on something after that time: a stream that was left goes on."""
    give_up_s = time.monotonic() + seconds
    while running := num_running():
        assert time.monotonic() < give_up_s, f"{running} sequences still run {seconds} s after the client left"
        time.sleep(0.05)
