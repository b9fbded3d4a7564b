"""Real processes, sockets and signals around an engine without a model: who dies when, and what the others do then."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import anyio
import httpx
import pytest
from fake_core import CRASHING, HANGING, engine_options, request

from engine.errors import EngineDiedError
from engine.types import EngineInfo, Progress
from server.supervisor import EngineStartError, Supervisor, pause_before_restart

SUPPORT = Path(__file__).parents[1] / "support"
ENGINE = (sys.executable, str(SUPPORT / "fake_engine_program.py"))
TINY_A = Path(__file__).parents[1] / "data" / "tiny-a"


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.num_ready = 0
        self.deaths: list[str] = []

    def engine_progressed(self, progress: Progress) -> None:
        self.progress.append(progress)

    def engine_ready(self, info: EngineInfo) -> None:  # noqa: ARG002
        self.num_ready += 1

    def engine_died(self, cause: str, *, pause_s: float) -> None:  # noqa: ARG002
        self.deaths.append(cause)


async def eventually(condition: Callable[[], object], *, within_s: float = 15.0) -> None:
    with anyio.fail_after(within_s):
        while not condition():
            await anyio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ignores_sigterm(pid: int) -> bool:
    """True from the moment on at which an engine process has begun to run its own code."""
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def oom_score(pid: int) -> int:
    """The higher, the earlier the kernel ends it for want of memory."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def engine_pids() -> list[int]:
    """The engines among the children of the test's own process, in the order of their start."""
    return [child for child in children(os.getpid()) if b"fake_engine_program" in Path(f"/proc/{child}/cmdline").read_bytes()]


def engine_pid() -> int:
    (pid,) = engine_pids()
    return pid


async def run_engine_with(
    check,
    *,
    command: tuple[str, ...] = ENGINE,
    stall_timeout_s: float = 30.0,
    standby_delay_s: float | None = None,
) -> Notes:
    """Supervise a fake engine, run `check(supervisor, notes)` once it is ready, stop."""
    notes = Notes()
    supervisor = Supervisor(
        engine_options(),
        watcher=notes,
        command=command,
        stall_timeout_s=stall_timeout_s,
        standby_delay_s=standby_delay_s,
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervisor.run)
        await eventually(lambda: supervisor.client.is_ready)
        await check(supervisor, notes)
        supervisor.stop()
    return notes


@pytest.mark.anyio
async def test_an_engine_process_generates_and_ends_with_its_connection():
    pids = []

    async def check(supervisor: Supervisor, notes: Notes) -> None:
        pids.append(engine_pid())
        deltas = [delta async for delta in supervisor.client.generate(request("a", 5, 6, max_tokens=3))]
        assert [delta.token_ids for delta in deltas] == [(5,), (6,), (5,)]
        assert notes.progress

    notes = await run_engine_with(check)

    assert not is_running(pids[0])
    assert notes.deaths == []


@pytest.mark.anyio
async def test_a_generation_goes_on_where_a_killed_engine_left_it():
    async def check(supervisor: Supervisor, notes: Notes) -> None:
        generation = supervisor.client.generate(request("a", 5, 6, 7, max_tokens=200))
        deltas = [await anext(generation)]

        os.kill(engine_pid(), signal.SIGKILL)

        deltas += [delta async for delta in generation]
        assert [token for delta in deltas for token in delta.token_ids] == [(5, 6, 7)[at % 3] for at in range(200)]
        assert notes.deaths == ["was ended by signal 9"]

    notes = await run_engine_with(check)

    assert notes.num_ready == 2


@pytest.mark.anyio
async def test_an_exception_in_a_step_shows_its_traceback_and_fails_the_request_that_causes_it_each_time(capfd):
    async def check(supervisor: Supervisor, notes: Notes) -> None:
        with pytest.raises(EngineDiedError):
            await anext(supervisor.client.generate(request("a", CRASHING)))
        await eventually(lambda: supervisor.client.is_ready)
        assert set(notes.deaths) == {"ended with status 1"}

    await run_engine_with(check)

    assert "RuntimeError: this prompt crashes the engine" in capfd.readouterr().err


@pytest.mark.anyio
async def test_an_engine_that_hangs_in_a_step_is_killed_and_replaced():
    async def check(supervisor: Supervisor, notes: Notes) -> None:
        async with aclosing(supervisor.client.generate(request("a", HANGING))) as generation, anyio.create_task_group() as tasks:
            tasks.start_soon(anext, generation)
            await eventually(lambda: notes.num_ready == 2)
            tasks.cancel_scope.cancel()
        assert notes.deaths == ["made no progress for 2 s and was killed"]

    await run_engine_with(check, stall_timeout_s=2.0)


