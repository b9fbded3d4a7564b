"""What the operator reads, and what happens when nobody does."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from fake_core import engine_options, options_info
from structlog.testing import capture_logs

from engine.types import Progress
from server.console import Console, readable_seconds
from server.limits import Limits
from server.settings import limits_by_setting

PROGRAM = """
import sys
from server.console import Console
console = Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True)
console.starting()
sys.stdin.read()
console.stopping(2, timeout_s=3.0)
print("still here", file=sys.stderr)
"""

BARS = """
import sys, time
from engine.types import Progress
from server.console import Console
console = Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True)
for done in range(3):
    console.engine_progressed(Progress(phase="load", done=done, total=2, unit="bytes", detail=""))
    time.sleep(0.15)
console.close()
console.stopping(0, timeout_s=3.0)
print("still here", file=sys.stderr)
"""


def test_lines_arrive_at_once_where_stdout_is_a_pipe():
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        rest, _ = child.communicate("")

    assert first == "Starting m on http://127.0.0.1:1\n"
    assert rest == "Stopping; 2 running sequences get up to 3 s, a second signal stops at once\n"


def test_a_reader_that_went_away_does_not_end_the_server():
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE, text=True
    ) as child:
        os.close(writing)
        os.close(reading)
        _, errors = child.communicate("")

    assert child.returncode == 0
    assert errors == "still here\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
@pytest.mark.parametrize(("program", "environment"), [(PROGRAM, {}), (BARS, {}), (BARS, {"FORCE_COLOR": "1", "TERM": "xterm"})])
def test_a_stdout_that_cannot_be_written_does_not_end_the_server(program, environment):
    with open("/dev/full", "w") as full:
        child = subprocess.run(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | environment,
        )

    assert (child.returncode, child.stderr) == (0, "still here\n")


def test_every_program_has_a_line_and_the_weights_a_few(capsys):
    console = Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True)

    for done in range(1, 5):
        console.engine_progressed(Progress(phase="load", done=done, total=4, unit="bytes", detail=f"tensor {done}"))
        detail = f"step {done}: {'from the cache' if done % 2 else 'compiled'}"
        console.engine_progressed(Progress(phase="compile", done=done, total=4, unit="programs", detail=detail))

    assert capsys.readouterr().out.splitlines() == [
        "load: 1 B of 4 B tensor 1",
        "compile: 1 of 4 programs step 1: from the cache",
        "compile: 2 of 4 programs step 2: compiled",
        "compile: 3 of 4 programs step 3: from the cache",
        "load: 4 B of 4 B tensor 4",
        "compile: 4 of 4 programs step 4: compiled",
    ]


def test_loading_is_told_in_tensors_bytes_rate_and_time_left(capsys, monkeypatch):
    half = Progress(
        phase="load",
        done=159_000_000_000,
        total=318_000_000_000,
        unit="bytes",
        detail="x",
        tensors_done=385,
        tensors_total=770,
        elapsed_s=75,
    )
    monkeypatch.setenv("COLUMNS", "80")

    Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True).engine_progressed(half)
    line = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True)
    console.engine_progressed(half)
    console.close()
    bar = capsys.readouterr().out

    assert line == "load: 385 of 770 tensors, 159.0 GB of 318.0 GB, 2.1 GB/s, 1 min 15 s left x\n"
    assert "385 of 770 tensors, 159.0 GB of 318.0 GB, 2.1 GB/s" in bar


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (59.5, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (7384, "2 h 3 min")]
)
def test_seconds_are_told_in_two_units_at_most(seconds, text):
    assert readable_seconds(seconds) == text


def test_a_ready_engine_says_how_many_of_its_programs_were_compiled_before(capsys):
    console = Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True)

    console.engine_ready(replace(options_info(engine_options()), num_programs=7, num_cached_programs=5))

    assert "7 programs, 5 of them compiled before" in capsys.readouterr().out


def test_the_limits_are_a_table_on_a_terminal_and_a_log_line_elsewhere(capsys, monkeypatch):
    limits = limits_by_setting(replace(Limits(), max_tenant_tokens=None, write_timeout_s=2.5))

    def shown() -> tuple[list, str]:
        with capture_logs() as lines:
            console = Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True, limits=limits)
            console.starting()
            console.log_limits()
        return lines, capsys.readouterr().out

    logged, printed = shown()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    logged_on_terminal, printed_on_terminal = shown()

    assert logged == [{"event": "limits", "log_level": "info", **limits}]
    assert "max_connections" not in printed
    assert logged_on_terminal == []
    for cell in ("max_connections 1,024", "max_tenant_tokens none", "write_timeout_s 2.5"):
        assert cell in printed_on_terminal
