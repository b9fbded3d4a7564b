"""What a prober and a log see while an engine loads."""

import os
import re
import subprocess
import sys

import httpx
from server_process import ROOT


def test_readyz_and_the_log_tell_how_far_loading_is():
    command = [sys.executable, ROOT / "tests/support/fake_engine_server.py", ROOT / "tests/data/tiny-a", "--start", "slow"]
    environment = {**os.environ, "GROK_SERVER_ENGINE_STANDBY": "false"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            url = next(match[1] for line in server.stdout if (match := re.match(r"Starting \S+ on (http://\S+)", line)))
            told = next(line for line in server.stdout if line.startswith("load: "))
            answer = httpx.get(f"{url}/readyz", timeout=60)
            is_alive = httpx.get(f"{url}/livez").status_code == 200
        finally:
            server.kill()

    assert told == "load: 1 of 3 tensors, 1 B of 4 B, 2 B/s, 2 s left\n"
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "model_loading",
        "phase": "load",
        "percent": 25.0,
        "done": 1,
        "total": 4,
        "unit": "bytes",
        "tensors_done": 1,
        "tensors_total": 3,
        "per_second": 2,
        "left_s": 1.5,
    }
    assert is_alive
