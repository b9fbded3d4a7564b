"""A random trace on the real server, with or without kills of its engine, against the same trace undisturbed.

    python -m benchmarks.soak [--model DIR] [--minutes N] [--streams N] [--kills N] [--seed N]

First the trace runs for half of the time on a server that nobody disturbs, then the very same requests run again while the engine process
is killed (SIGKILL) at random moments. The requests are of every kind: greedy and seeded, scored, several choices, penalties, long prompts
and short, shared beginnings, clients that leave. Printed and kept in `benchmarks/results/soak.json`: requests, answers that differ from the
undisturbed ones, errors, compilations after readiness, restarts, seconds from a kill to the next token, memory of the processes.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine, running_server, summary
from server.settings import default_model_dir

RESULTS = Path(__file__).parent / "results" / "soak.json"
TEXT = "the bear and a little fox went to see what was in old forest by sea one morning with their friend who said nothing"
WORDS = TEXT.split()
LEAVES_AFTER_S = 0.5


@dataclass(slots=True)
class Run:
    """One pass over the trace."""

    answers: dict[int, str] = field(default_factory=dict[int, str])
    errors: list[str] = field(default_factory=list[str])
    last_token_s: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="A random trace, undisturbed and again while the engine is killed.")
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=32, help="requests open at the same time")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = asyncio.run(soak(arguments))
    table = Table("figure", "value", title="soak")
    for name, value in result.items():
        table.add_row(name, json.dumps(value))
    Console().print(table)
    RESULTS.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    with running_server(arguments.model) as (url, pid):
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
            calm, before = Run(), memory_mb(pid)
            num_requests = await replay(client, calm, arguments, until_s=time.monotonic() + 30 * arguments.minutes)
            after = memory_mb(pid)
            wild, gaps = Run(), list[float]()
            async with killing(pid, wild, arguments, gaps):
                await replay(client, wild, arguments, num_requests=num_requests)
            return {
                "model": arguments.model.name,
                "seed": arguments.seed,
                "streams": arguments.streams,
                "requests": num_requests,
                "errors": len(calm.errors) + len(wild.errors),
                "first error": next(iter(calm.errors + wild.errors), None),
                "answers that differ": sum(wild.answers.get(index) != text for index, text in calm.answers.items()),
                "late compilations": await metric(client, "late_compilations_total"),
                "kills": len(gaps),
                "restarts": await metric(client, "engine_restarts_total"),
                "kill to next token, s": summary(gaps) if gaps else None,
                "blocks held at the end": await metric(client, "kv_cache_usage_perc"),
                "resident MB, server and engines, before and after the calm part": [before, after],
            }


async def replay(
    client: httpx.AsyncClient, run: Run, arguments: argparse.Namespace, *, until_s: float | None = None, num_requests: int | None = None
) -> int:
    """Send the trace's requests, `streams` at a time, until the time or the number is reached; returns how many."""
    started = 0

    async def worker() -> None:
        nonlocal started
        while (time.monotonic() < until_s) if until_s is not None else (started < (num_requests or 0)):
            index, started = started, started + 1
            await send(client, run, index, seed=arguments.seed)

    await asyncio.gather(*(worker() for _ in range(arguments.streams)))
    return started


async def send(client: httpx.AsyncClient, run: Run, index: int, *, seed: int) -> None:
    """One request of the trace; its answer is the text with the log-probabilities of all choices."""
    body, leaves = request_of(index, seed=seed)
    pieces: list[str] = []
    try:
        async with asyncio.timeout(LEAVES_AFTER_S if leaves else None), client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                run.errors.append(f"{index}: {answer.status_code} {(await answer.aread())[:200]!r}")
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    run.last_token_s = time.monotonic()
                    pieces.append(line)
    except TimeoutError:
        return
    if leaves:
        return
    texts: dict[int, str] = {}
    logprobs: dict[int, list[float | None]] = {}
    for piece in pieces:
        chunk = json.loads(piece[len("data: ") :])
        if "error" in chunk:
            run.errors.append(f"{index}: {chunk['error']}")
            return
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["logprobs"]:
                logprobs.setdefault(choice["index"], []).extend(choice["logprobs"]["token_logprobs"])
    run.answers[index] = json.dumps([texts, logprobs], sort_keys=True)


def request_of(index: int, *, seed: int) -> tuple[dict[str, Any], bool]:
    """The body of request number `index`, and whether its client leaves."""
    draw = random.Random(f"{seed}-{index}")
    words = [draw.choice(WORDS) for _ in range(draw.choice((3, 10, 40, 200)))]
    beginning = WORDS * draw.choice((0, 0, 2))
    body: dict[str, Any] = {
        "prompt": " ".join(beginning + words),
        "max_tokens": draw.choice((1, 8, 32, 96)),
        "temperature": draw.choice((0, 0.7, 1.3)),
        "seed": index,
        "stream": True,
        "ignore_eos": draw.random() < 0.5,
        "n": draw.choice((1, 1, 1, 3)),
        "priority": draw.randint(-1, 1),
        "user": draw.choice("abc"),
    }
    body |= draw.choice(({}, {"logprobs": 3}, {"echo": True, "logprobs": 2}, {"presence_penalty": 0.8}, {"top_p": 0.8, "top_k": 40}))
    return body, draw.random() < 0.1


@asynccontextmanager
async def killing(pid: int, run: Run, arguments: argparse.Namespace, gaps: list[float]) -> AsyncIterator[None]:
    """Kill the engine at random moments, each after tokens have come again; `gaps` gets the seconds that each cost."""
    draw = random.Random(arguments.seed)

    async def kill() -> None:
        while len(gaps) < arguments.kills:
            await asyncio.sleep(draw.uniform(0.2, 3.0))
            killed_s = time.monotonic()
            os.kill(engines(pid)[0], signal.SIGKILL)
            while run.last_token_s <= killed_s:
                await asyncio.sleep(0.01)
            gaps.append(run.last_token_s - killed_s)

    task = asyncio.create_task(kill())
    try:
        yield
    finally:
        task.cancel()


def engines(pid: int) -> list[int]:
    """Process ids of the server's engine and of what stands by, oldest first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"\0engine\0" in Path(f"/proc/{child}/cmdline").read_bytes()]


def memory_mb(pid: int) -> list[int]:
    """Resident megabytes of the server and of each engine process."""
    pages = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (pid, *engines(pid))]
    return [count * os.sysconf("SC_PAGE_SIZE") >> 20 for count in pages]


async def metric(client: httpx.AsyncClient, name: str) -> float:
    match = re.search(rf"^grok:{name}(?:\{{[^}}]*\}})? (\S+)$", (await client.get("/metrics")).text, flags=re.MULTILINE)
    assert match, f"/metrics has no {name}"
    return float(match[1])


if __name__ == "__main__":
    main()