@pytest.mark.anyio
async def test_an_idle_engine_is_left_alone_and_a_stopped_one_replaced_without_any_request():
    async def check(supervisor: Supervisor, notes: Notes) -> None:
        await anyio.sleep(2.5)
        assert notes.deaths == []

        os.kill(engine_pid(), signal.SIGSTOP)

        await eventually(lambda: notes.num_ready == 2)
        assert notes.deaths == ["made no progress for 2 s and was killed"]
        assert [delta async for delta in supervisor.client.generate(request("a"))]

    await run_engine_with(check, stall_timeout_s=2.0)


@pytest.mark.anyio
async def test_an_engine_stopped_in_mid_work_is_replaced():
    async def check(supervisor: Supervisor, notes: Notes) -> None:
        async with aclosing(supervisor.client.generate(request("a", max_tokens=10_000))) as generation:
            await anext(generation)

            os.kill(engine_pid(), signal.SIGSTOP)

            await eventually(lambda: notes.num_ready == 2)
        assert notes.deaths == ["made no progress for 2 s and was killed"]

    await run_engine_with(check, stall_timeout_s=2.0)


@pytest.mark.anyio
@pytest.mark.parametrize("stop", [None, signal.SIGSTOP])
async def test_a_process_that_stands_by_becomes_the_next_engine_and_is_woken_if_it_was_stopped(stop):
    async def check(supervisor: Supervisor, notes: Notes) -> None:
        await eventually(lambda: len(engine_pids()) == 2)
        first, standby = engine_pids()
        await eventually(lambda: oom_score(standby) == 1000)
        if stop is not None:
            os.kill(standby, stop)

        os.kill(first, signal.SIGKILL)

        await eventually(lambda: notes.num_ready == 2)
        assert [delta async for delta in supervisor.client.generate(request("a"))]
        assert engine_pids()[0] == standby
        assert oom_score(standby) == oom_score(os.getpid()), "want of memory may end it as any other, but not before any other"
        await eventually(lambda: len(engine_pids()) == 2)

    notes = await run_engine_with(check, standby_delay_s=0.0, stall_timeout_s=5.0)

    assert notes.deaths == ["was ended by signal 9"]
    assert engine_pids() == []


@pytest.mark.anyio
async def test_without_the_process_that_stood_by_a_new_one_becomes_the_engine():
    async def check(supervisor: Supervisor, notes: Notes) -> None:  # noqa: ARG001
        await eventually(lambda: len(engine_pids()) == 2)
        before = engine_pids()

        for pid in reversed(before):
            os.kill(pid, signal.SIGKILL)

        await eventually(lambda: notes.num_ready == 2)
        assert not set(engine_pids()) & set(before)

    await run_engine_with(check, standby_delay_s=0.0, stall_timeout_s=5.0)


@pytest.mark.anyio
async def test_where_no_process_can_be_started_the_engine_is_still_watched_and_its_successor_tried_again(tmp_path):
    program = tmp_path / "engine"
    program.write_text(f'#!/bin/sh\nexec {" ".join(ENGINE)} "$@"\n')
    program.chmod(0o700)
    elsewhere = tmp_path / "elsewhere"

    async def check(supervisor: Supervisor, notes: Notes) -> None:  # noqa: ARG001
        program.rename(elsewhere)
        await anyio.sleep(1.5)
        os.kill(engine_pid(), signal.SIGSTOP)
        await eventually(lambda: len(notes.deaths) >= 2)
        elsewhere.rename(program)
        await eventually(lambda: notes.num_ready == 2)

    notes = await run_engine_with(check, command=(str(program),), standby_delay_s=1.0, stall_timeout_s=2.0)

    assert notes.deaths[:2] == ["made no progress for 2 s and was killed", "could not be started (No such file or directory)"]


@pytest.mark.anyio
async def test_a_later_start_that_fails_for_a_reason_is_tried_again_because_the_first_one_worked(tmp_path):
    start, program = tmp_path / "start", tmp_path / "engine"
    start.write_text("ok")
    program.write_text(f'#!/bin/sh\nexec {" ".join(ENGINE)} --start "$(cat {start})" "$@"\n')
    program.chmod(0o700)

    async def check(supervisor: Supervisor, notes: Notes) -> None:  # noqa: ARG001
        start.write_text("fail")
        os.kill(engine_pid(), signal.SIGKILL)
        await eventually(lambda: len(notes.deaths) >= 2)
        start.write_text("ok")
        await eventually(lambda: notes.num_ready == 2)

    notes = await run_engine_with(check, command=(str(program),))

    assert notes.deaths[0] == "was ended by signal 9"
    assert notes.deaths[1].startswith("could not start (tensor00003_000: expected")


