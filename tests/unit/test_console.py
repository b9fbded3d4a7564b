"""What the operator reads, and what happens when nobody does."""

import os
import subprocess
import sys

PROGRAM = """
import sys
from server.console import Console
console = Console(url="http://127.0.0.1:1", model_name="m", has_tokenizer=True)
console.starting()
sys.stdin.read()
console.stopping(2, timeout_s=3.0)
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
