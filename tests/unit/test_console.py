"""What the operator reads, and what happens when nobody does."""

import os
import subprocess
import sys

import pytest

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