@pytest.mark.anyio
async def test_a_start_that_lives_but_makes_no_progress_is_given_up_in_the_end():
    notes = Notes()
    supervisor = Supervisor(engine_options(), watcher=notes, command=(*ENGINE, "--start", "slow"), start_timeout_s=1.0)

    with pytest.raises(EngineStartError, match="made no progress for 1 s and was killed 3 times in a row"), anyio.fail_after(30):
        await supervisor.run()

    assert len(notes.deaths) == 2


@pytest.mark.anyio
async def test_a_start_that_fails_for_a_reason_is_not_tried_again():
    notes = Notes()

    with pytest.raises(EngineStartError, match="found a shopping list") as caught, anyio.fail_after(15):
        await Supervisor(engine_options(), watcher=notes, command=(*ENGINE, "--start", "fail")).run()

    assert caught.value.exit_status == 2
    assert notes.deaths == []


@pytest.mark.anyio
async def test_a_start_that_crashes_is_given_up_after_three_times():
    notes = Notes()

    with pytest.raises(EngineStartError, match="ended with status 1 3 times in a row") as caught, anyio.fail_after(30):
        await Supervisor(engine_options(), watcher=notes, command=(*ENGINE, "--start", "crash")).run()

    assert caught.value.exit_status == 3
    assert len(notes.deaths) == 2


@pytest.mark.anyio
async def test_stopping_in_the_middle_of_a_start_ends_the_engine_at_once():
    supervisor = Supervisor(engine_options(), watcher=Notes(), command=(*ENGINE, "--start", "slow"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervisor.run)
        await eventually(lambda: supervisor.client.progress is not None)
        pid = engine_pid()
        start = time.monotonic()
        supervisor.stop()

    assert time.monotonic() - start < 15
    assert not is_running(pid)


def test_pauses_between_restarts_grow_to_a_bound():
    pauses = [pause_before_restart(count) for count in (1, 2, 3, 4, 100)]

    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0]


