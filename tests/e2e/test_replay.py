"""The engine process is killed under running streams, again and again: whoever listens notices a pause and nothing else.

The quick drills supervise an engine without a model; the slow one kills the default model's. `KILLS=20 pytest tests/e2e/test_replay.py`
kills more often than the suite does.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fake_core import CRASHING, engine_options, request
from server_process import RunningServer, running_fake_server, running_server

from engine.types import EngineInfo, FinishReason, Progress, TokenDelta
from server.supervisor import Supervisor

pytestmark = pytest.mark.anyio

FAKE_ENGINE = (sys.executable, str(Path(__file__).parents[1] / "support" / "fake_engine_program.py"))
NUM_KILLS = int(os.environ.get("KILLS", "3"))
NUM_STREAMS = 32
SEED = 20


class Deaf:
    """A watcher whom nothing interests."""

    def engine_progressed(self, progress: Progress) -> None: ...

    def engine_ready(self, info: EngineInfo) -> None: ...

    def engine_died(self, cause: str, *, pause_s: float) -> None: ...


def engine_pid(server_pid: int, *, program: str = "engine") -> int:
    """The oldest child of its server that runs `program`, because a process that stands by is younger; 0 while there is none."""

    def start_ticks(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])

    pids = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    engines = [int(pid) for pid in pids if program.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    return min(engines, key=start_ticks, default=0)


def kill_engine(server_pid: int, signum: signal.Signals = signal.SIGKILL, *, program: str = "engine") -> int:
    """Returns its pid."""
    pid = engine_pid(server_pid, program=program)
    assert pid, "there is no engine, and a signal to 0 would go to the tests themselves"
    os.kill(pid, signum)
    return pid


async def with_fake_engine(check: Callable[[Supervisor], Awaitable[None]], *, stall_timeout_s: float = 30.0) -> None:
    """Run `check` beside a supervised engine that is ready; each of its steps takes 5 ms."""
    supervisor = Supervisor(engine_options(), watcher=Deaf(), command=FAKE_ENGINE, stall_timeout_s=stall_timeout_s)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervisor.run)
        await until_ready(supervisor)
        await check(supervisor)
        supervisor.stop()


async def until_ready(supervisor: Supervisor) -> None:
    with anyio.fail_after(60):
        while not supervisor.client.is_ready:
            await anyio.sleep(0.005)


async def collect(supervisor: Supervisor, name: str, *prompt: int, max_tokens: int, into: dict[str, list[TokenDelta]]) -> None:
    deltas = into.setdefault(name, [])
    async for delta in supervisor.client.generate(request(name, *prompt, max_tokens=max_tokens)):
        deltas.append(delta)


def check_whole(deltas: list[TokenDelta], *prompt: int, max_tokens: int) -> None:
    """The fake engine repeats the prompt; exactly the last delta has a finish reason."""
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == [prompt[at % len(prompt)] for at in range(max_tokens)]
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]
    assert deltas[-1].finish_reason


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_no_stream_loses_or_repeats_a_token_when_the_engine_dies_or_hangs(signum: signal.Signals):
    moments = random.Random(SEED)
    answers: dict[str, list[TokenDelta]] = {}

    async def check(supervisor: Supervisor) -> None:
        async with anyio.create_task_group() as tasks:
            for stream in range(NUM_STREAMS):
                tasks.start_soon(lambda stream=stream: collect(supervisor, f"{stream}", stream, 7, 300, max_tokens=150, into=answers))
            for _ in range(3 if signum == signal.SIGKILL else 1):
                await until_ready(supervisor)
                await anyio.sleep(moments.uniform(0.02, 0.25))
                kill_engine(os.getpid(), signum, program=FAKE_ENGINE[1])
                with anyio.fail_after(30):
                    while supervisor.client.is_ready:
                        await anyio.sleep(0.005)

    await with_fake_engine(check, stall_timeout_s=2.0)

    for stream in range(NUM_STREAMS):
        check_whole(answers[f"{stream}"], stream, 7, 300, max_tokens=150)


@pytest.mark.timeout(300)
async def test_a_request_that_kills_every_engine_gets_a_500_and_its_neighbours_finish():
    def completion(*prompt: int, **fields: Any) -> dict[str, Any]:
        return {"json": {"prompt": list(prompt), "max_tokens": 40, "logprobs": 0, "return_tokens_as_token_ids": True, **fields}}

    answers: dict[int, httpx.Response] = {}
    with running_fake_server(GROK_SERVER_KEEP_ALIVE_S="300") as (_, url):  # else a status would be sent while the search goes on
        async with httpx.AsyncClient(base_url=url, timeout=200) as client, anyio.create_task_group() as tasks:

            async def ask(number: int) -> None:
                answers[number] = await client.post("/v1/completions", **completion(number, 9))

            for number in range(6):
                tasks.start_soon(ask, number)
            whole, streamed = await asyncio.gather(
                client.post("/v1/completions", **completion(CRASHING)),
                client.post("/v1/completions", **completion(CRASHING, stream=True)),
            )

    for failed in (whole, streamed):
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "internal_error"
        assert failed.headers["x-should-retry"] == "false"
    for number, answer in answers.items():
        expected = [f"token_id:{(number, 9)[at % 2]}" for at in range(40)]
        assert answer.json()["choices"][0]["logprobs"]["tokens"] == expected
    assert len(answers) == 6


OPENINGS = ["Once upon a time", "The old bear", "A little girl", "In the forest", "One morning the king", "The sea was", "Tom and"]


def body(index: int) -> dict[str, Any]:
    """Greedy and seeded, short and long, with penalties, several choices, a scored prompt, log-probabilities."""
    prompt = OPENINGS[index % len(OPENINGS)] + " and the fox" * (index * 7 % 20)
    extras: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 1.0, "seed": index},
        {"temperature": 0.8, "top_p": 0.9, "seed": index, "frequency_penalty": 0.7},
        {"temperature": 0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": index, "n": 2},
        {"temperature": 0, "echo": True, "logprobs": 2},
    ]
    return {"prompt": prompt, "max_tokens": 40 + index * 37 % 60, "ignore_eos": True, "stream": True, **extras[index % len(extras)]}


async def streamed(client: httpx.AsyncClient, index: int) -> dict[int, dict[str, Any]]:
    """What a stream said, by choice: text, finish reason and log-probabilities."""
    choices: dict[int, dict[str, Any]] = {}
    async with client.stream("POST", "/v1/completions", json=body(index)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return choices
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for piece in event["choices"]:
                choice = choices.setdefault(piece["index"], {"text": "", "finish": None, "logprobs": []})
                assert choice["finish"] is None
                choice["text"] += piece["text"]
                choice["finish"] = piece["finish_reason"]
                if piece["logprobs"]:
                    choice["logprobs"] += zip(piece["logprobs"]["tokens"], piece["logprobs"]["token_logprobs"], strict=True)
    raise AssertionError("the stream ended without [DONE]")


async def until_served(client: httpx.AsyncClient) -> None:
    with anyio.fail_after(200):
        while (await client.get("/readyz")).status_code != 200:
            await anyio.sleep(0.02)


async def kill_again_and_again(server: RunningServer, client: httpx.AsyncClient) -> list[float]:
    """`NUM_KILLS` times, at random moments after readiness; returns the seconds from each kill to readiness."""
    moments = random.Random(SEED)
    seconds: list[float] = []
    for _ in range(NUM_KILLS):
        await until_served(client)
        await anyio.sleep(moments.uniform(0.1, 1.5))
        killed = kill_engine(server.pid)
        killed_s = time.monotonic()
        with anyio.fail_after(60):
            while engine_pid(server.pid) in (0, killed):
                await anyio.sleep(0.01)
        await until_served(client)
        seconds.append(time.monotonic() - killed_s)
    return seconds


@pytest.mark.timeout(900)
async def test_streams_of_the_default_model_equal_an_undisturbed_run_after_kills_in_mid_stream(tmp_path: Path):
    undisturbed: dict[int, Any] = {}
    disturbed: dict[int, Any] = {}
    downtimes: list[float] = []

    with running_server(tmp_path) as server:
        limits = httpx.Limits(max_connections=2 * NUM_STREAMS)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

            async def run(index: int, answers: dict[int, Any]) -> None:
                answers[index] = await streamed(client, index)

            async def keep_running(index: int, until: anyio.Event) -> None:
                while not until.is_set():
                    await run(index, disturbed)
                    assert disturbed[index] == undisturbed[index]

            async with anyio.create_task_group() as tasks:
                for index in range(NUM_STREAMS):
                    tasks.start_soon(run, index, undisturbed)
            killed_enough = anyio.Event()
            async with anyio.create_task_group() as tasks:
                for index in range(NUM_STREAMS):
                    tasks.start_soon(keep_running, index, killed_enough)
                downtimes = await kill_again_and_again(server, client)
                killed_enough.set()

    print(f"seconds from kill to readiness: {[round(seconds, 2) for seconds in downtimes]}")
    assert disturbed == undisturbed
    assert len(downtimes) == NUM_KILLS
