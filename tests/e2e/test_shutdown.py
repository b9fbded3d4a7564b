"""The end of a server, step by step, with an engine without a model: announced, then closed, then drained, whatever happens meanwhile."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import running_fake_server

NOTICE_S = 1.5


def complete(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": [5, 6], "max_tokens": 3}, timeout=20)


def refused(url: str) -> bool:
    response = complete(url)
    return response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"


def stream_tokens(url: str, *, max_tokens: int) -> Iterator[str]:
    """The names of the tokens as they come; ends with `[DONE]` or the code of an error."""
    body = {"prompt": [5, 6], "max_tokens": max_tokens, "stream": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                yield "[DONE]"
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    yield event["error"]["code"]
                else:
                    yield from (name for choice in event["choices"] for name in choice["logprobs"]["tokens"])


def tokens_of(max_tokens: int) -> list[str]:
    return [f"token_id:{5 + at % 2}" for at in range(max_tokens)]


def test_sigterm_fails_readiness_at_once_and_requests_only_after_the_notice():
    with running_fake_server("--step-s", "0.03", GROK_SERVER_SHUTDOWN_NOTICE=str(NOTICE_S)) as (server, url):
        lines = stream_tokens(url, max_tokens=200)  # runs longer than the notice
        first = next(lines)
        signalled_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/readyz").status_code == 200:
            assert time.monotonic() - signalled_s < NOTICE_S / 2

        assert complete(url).status_code == 200, "nobody is refused before load balancers can know"
        while not refused(url):
            assert time.monotonic() - signalled_s < NOTICE_S + 5

        assert time.monotonic() - signalled_s >= NOTICE_S
        assert [first, *lines] == [*tokens_of(200), "[DONE]"]
        assert server.wait(timeout=60) == 0


def test_ctrl_c_knows_no_notice():
    with running_fake_server("--step-s", "0.03", GROK_SERVER_SHUTDOWN_NOTICE=str(NOTICE_S)) as (server, url):
        lines = stream_tokens(url, max_tokens=60)
        next(lines)
        signalled_s = time.monotonic()
        server.send_signal(signal.SIGINT)

        while not refused(url):
            assert time.monotonic() - signalled_s < NOTICE_S
        assert [*lines][-1] == "[DONE]"
        assert server.wait(timeout=60) == 0


@pytest.mark.parametrize("when", ["in the notice", "while draining"])
def test_a_stream_survives_the_death_of_the_engine_in_the_middle_of_the_shutdown(when: str):
    with running_fake_server("--step-s", "0.02", GROK_SERVER_SHUTDOWN_NOTICE="10" if when == "in the notice" else "0") as (server, url):
        lines = stream_tokens(url, max_tokens=100)
        first = next(lines)
        (engine,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        server.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/readyz").status_code == 200:
            time.sleep(0.01)

        os.kill(int(engine), signal.SIGKILL)

        assert [first, *lines] == [*tokens_of(100), "[DONE]"]
        if when == "while draining":
            assert server.wait(timeout=60) == 0


def test_a_stream_that_waits_for_an_engine_that_never_comes_is_told_at_the_timeout():
    with running_fake_server("--step-s", "0.02", GROK_SERVER_SHUTDOWN_NOTICE="0", GROK_SERVER_SHUTDOWN_TIMEOUT="0.3") as (server, url):
        lines = stream_tokens(url, max_tokens=250)
        next(lines)
        (engine,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(engine), signal.SIGKILL)
        server.send_signal(signal.SIGTERM)

        assert [*lines][-1] == "shutting_down"
        assert server.wait(timeout=60) == 0


def test_sigterm_under_32_streams_ends_each_whole_or_with_an_error_event():
    """Every second one is done in time."""
    lengths = [40 if number % 2 else 250 for number in range(32)]
    ends: dict[int, list[str]] = {}

    with running_fake_server("--step-s", "0.02", GROK_SERVER_SHUTDOWN_NOTICE="0", GROK_SERVER_SHUTDOWN_TIMEOUT="2") as (server, url):
        begun = threading.Semaphore(0)

        def follow(number: int) -> None:
            lines = stream_tokens(url, max_tokens=lengths[number])
            first = next(lines)
            begun.release()
            ends[number] = [first, *lines]

        threads = [threading.Thread(target=follow, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=30)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(timeout=60)

        assert server.wait(timeout=60) == 0
    assert len(ends) == 32
    for number, tokens in ends.items():
        if lengths[number] == 40:
            assert tokens == [*tokens_of(40), "[DONE]"]
        else:
            assert tokens[-1] in ("shutting_down", "[DONE]")
            assert tokens[:-1] == tokens_of(len(tokens) - 1)
    assert "shutting_down" in {tokens[-1] for tokens in ends.values()}


@pytest.mark.parametrize(
    ("first", "second", "status"), [("SIGTERM", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130), ("SIGINT", "SIGTERM", 143)]
)
def test_a_second_signal_ends_streams_fast_and_says_which_it_was(first: str, second: str, status: int):
    with running_fake_server("--step-s", "0.2") as (server, url):
        streams = [stream_tokens(url, max_tokens=250) for _ in range(8)]
        for lines in streams:
            next(lines)
        (engine,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        server.send_signal(signal.Signals[first])
        while httpx.get(f"{url}/readyz").status_code == 200:
            time.sleep(0.01)
        signalled_s = time.monotonic()

        server.send_signal(signal.Signals[second])

        assert server.wait(timeout=15) == status, "long before the streams' end"
        while Path(f"/proc/{engine}").exists():
            assert time.monotonic() - signalled_s < 20
            time.sleep(0.02)
        for lines in streams:
            with pytest.raises(httpx.HTTPError):
                list(lines)