class Server:
    """The whole server in a process of its own, with what it printed so far."""

    def __init__(self, *engine_arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "fake_engine_server.py"), str(TINY_A), *engine_arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GROK_SERVER_ENGINE_STANDBY": "false", "GROK_SERVER_SHUTDOWN_NOTICE": "0"} | environment,
            start_new_session=True,
        )
        self.output = ""
        self.errors = ""
        self._readers = [threading.Thread(target=self._read, args=(name,)) for name in ("stdout", "stderr")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            if name == "stdout":
                self.output += line
            else:
                self.errors += line

    def wait_for(self, pattern: str, *, within_s: float = 30.0) -> str:
        give_up = time.monotonic() + within_s
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < give_up, f"no {pattern!r} in {self.output!r}; stderr: {self.errors!r}"
            assert self.process.poll() is None or self._readers[0].is_alive(), f"ended: {self.output!r} {self.errors!r}"
            time.sleep(0.02)
        return found[1] if found.groups() else found[0]

    @property
    def url(self) -> str:
        return self.wait_for(r"Starting \S+ on (\S+)")

    def wait(self, *, within_s: float = 30.0) -> int:
        status = self.process.wait(timeout=within_s)
        for reader in self._readers:
            reader.join()
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


@contextmanager
def running(*engine_arguments: str, **environment: str) -> Iterator[Server]:
    server = Server(*engine_arguments, **environment)
    try:
        yield server
    finally:
        server.close()


def wait_until(condition: Callable[[], bool], *, within_s: float) -> None:
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def wait_until_gone(pids: list[int], *, within_s: float = 15.0) -> None:
    wait_until(lambda: not any(map(is_running, pids)), within_s=within_s)


def stream_lines(url: str, *, max_tokens: int) -> Iterator[str]:
    """The data lines of a streamed completion, without `[DONE]`."""
    body = {"model": "tiny-a", "prompt": [5, 6], "max_tokens": max_tokens, "stream": True, "temperature": 0, "logprobs": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


def test_the_server_starts_prints_a_curl_serves_and_ends_with_status_0_on_sigterm():
    with running() as server:
        command = server.wait_for(r"curl http.*")
        answer = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
        pids = children(server.process.pid)

        server.process.send_signal(signal.SIGTERM)

        assert server.wait() == 0
        assert json.loads(answer)["object"] == "text_completion"
        assert "KV cache" in server.output
        assert "Traceback" not in server.errors
        wait_until_gone(pids)


def test_while_the_engine_loads_the_server_is_alive_and_not_ready():
    with running("--start", "slow") as server:
        url = server.url
        server.wait_for("load: 1 of 3 tensors")

        assert httpx.get(f"{url}/livez", timeout=20).status_code == 200
        ready = httpx.get(f"{url}/readyz")

        assert ready.status_code == 503
        assert "load" in ready.text
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_start_that_fails_ends_the_server_with_status_2_and_that_one_line():
    with running("--start", "fail") as server:
        assert server.wait() == 2
        assert server.errors.splitlines() == ["error: tensor00003_000: expected int8 of 8 x 64, found a shopping list"]


def test_the_engine_is_gone_soon_after_its_server_was_killed():
    with running() as server:
        server.wait_for("Ready on")
        pids = children(server.process.pid)

        server.process.kill()

        assert len(pids) == 1
        wait_until_gone(pids)


def test_a_process_that_stands_by_is_gone_soon_after_its_server_was_killed():
    with running(GROK_SERVER_ENGINE_STANDBY="true") as server:
        server.wait_for("Ready on")
        wait_until(lambda: len(children(server.process.pid)) == 2, within_s=15)
        pids = children(server.process.pid)
        wait_until(lambda: ignores_sigterm(pids[1]), within_s=15)
        os.kill(pids[1], signal.SIGSTOP)

        server.process.kill()

        wait_until_gone(pids)


def test_an_engine_that_still_loads_is_gone_soon_after_its_server_was_killed():
    with running("--start", "slow") as server:
        server.wait_for("load: 1 of 3 tensors")
        pids = children(server.process.pid)

        server.process.kill()

        wait_until_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stopped process cannot learn of its parent's end")
@pytest.mark.parametrize(("start", "sign"), [("ok", "Ready on"), ("slow", "load: 1 of 3 tensors")])
def test_even_a_stopped_engine_is_gone_soon_after_its_server_was_killed(start, sign):
    with running("--start", start) as server:
        server.wait_for(sign)
        pids = children(server.process.pid)
        os.kill(pids[0], signal.SIGSTOP)

        server.process.kill()

        wait_until_gone(pids)


def test_after_a_killed_engine_the_server_becomes_ready_again():
    with running() as server:
        server.wait_for("Ready on")
        (pid,) = children(server.process.pid)

        os.kill(pid, signal.SIGKILL)

        wait_until_gone([pid])
        give_up = time.monotonic() + 15
        while httpx.get(f"{server.url}/readyz").status_code != 200 or children(server.process.pid) == [pid]:
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert list(stream_lines(server.url, max_tokens=3))[-1] == "[DONE]"


def test_sigterm_lets_a_running_stream_finish_and_refuses_new_requests():
    with running("--step-s", "0.02") as server:
        server.wait_for("Ready on")
        lines = stream_lines(server.url, max_tokens=100)
        next(lines)

        server.process.send_signal(signal.SIGTERM)
        server.wait_for("Stopping; 1 running")
        refused = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny-a", "prompt": [5]})

        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert list(lines)[-1] == "[DONE]"
        assert server.wait() == 0


def test_what_is_not_finished_at_the_shutdown_timeout_is_told_so():
    with running("--step-s", "0.05", GROK_SERVER_SHUTDOWN_TIMEOUT="0.5") as server:
        server.wait_for("Ready on")
        lines = stream_lines(server.url, max_tokens=250)
        next(lines)

        server.process.send_signal(signal.SIGTERM)

        last = list(lines)[-1]
        assert "error" in json.loads(last)
        assert server.wait() == 0


def test_a_second_signal_ends_everything_at_once():
    with running("--step-s", "0.2") as server:
        server.wait_for("Ready on")
        pids = children(server.process.pid)
        lines = stream_lines(server.url, max_tokens=250)
        next(lines)

        server.process.send_signal(signal.SIGINT)
        server.wait_for("Stopping")
        server.process.send_signal(signal.SIGINT)

        assert server.wait(within_s=15) == 130, "long before the stream's end"
        wait_until_gone(pids)
        lines.close()


def test_ctrl_c_in_the_terminal_reaches_both_processes_and_prints_no_traceback():
    with running() as server:
        server.wait_for("Ready on")

        os.killpg(server.process.pid, signal.SIGINT)

        assert server.wait() == 0
        assert "Traceback" not in server.errors
