"""Two servers without a model behind the real nginx with the file of `deploy/`: who is asked, and what clients see of an end."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from server_process import running_fake_server

from benchmarks.replicas import Router, running_nginx

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
STEP_S = 0.03
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@contextmanager
def two_replicas(folder: Path, **environment: str) -> Iterator[tuple[list[subprocess.Popen[str]], Router]]:
    """Their processes, and the way to them."""
    with ExitStack() as stack:
        replicas = [stack.enter_context(running_fake_server("--step-s", str(STEP_S), **environment)) for _ in range(2)]
        ports = [int(url.rpartition(":")[2]) for _, url in replicas]
        yield [process for process, _ in replicas], stack.enter_context(running_nginx(str(NGINX), ports, folder))


def complete(router: Router, *, max_tokens: int = 3) -> httpx.Response:
    return httpx.post(f"{router.url}/v1/completions", json={"prompt": [5, 6], "max_tokens": max_tokens}, timeout=30)


def stream(router: Router, *, max_tokens: int) -> Iterator[float]:
    """When each token came. Raises `httpx.RemoteProtocolError` where the stream breaks off."""
    body = {"prompt": [5, 6], "max_tokens": max_tokens, "stream": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    with httpx.stream("POST", f"{router.url}/v1/completions", json=body, timeout=30) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield time.monotonic()


def test_a_killed_replica_costs_no_answer_and_a_stream_is_seen_to_be_cut(tmp_path: Path):
    with two_replicas(tmp_path) as (replicas, router), ThreadPoolExecutor() as pool:
        streams = [stream(router, max_tokens=150) for _ in range(2)]
        first_s = [next(events) for events in streams]
        plain = [pool.submit(complete, router, max_tokens=60) for _ in range(2)]
        time.sleep(20 * STEP_S)

        replicas[0].kill()

        ends: list[str] = []
        for events in streams:
            try:
                ends.append("whole" if [*events][-1] - max(first_s) > 20 * STEP_S else "held back")
            except httpx.RemoteProtocolError:
                ends.append("cut")
        assert sorted(ends) == ["cut", "whole"]
        assert [answer.result().status_code for answer in plain] == [200, 200]
        assert [complete(router).status_code for _ in range(10)] == [200] * 10
        assert router.num_passed_on(since=0) >= 1

        replicas[1].kill()
        replicas[1].wait()
        answer = complete(router)

        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "server_overloaded"


def test_a_replica_that_is_told_to_end_costs_nobody_an_answer(tmp_path: Path):
    with two_replicas(tmp_path, GROK_SERVER_SHUTDOWN_NOTICE="0.5") as (replicas, router), ThreadPoolExecutor() as pool:
        streams = [stream(router, max_tokens=100) for _ in range(2)]
        for events in streams:
            next(events)
        replicas[0].send_signal(signal.SIGTERM)
        statuses: list[int] = []
        ended = pool.submit(lambda: [len([*events]) for events in streams])
        while replicas[0].poll() is None:
            statuses.append(complete(router).status_code)

        assert replicas[0].returncode == 0
        assert {*statuses, complete(router).status_code} == {200}
        assert min(ended.result()) >= 99, "what runs is not broken off"
        assert " 503, 200\n" in router.log.read_text(), "refusals are passed on"


def test_metrics_are_each_replicas_own(tmp_path: Path):
    with running_nginx(str(NGINX), [9, 9], tmp_path) as router:
        assert httpx.get(f"{router.url}/metrics").status_code == 404
