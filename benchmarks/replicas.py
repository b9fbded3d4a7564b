"""Two replicas behind nginx with `deploy/nginx.conf`: what clients notice when one is killed, and when one is replaced.

    python -m benchmarks.replicas [--model DIR] [--seconds N] [--clients N]

Needs nginx. Clients of the `openai` SDK ask as fast as they are answered, by turns for an answer in one piece and for a stream, 16 tokens
each. In the first part a replica is killed (SIGKILL, its whole group) after a third of the time and started again at once, and a client
may retry once: the SDK does that itself, but not after the first byte of a stream, where the client asks again. In the second part both
replicas are replaced one after the other as a rolling update does it, SIGTERM and a new start, and nobody retries. A request fails where no
whole answer with the right text came of it. Printed and kept in `benchmarks/results/replicas.json`.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from openai.types import Completion
from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine
from server.settings import default_model_dir

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "replicas.json"
PROMPT = "Once upon a time"
NUM_TOKENS = 16
NUM_REPLICAS = 2
NOTICE_S = 5  # long enough for nginx to come back to the replica that was replaced before
AFTERWARDS_S = 5.0  # clients ask on once everything is as it was
REQUEST_TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description="What clients notice when one of two replicas behind nginx is killed, or replaced.")
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part, more where a replica starts slowly")
    parser.add_argument("--clients", type=int, default=4)
    arguments = parser.parse_args()
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        sys.exit("nginx is not installed")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replicas = [
            stack.enter_context(Replica(arguments.model, port=free_port(), log=folder / f"{number}.log")) for number in range(NUM_REPLICAS)
        ]
        router = stack.enter_context(running_nginx(nginx, [replica.port for replica in replicas], folder))
        figures = asyncio.run(both_parts(router, replicas, arguments))
    show(figures)
    version = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=True).stderr.strip().rpartition("/")[2]
    setting = {
        "model": arguments.model.name,
        "seconds": arguments.seconds,
        "clients": arguments.clients,
        "tokens": NUM_TOKENS,
        "shutdown_notice": NOTICE_S,
        "nginx": version,
    }
    RESULTS.write_text(json.dumps({"machine": machine(), "setting": setting, "figures": figures}, indent=1) + "\n")


class Replica:
    """A server on a port of its own, which can end and start again there."""

    def __init__(self, model_dir: Path, *, port: int, log: Path) -> None:
        self.port = port
        self._log = log
        self._command = [
            *(str(Path(sys.executable).with_name("grok-server")), "serve", "--model", str(model_dir), "--port", str(port)),
            *("--shutdown-notice", str(NOTICE_S), "--no-engine-standby", "--log-level", "warning"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Replica":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """In a group of its own, so that a kill meets all its processes as the end of a machine does."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def signal(self, signum: signal.Signals) -> None:
        """SIGTERM goes to the server alone, as container runtimes send it; SIGKILL to all. Nothing where it has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        if signum == signal.SIGKILL:
            os.killpg(self._process.pid, signum)
            self._process.wait()
        else:
            self._process.send_signal(signum)

    async def ended(self) -> int:
        """The exit status."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait)

    async def ready(self) -> None:
        """Raises `RuntimeError` where the server ends instead."""
        async with httpx.AsyncClient() as client:
            while True:
                assert self._process is not None
                if self._process.poll() is not None:
                    raise RuntimeError(self._log.read_text()[-2000:])
                try:
                    if (await client.get(f"{self.url}/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """nginx, with a line of its log for every request: the replicas that it asked, with commas between them, and what they said."""

    url: str
    log: Path

    def num_passed_on(self, *, since: int) -> int:
        """Requests that another replica got after the first `since` bytes of the log."""
        return sum("," in line for line in self.log.read_bytes()[since:].decode().splitlines())


@contextmanager
def running_nginx(nginx: str, ports: list[int], folder: Path) -> Iterator[Router]:
    """The file of `deploy/` with nothing changed but the addresses."""
    port = free_port()
    remaining = iter(ports)
    site = re.sub(
        r"server 192\.0\.2\.\d+:8000", lambda _: f"server 127.0.0.1:{next(remaining)}", (ROOT / "deploy" / "nginx.conf").read_text()
    )
    (folder / "site.conf").write_text(site.replace("listen 8000;", f"listen 127.0.0.1:{port};"))
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main_file, log = folder / "nginx.conf", folder / "access.log"
    main_file.write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 2;\nevents {{}}\n"
        f"http {{ log_format asked '$status $upstream_addr $upstream_status'; access_log {log} asked;\n"
        f"{temporary} include {folder}/site.conf; }}\n"
    )
    log.touch()
    with subprocess.Popen([nginx, "-p", folder, "-c", main_file]) as process:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if process.poll() is not None:
                        raise
                    time.sleep(0.02)
            yield Router(url=f"http://127.0.0.1:{port}", log=log)
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Part:
    """What came of the requests of one part."""

    took_s: list[float] = field(default_factory=list[float])
    failures: list[str] = field(default_factory=list[str])
    num_retries: int = 0
    num_streams_cut: int = 0  # after the first byte, which is no failure where the second attempt is whole
    events_s: dict[str, float] = field(default_factory=dict[str, float])


Fault = Callable[[Part, list[Replica]], Awaitable[None]]


class Clients:
    """Users of the SDK, each with one request open at a time."""

    def __init__(self, url: str, part: Part, *, model_name: str, retries: int = 0, expected: str | None = None) -> None:
        self.part = part
        self._body: dict[str, Any] = {"model": model_name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        self._body["extra_body"] = {"ignore_eos": True}
        self._retries = retries
        self._expected = expected  # the text, the same from every replica
        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._count]})
        self._sdk = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="unused", max_retries=retries, timeout=REQUEST_TIMEOUT_S, http_client=http
        )

    async def _count(self, request: Any) -> None:
        self.part.num_retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    async def plain(self) -> str:
        """Raises whatever the SDK does once its own retries are spent."""
        completion = await self._sdk.completions.create(**self._body)
        return completion.choices[0].text

    async def stream(self) -> str:
        """Raises like `plain`, and where the stream has no proper end even after the retries."""
        for attempt in range(self._retries + 1):
            stream = await self._sdk.completions.create(stream=True, **self._body)
            try:
                return await whole_text(stream)
            except Exception:
                self.part.num_streams_cut += 1
                if attempt == self._retries:
                    raise
                self.part.num_retries += 1
        raise AssertionError

    async def ask(self, *, until: asyncio.Event) -> None:
        """One user, for as long as the event is not set."""
        ways: list[Callable[[], Awaitable[str]]] = [self.plain, self.stream]
        while not until.is_set():
            began_s = time.monotonic()
            ways.reverse()
            try:
                text = await ways[0]()
            except Exception as error:
                self.part.failures.append(f"{type(error).__name__}: {error}"[:200])
                continue
            self.part.took_s.append(time.monotonic() - began_s)
            if text != self._expected:
                self.part.failures.append(f"another text: {text!r}")


async def whole_text(stream: openai.AsyncStream[Completion]) -> str:
    """Raises whatever the SDK does where the stream breaks off, `ValueError` where it ends without having said why."""
    text, finish_reason = "", None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            finish_reason = choice.finish_reason or finish_reason
    if finish_reason is None:
        raise ValueError("a stream ended as if it were whole, without a finish reason")
    return text


async def both_parts(router: Router, replicas: list[Replica], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures by part."""
    await asyncio.gather(*(replica.ready() for replica in replicas))
    expected = {await Clients(replica.url, Part(), model_name=arguments.model.name).plain() for replica in replicas}
    if len(expected) != 1:
        raise RuntimeError(f"the replicas differ: {expected}")
    (text,) = expected

    async def part(fault: Fault, *, retries: int) -> dict[str, Any]:
        return await one_part(router, replicas, arguments, fault=fault, retries=retries, expected=text)

    return {
        "SIGKILL, one retry": await part(killed, retries=1),
        "rolling update, no retry": await part(replaced, retries=0),
    }


async def one_part(
    router: Router, replicas: list[Replica], arguments: argparse.Namespace, *, fault: Fault, retries: int, expected: str
) -> dict[str, Any]:
    part, since = Part(), router.log.stat().st_size
    clients = Clients(router.url, part, model_name=arguments.model.name, retries=retries, expected=expected)
    until = asyncio.Event()
    asking = [asyncio.create_task(clients.ask(until=until)) for _ in range(arguments.clients)]
    began_s = time.monotonic()
    await asyncio.sleep(arguments.seconds / 3)
    await fault(part, replicas)
    await asyncio.sleep(max(AFTERWARDS_S, began_s + arguments.seconds - time.monotonic()))
    until.set()
    await asyncio.gather(*asking)
    return {
        "requests": len(part.took_s) + len(part.failures),
        "failed": len(part.failures),
        "first failure": next(iter(part.failures), None),
        "passed on to the other replica by nginx": router.num_passed_on(since=since),
        "streams cut": part.num_streams_cut,
        "retries by clients": part.num_retries,
        "seconds of a request, median": round(statistics.median(part.took_s), 3),
        "seconds of a request, longest": round(max(part.took_s), 3),
        **{name: round(value, 1) for name, value in part.events_s.items()},
    }


async def killed(part: Part, replicas: list[Replica]) -> None:
    """One replica, and started again at once."""
    async with timed(part, "seconds from the kill to readiness"):
        replicas[0].signal(signal.SIGKILL)
        replicas[0].start()
        await replicas[0].ready()


async def replaced(part: Part, replicas: list[Replica]) -> None:
    """One replica after the other, each only once the one before is ready again."""
    for number, replica in enumerate(replicas, start=1):
        async with timed(part, f"seconds from SIGTERM to readiness, replica {number}"):
            replica.signal(signal.SIGTERM)
            if status := await replica.ended():
                part.failures.append(f"a replica ended with status {status}")
            replica.start()
            await replica.ready()


@asynccontextmanager
async def timed(part: Part, name: str) -> AsyncIterator[None]:
    began_s = time.monotonic()
    yield
    part.events_s[name] = time.monotonic() - began_s


def show(figures: dict[str, dict[str, Any]]) -> None:
    for name, values in figures.items():
        table = Table("figure", "value", title=name)
        for figure, value in values.items():
            table.add_row(figure, json.dumps(value))
        Console().print(table)


if __name__ == "__main__":
    main()
