"""Several engine processes serve one model: the tokens of one process, one end for all, and streams that go on exactly.

On one machine, and on two network namespaces with a cable between them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import COMMAND, COMPILE_CACHE, ROOT, RunningServer, running_server
from two_hosts import Host, two_hosts, why_not

pytestmark = pytest.mark.timeout(900)  # each process compiles for itself the first time

TINY_A = ROOT / "tests" / "data" / "tiny-a"
SMALL = ("--skip-tokenizer-init", "--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "16")
TINY = ("--model", str(TINY_A), "--tensor-parallel-size", "2", *SMALL)
PROMPT = [5, 7, 9, 11]
NUM_TOKENS = 200
END_S = 10.0
LIKELIEST = {"temperature": 0}
SEEDED = {"temperature": 1, "seed": 7, "presence_penalty": 0.5}


def body(**fields: Any) -> dict[str, Any]:
    shown = {"logprobs": 0, "return_tokens_as_token_ids": True, "ignore_eos": True}
    return {"prompt": PROMPT, "max_tokens": NUM_TOKENS, **shown, **fields}


def tokens_of(answer: dict[str, Any]) -> list[str]:
    return answer["choices"][0]["logprobs"]["tokens"]


def ask(url: str, **fields: Any) -> list[str]:
    answer = httpx.post(f"{url}/v1/completions", json=body(**fields), timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    return tokens_of(answer.json())


class Stream:
    """A stream that is read in a thread; `host` is where from, if not from here."""

    def __init__(self, url: str, host: Host | None = None, **fields: Any) -> None:
        self.tokens: list[str] = []
        self._url, self._body = f"{url}/v1/completions", body(stream=True, **fields)
        self._thread = threading.Thread(target=self._read if host is None else lambda: host.run(self._read))
        self._thread.start()

    def wait_for(self, num_tokens: int) -> None:
        while len(self.tokens) < num_tokens:
            assert self._thread.is_alive()
            time.sleep(0.002)

    def whole(self) -> list[str]:
        self._thread.join()
        return self.tokens

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=600, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {") and (choices := json.loads(line[6:]).get("choices")) and choices[0].get("logprobs"):
                    self.tokens += choices[0]["logprobs"]["tokens"]


def children(pid: int) -> list[int]:
    """Of any of its threads, oldest first."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return sorted(found, key=lambda child: int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[19]))


