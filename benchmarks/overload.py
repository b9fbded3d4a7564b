"""Ten times the load that the server can bear: what it still gets done, and how fast it says no.

    python -m benchmarks.overload [--model DIR | --null-device] [--seconds N] [--factor N] [--rounds N]

A round is twice the same length. First as many clients as run at once ask again as soon as they are answered: what is generated then is
the unloaded goodput. Then requests come at `--factor` times that rate, whatever becomes of them: those that are answered whole count, the
others must have been refused. The server's own time to refuse is that of its access log. `--null-device` puts an engine in the place of
the real one that sleeps instead of computing, so that the figures are those of the server. Printed and kept in
`benchmarks/results/overload.json`. With the right to it (root), all processes run in the real-time class.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine, summary, use_real_time_class
from server.settings import default_model_dir

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "overload.json"
AT_ONCE = 64
STEP_S = 0.01  # of the null device
LENGTHS = random.Random(0).sample(range(60, 250), 97)  # tokens asked for, in turn: 155 on average, so that not all end at once
WARM_UP_S = 3.0  # of each half, not counted


@dataclass(slots=True)
class Half:
    """What came of the requests of one half of a round."""

    num_tokens: int = 0  # of whole answers, after the warm-up
    num_answers: int = 0
    refusals_s: list[float] = field(default_factory=list[float])  # as the client sees it
    others: list[int] = field(default_factory=list[int])  # statuses that nobody wants


class Client:
    """Keeps connections as clients' pools do, and does little else: it shares the machine with the server."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        match = re.match(r"http://(.+):(\d+)", url)
        assert match
        self._address = match[1], int(match[2])
        self._requests = [request_of(body | {"max_tokens": max_tokens}) for max_tokens in LENGTHS]
        self._num_sent = 0
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def forget_connections(self) -> None:
        """They belong to an event loop that is over."""
        self._idle.clear()

    async def ask(self) -> tuple[int, bytes, float]:
        """Status, body and seconds."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        began_s = time.perf_counter()
        writer.write(self._requests[self._num_sent % len(LENGTHS)])
        self._num_sent += 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length, head
        body = await reader.readexactly(int(length[1]))
        took_s = time.perf_counter() - began_s
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head.split(b" ", 2)[1]), body, took_s


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def main() -> None:
    parser = argparse.ArgumentParser(description="What the server gets done, and how fast it says no, at ten times its load.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, default=default_model_dir())
    which.add_argument("--null-device", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="counted in each half of a round")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    is_real_time = use_real_time_class()

    prompt = [5, 6] if arguments.null_device else "Once upon a time"
    body: dict[str, Any] = {"prompt": prompt, "ignore_eos": True, "temperature": 0}
    with tempfile.NamedTemporaryFile("w+") as log, running(arguments, Path(log.name)) as url:
        client = Client(url, body)
        rounds = [asyncio.run(one_round(client, arguments, Path(log.name))) for _ in range(arguments.rounds)]

    name = "null device" if arguments.null_device else arguments.model.name
    figures = {figure: summary([row[figure] for row in rounds], digits=5) for figure in rounds[0]}
    show(name, figures)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    setting = {"seconds": arguments.seconds, "factor": arguments.factor, "rounds": arguments.rounds, "real_time_class": is_real_time}
    RESULTS.write_text(json.dumps(kept | {name: {"machine": machine(), "setting": setting, "figures": figures}}, indent=1) + "\n")


async def one_round(client: Client, arguments: argparse.Namespace, log: Path) -> dict[str, float]:
    """Figures of one round, by name."""
    client.forget_connections()
    calm, wild = Half(), Half()
    await closed_loop(client, calm, seconds=arguments.seconds)
    await asyncio.sleep(1)
    began = log.stat().st_size
    rate = arguments.factor * calm.num_answers / arguments.seconds
    num_sent = await open_loop(client, wild, seconds=arguments.seconds, rate=rate)
    await asyncio.sleep(1)
    own_s = own_refusal_times(log, since=began)
    if calm.others or wild.others or len(own_s) != len(wild.refusals_s):
        raise RuntimeError(f"statuses {calm.others + wild.others}, {len(wild.refusals_s)} refusals seen and {len(own_s)} logged")
    return {
        "unloaded goodput, tokens/s": calm.num_tokens / arguments.seconds,
        "goodput under overload, tokens/s": wild.num_tokens / arguments.seconds,
        "goodput kept": wild.num_tokens / calm.num_tokens,
        "offered, requests/s": num_sent / (arguments.seconds + WARM_UP_S),
        "refused": float(len(own_s)),
        "server's own time to refuse, p50, s": percentile(own_s, 0.5),
        "server's own time to refuse, p99, s": percentile(own_s, 0.99),
        "time to refuse at the client, p50, s": percentile(wild.refusals_s, 0.5),
        "time to refuse at the client, p99, s": percentile(wild.refusals_s, 0.99),
    }


async def closed_loop(client: Client, half: Half, *, seconds: float) -> None:
    """Every client asks again when it is answered."""
    began_s = time.perf_counter()

    async def one() -> None:
        while time.perf_counter() < began_s + WARM_UP_S + seconds:
            await ask(client, half, counts_from_s=began_s + WARM_UP_S, until_s=began_s + WARM_UP_S + seconds)

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


async def open_loop(client: Client, half: Half, *, seconds: float, rate: float) -> int:
    """Requests come at `rate` a second, whatever becomes of them; returns how many."""
    began_s = time.perf_counter()
    until_s = began_s + WARM_UP_S + seconds
    tasks: list[asyncio.Task[None]] = []
    while (now_s := time.perf_counter()) < until_s:
        while len(tasks) < (now_s - began_s) * rate:
            tasks.append(asyncio.create_task(ask(client, half, counts_from_s=began_s + WARM_UP_S, until_s=until_s)))
        await asyncio.sleep(1 / rate)
    await asyncio.gather(*tasks)
    return len(tasks)


async def ask(client: Client, half: Half, *, counts_from_s: float, until_s: float) -> None:
    status, body, took_s = await client.ask()
    if status == 503:
        half.refusals_s.append(took_s)
    elif status != 200:
        half.others.append(status)
    elif counts_from_s <= time.perf_counter() < until_s:
        half.num_tokens += json.loads(body)["usage"]["completion_tokens"]
        half.num_answers += 1


def own_refusal_times(log: Path, *, since: int) -> list[float]:
    """Seconds from the access log's lines after the first `since` bytes."""
    lines = log.read_bytes()[since:].splitlines()
    entries = [json.loads(line) for line in lines if line.startswith(b"{")]
    return [entry["duration_s"] for entry in entries if entry.get("event") == "request" and entry["status"] == 503]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@contextmanager
def running(arguments: argparse.Namespace, log: Path) -> Iterator[str]:
    """The server with its log in a file; yields its address."""
    command: list[str | Path] = [Path(sys.executable).with_name("grok-server"), "serve", "--model", arguments.model, "--port", "0"]
    if arguments.null_device:
        support = ROOT / "tests" / "support"
        command = [sys.executable, support / "fake_engine_server.py", ROOT / "tests" / "data" / "tiny-a", "--step-s", str(STEP_S)]
    environment = {**os.environ, "GROK_SERVER_LOG_FORMAT": "json", "GROK_SERVER_MAX_NUM_SEQS": str(AT_ONCE)}
    with log.open("w") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            yield next(match[1] for line in server.stdout if (match := re.match(r"Ready on (http://\S+)", line)))
        finally:
            server.terminate()


def show(name: str, figures: dict[str, dict[str, float]]) -> None:
    table = Table("figure", "median", "min", "max", title=f"overload, {name}")
    for figure, values in figures.items():
        table.add_row(figure, *(f"{values[column]:,.4g}" for column in ("median", "min", "max")))
    Console().print(table)


if __name__ == "__main__":
    main()
