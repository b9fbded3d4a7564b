"""The edge of the real server process: keys and where they must not show, the metrics' own port, many clients that leave."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from server_process import ROOT, running_fake_server

SECRET = "sk-secret-0123456789abcdef"
BEARER = {"authorization": f"Bearer {SECRET}"}


@contextmanager
def started(directory: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server without a model that is ready: its process, URL and lines on stdout; `directory` gets its stderr."""
    command = [sys.executable, ROOT / "tests/support/fake_engine_server.py", ROOT / "tests/data/tiny-a"]
    environment = {**os.environ, "GROK_SERVER_ENGINE_STANDBY": "false", **environment}
    with (
        (directory / "stderr").open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as server,
    ):
        assert server.stdout is not None
        lines: list[str] = []
        try:
            while not (lines and lines[-1].strip().startswith("curl ")):
                lines.append(server.stdout.readline())
                assert lines[-1], f"ended: {lines} {(directory / 'stderr').read_text()}"
            url = next(match[1] for line in lines if (match := re.match(r"Ready on (http://\S+)", line)))
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield server, url, lines
        finally:
            server.terminate()


def engine_of(server: "subprocess.Popen[str]") -> Path:
    (engine,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return Path("/proc") / engine


def test_a_key_from_the_environment_opens_and_shows_nowhere_else(tmp_path: Path):
    with started(tmp_path, GROK_SERVER_API_KEY=SECRET, GROK_SERVER_LOG_LEVEL="debug") as (server, url, lines):
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers=BEARER).status_code == 200
        answer = httpx.post(f"{url}/v1/completions?key={SECRET}", json={"prompt": [5], "max_tokens": 1}, headers=BEARER)
        wrong = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {SECRET}x"})
        engine_environment = (engine_of(server) / "environ").read_bytes()

    assert answer.status_code == 200
    assert wrong.status_code == 401
    assert '-H "authorization: Bearer $API_KEY"' in lines[-1]
    assert b"GROK_SERVER_ENGINE_STANDBY" in engine_environment
    for place in (engine_environment.decode(), wrong.text, answer.text, "".join(lines), (tmp_path / "stderr").read_text()):
        assert SECRET not in place
    assert '"path": "/v1/completions"' in (tmp_path / "stderr").read_text()


def test_keys_of_a_file_open_and_a_file_for_everybodys_eyes_is_warned_of(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(f"{SECRET} ann\n")
    path.chmod(0o644)

    with started(tmp_path, GROK_SERVER_API_KEY_FILE=str(path)) as (_, url, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers=BEARER).status_code == 200

    assert "every user of this machine may read the file of API keys" in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [("0.0.0.0", "", True), ("0.0.0.0", SECRET, False), ("127.0.0.1", "", False), ("::1", "", False), ("::", "", True)],
)
def test_another_address_without_a_key_is_warned_of(tmp_path: Path, host: str, key: str, warned: bool):
    with started(tmp_path, GROK_SERVER_HOST=host, GROK_SERVER_API_KEY=key) as (_, url, _):
        assert httpx.get(f"{url}/livez").status_code == 200

    assert ("everyone who reaches this address may use the server" in (tmp_path / "stderr").read_text()) == warned


def test_metrics_have_a_port_of_their_own_where_one_is_set(tmp_path: Path):
    with started(tmp_path, GROK_SERVER_METRICS_PORT="0", GROK_SERVER_API_KEY=SECRET) as (_, url, lines):
        metrics_url = next(match[1] for line in lines if (match := re.match(r"Metrics on (http://127\.0\.0\.1:\d+/metrics)", line)))
        beside = httpx.get(metrics_url)
        other = httpx.get(metrics_url.replace("/metrics", "/v1/models"), headers=BEARER)
        inside = httpx.get(f"{url}/metrics", headers=BEARER)

    assert "grok:engine_ready 1.0" in beside.text
    assert (other.status_code, inside.status_code) == (404, 404)


def test_the_limits_are_logged_at_the_start(tmp_path: Path):
    with started(tmp_path, GROK_SERVER_MAX_CONNECTIONS="77"):
        give_up = time.monotonic() + 15
        while '"limits"' not in (tmp_path / "stderr").read_text():
            assert time.monotonic() < give_up
            time.sleep(0.05)

    (limits,) = [line for line in map(json.loads, (tmp_path / "stderr").read_text().splitlines()) if line["event"] == "limits"]
    assert (limits["max_connections"], limits["max_body_bytes"], limits["max_tenant_tokens"]) == (77, 1 << 20, None)


@pytest.mark.parametrize(("start", "status", "complaint"), [("fail", 2, "a shopping list"), ("crash", 3, "3 times in a row")])
def test_the_exit_status_tells_whether_the_engine_said_why_it_cannot_start_or_ended_again_and_again(
    start: str, status: int, complaint: str
):
    command = [sys.executable, ROOT / "tests/support/fake_engine_server.py", ROOT / "tests/data/tiny-a", "--start", start]

    server = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"GROK_SERVER_ENGINE_STANDBY": "false"})

    assert server.returncode == status
    assert complaint in server.stderr.splitlines()[-1]


def num_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def gauges(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_500_streams_opened_and_dropped_leave_blocks_and_files_where_they_were():
    with running_fake_server("--step-s", "0.01") as (server, url):
        body = {"prompt": [5], "max_tokens": 250, "stream": True}

        def open_and_drop() -> None:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                next(response.iter_lines())

        def drop(count: int) -> None:
            threads = [threading.Thread(target=open_and_drop) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def settle() -> tuple[int, int]:
            """Open files of the server and of its engine once nothing runs."""
            give_up = time.monotonic() + 30
            while gauges(url)["grok:num_requests_running"] or gauges(url)["grok:kv_cache_blocks_used"]:
                assert time.monotonic() < give_up
                time.sleep(0.05)
            (engine,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            time.sleep(0.2)  # for the last connections to be closed
            return num_files(server.pid), num_files(int(engine))

        drop(50)
        before = settle()
        for _ in range(10):
            drop(50)
        after = settle()
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": [5], "max_tokens": 3})

        assert after == before
        assert gauges(url)['grok:sequences_finished_total{finished_reason="abort"}'] == 550
        assert answer.json()["usage"]["completion_tokens"] == 3