def engines(pid: int) -> list[int]:
    """The engine processes under a server: the one that it started, then those that this one did."""
    (leader,) = (child for child in children(pid) if b"engine" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"))
    return [leader, *children(leader)]


def is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until_over(pids: list[int], *, within_s: float) -> None:
    start_s = time.monotonic()
    while remaining := [pid for pid in pids if not is_over(pid)]:
        assert time.monotonic() - start_s < within_s, f"{remaining} of {pids} still run"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def expected(tiny_a_server: RunningServer) -> dict[str, list[str]]:
    """What one process on one device answers."""
    return {"likeliest": ask(tiny_a_server.url, **LIKELIEST), "seeded": ask(tiny_a_server.url, **SEEDED)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Two processes with a device each."""
    with running_server(tmp_path_factory.mktemp("pair"), *TINY, "--processes-per-node", "2") as server:
        yield server


def test_two_processes_give_the_tokens_of_one(pair: RunningServer, expected: dict[str, list[str]]):
    assert len(engines(pair.pid)) == 2
    assert ask(pair.url, **LIKELIEST) == expected["likeliest"]
    assert ask(pair.url, **SEEDED) == expected["seeded"]


@pytest.mark.parametrize(
    ("victim", "signum"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL), (0, signal.SIGSTOP)], ids=lambda value: str(value)
)
def test_the_end_of_any_is_the_end_of_all_and_streams_go_on_exactly(
    pair: RunningServer, expected: dict[str, list[str]], victim: int, signum: signal.Signals
):
    group = engines(pair.pid)
    likeliest, seeded = Stream(pair.url, **LIKELIEST), Stream(pair.url, **SEEDED)
    likeliest.wait_for(20)

    os.kill(group[victim], signum)

    wait_until_over(group, within_s=END_S)
    assert likeliest.whole() == expected["likeliest"]
    assert seeded.whole() == expected["seeded"]
    assert set(engines(pair.pid)).isdisjoint(group)


def test_nothing_outlives_a_server_that_is_killed(tmp_path: Path):
    ended = pytest.raises(AssertionError, match="status -9 after SIGTERM")
    with ended, running_server(tmp_path, *TINY, "--processes-per-node", "2") as server:
        group = engines(server.pid)

        os.kill(server.pid, signal.SIGKILL)

        wait_until_over(group, within_s=END_S)


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 4), (4, 2)])
def test_eight_devices_of_several_processes_give_the_tokens_of_one(
    default_server: RunningServer, tmp_path: Path, num_processes: int, num_devices: int
):
    few = ("--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--tensor-parallel-size", "8")
    wanted = {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": False}
    likeliest, seeded = ask(default_server.url, **wanted, **LIKELIEST), ask(default_server.url, **wanted, **SEEDED)

    with running_server(tmp_path, *few, "--processes-per-node", str(num_processes), num_devices=num_devices) as server:
        assert len(engines(server.pid)) == num_processes
        assert ask(server.url, **wanted, **LIKELIEST) == likeliest
        assert ask(server.url, **wanted, **SEEDED) == seeded


def test_every_process_has_a_share_of_every_data_shard(tmp_path: Path, expected: dict[str, list[str]]):
    flags = (*TINY, "--data-parallel-size", "2", "--processes-per-node", "2")
    with running_server(tmp_path, *flags, num_devices=2) as server:
        streams = [Stream(server.url, **LIKELIEST) for _ in range(4)]

        assert [stream.whole() for stream in streams] == [expected["likeliest"]] * 4
        assert ask(server.url, **SEEDED) == expected["seeded"]


# nodes


def serve_command(*arguments: str) -> list[str]:
    return [str(COMMAND), "serve", "--compile-cache-dir", str(COMPILE_CACHE), *arguments]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GROK_SERVER_CHECK_SHAPES")}


REFUSALS = {
    "rank": (("--nnodes", "2", "--node-rank", "2", "--master-addr", "127.0.0.1"), "--node-rank: of 2 nodes the last has rank 1, found 2"),
    "address": (("--nnodes", "2"), "--master-addr: several nodes need the address of the one with rank 0"),
    "unreachable": (
        ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "1", "--engine-start-timeout", "1"),
        "no leader answers at 127.0.0.1:1 within 0.9 s",
    ),
    "missing": (
        ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", "29517", "--engine-start-timeout", "2"),
        "1 of 2 processes of the group did not come to 127.0.0.1:29517 within 1.8 s: start the nodes with rank 1",
    ),
    "elsewhere": (("--nnodes", "2", "--master-addr", "192.0.2.1"), "cannot wait for the other processes on 192.0.2.1:29501"),
    "mesh": (("--processes-per-node", "3"), "2 devices of one replica cannot be shared evenly by 3 processes"),
    "devices": (("--processes-per-node", "2", "--tensor-parallel-size", "4"), "wants 4 devices, 2 are here"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_group_that_cannot_be_is_refused_with_its_reason(case: str):
    arguments, reason = REFUSALS[case]

    done = subprocess.run(
        serve_command("--port", "0", *TINY, *arguments), env=environment(), capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Two nodes; the second is started again whenever it ends."""

    url: str
    leader: int  # the first one's server
    _restarter: int

    def engines(self) -> list[int]:
        """One of each node."""
        (second,) = children(self._restarter)
        return [engines(self.leader)[0], *children(second)]


@contextmanager
def two_nodes(directory: Path, port: int, hosts: tuple[Host, Host]) -> Iterator[Nodes]:
    first, second = hosts
    flags = (*TINY, "--nnodes", "2", "--master-addr", first.address, "--master-port", str(port))
    lead = first.command(*serve_command(*flags, "--host", first.address, "--port", "0"))
    again = [sys.executable, "-c", "import subprocess, sys\nwhile subprocess.call(sys.argv[1:]) != 0: pass"]
    follow = second.command(*serve_command(*flags, "--node-rank", "1"))
    log, node_log = directory / "leader.log", directory / "node.log"
    with (
        log.open("w") as stderr,
        node_log.open("w") as output,
        subprocess.Popen([*again, *follow], stdout=output, stderr=output, env=environment()) as restarter,
        subprocess.Popen(lead, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()) as server,
    ):
        assert server.stdout is not None
        try:
            ready = next((match for line in server.stdout if (match := re.match(r"Ready on (http://\S+)", line))), None)
            assert ready, log.read_text()[-2000:] + node_log.read_text()[-2000:]
            yield Nodes(url=ready[1], leader=server.pid, _restarter=restarter.pid)
        finally:
            for pid in children(restarter.pid):
                os.kill(pid, signal.SIGTERM)
            server.terminate()
            if not wait(restarter, within_s=30):
                restarter.kill()
    assert (server.returncode, restarter.returncode) == (0, 0), log.read_text()[-2000:] + node_log.read_text()[-2000:]


def wait(process: "subprocess.Popen[Any]", *, within_s: float) -> bool:
    """Whether it has ended by then."""
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, hosts: tuple[Host, Host]) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("nodes"), 29518, hosts) as both:
        yield both


def test_two_hosts_give_the_tokens_of_one_process(nodes: Nodes, hosts: tuple[Host, Host], expected: dict[str, list[str]]):
    assert len(nodes.engines()) == 2
    assert hosts[0].run(lambda: ask(nodes.url, **LIKELIEST)) == expected["likeliest"]
    assert hosts[0].run(lambda: ask(nodes.url, **SEEDED)) == expected["seeded"]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_end_of_one_hosts_engine_is_the_others_and_streams_go_on_exactly(
    nodes: Nodes, hosts: tuple[Host, Host], expected: dict[str, list[str]], victim: int
):
    group = nodes.engines()
    stream = Stream(nodes.url, hosts[0], **LIKELIEST)
    stream.wait_for(20)

    os.kill(group[victim], signal.SIGKILL)

    wait_until_over(group, within_s=END_S)
    assert stream.whole() == expected["likeliest"]


def test_hosts_that_cannot_reach_each_other_both_end_their_engines(nodes: Nodes, hosts: tuple[Host, Host], expected: dict[str, list[str]]):
    group = nodes.engines()
    stream = Stream(nodes.url, hosts[0], **SEEDED)
    stream.wait_for(20)

    with hosts[0].cut_off():
        wait_until_over(group, within_s=END_S)

    assert stream.whole() == expected["seeded"]


def test_sigterm_to_all_lets_the_leader_answer_first(hosts: tuple[Host, Host], tmp_path: Path, expected: dict[str, list[str]]):
    with two_nodes(tmp_path, 29520, hosts) as both:
        stream = Stream(both.url, hosts[0], **LIKELIEST)
        stream.wait_for(5)

    assert stream.whole() == expected["likeliest"]


def test_a_node_with_other_settings_is_refused_with_what_differs(tmp_path: Path):
    port = ("--master-addr", "127.0.0.1", "--master-port", "29519", "--nnodes", "2")
    with (
        (tmp_path / "leader.log").open("w") as log,
        subprocess.Popen(serve_command("--port", "0", *TINY, *port), stdout=log, stderr=log, env=environment()) as leader,
    ):
        try:
            other = ("--node-rank", "1", "--block-size", "32")
            done = subprocess.run(
                serve_command(*TINY, *port, *other), env=environment(), capture_output=True, text=True, timeout=120, check=False
            )
        finally:
            leader.terminate()

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: its settings differ: block_size is 32 there and 16 at the leader")
    assert leader.returncode == 0
