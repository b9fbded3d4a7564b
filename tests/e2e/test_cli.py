"""The installed command, without an engine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "server")
TINY_A = Path(__file__).parents[1] / "data" / "tiny-a"


def grok_server(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"COLUMNS": "100"} | environment
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["complete", "--help"], ["chat", "--help"], ["inspect", "--help"]])
def test_help_is_quick_because_it_imports_nothing_heavy(arguments):
    seconds = []
    for _ in range(3):
        start = time.process_time(), os.times().children_user + os.times().children_system
        result = grok_server(*arguments)
        seconds.append(os.times().children_user + os.times().children_system - start[1])

    assert result.returncode == 0
    assert min(seconds) < 1.0


def test_help_shows_flags_with_their_defaults():
    text = grok_server("serve", "--help").stdout

    for expected in ("--max-num-batched-tokens", "--dtype", "auto|float32|bfloat16", "default: 8000", "GROK_SERVER_PORT"):
        assert expected in text


def test_version_is_the_distributions():
    result = grok_server("version")

    assert result.returncode == 0
    assert result.stdout.strip().count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "http"], "--port"),
        (["--model", "/does/not/exist"], "/does/not/exist is not a directory"),
        (["/does/not/exist"], "/does/not/exist is not a directory"),
        (["/one", "--model", "/other"], "two models are named"),
        (["--config", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        ([str(TINY_A), "--skip-tokenizer-init", "--max-model-len", "1000000"], "--max-model-len: the model was made for 256 tokens"),
        ([str(TINY_A)], "tokenizer"),
        (["--api-key", "my secret"], "--api-key: an API key is"),
        (["--api-key-file", "/does/not/exist", str(TINY_A), "--skip-tokenizer-init"], "--api-key-file: cannot read /does/not/exist"),
        (["--allowed-origins", "app.example"], "--allowed-origins: must be"),
        ([str(TINY_A), "--skip-tokenizer-init", "--chat-template", "x.jinja"], "--chat-template: without a tokenizer there is no chat"),
        (["--chat-template", "{% for %}"], "--chat-template, line 1: "),
        (["--chat-template", "/does/not/exist.jinja"], "--chat-template: cannot read /does/not/exist.jinja: No such file or directory"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_status_2(arguments, complaint):
    result = grok_server("serve", *arguments)

    assert result.returncode == 2
    assert result.stdout == ""
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert "secret" not in result.stderr


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_told_before_anything_starts(flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = grok_server("serve", str(TINY_A), "--skip-tokenizer-init", "--port", "0", flag, str(taken.getsockname()[1]))

    assert result.returncode == 4
    assert f"address already in use; choose another with {flag}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--host", "--metrics-host"])
def test_an_address_of_another_machine_is_told_before_anything_starts(flag):
    result = grok_server("serve", str(TINY_A), "--skip-tokenizer-init", "--port", "0", "--metrics-port", "0", flag, "192.0.2.1")

    assert result.returncode == 4
    assert "cannot listen on 192.0.2.1" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_flag_is_status_2():
    result = grok_server("serve", "--max-num-sequences", "4")

    assert result.returncode == 2
    assert "--max-num-sequences" in result.stderr


def test_inspect_prints_every_tensor_and_the_totals():
    result = grok_server("inspect", str(TINY_A), "--verify")

    assert result.returncode == 0, result.stderr
    assert "tensor00000_000" in result.stdout
    assert "language_model/in_out_embed" in result.stdout
    assert "26 tensors, 1,115,712 parameters" in result.stdout
    assert "verified" in result.stdout


def test_inspect_of_a_damaged_checkpoint_is_one_line_and_status_2(tmp_path):
    (tmp_path / "ckpt-0").mkdir()
    (tmp_path / "config.json").write_bytes((TINY_A / "config.json").read_bytes())
    for path in (TINY_A / "ckpt-0").iterdir():
        (tmp_path / "ckpt-0" / path.name).write_bytes(path.read_bytes()[: -1 if path.name == "tensor00003_000" else None])

    result = grok_server("inspect", str(tmp_path))

    assert result.returncode == 2
    assert "tensor00003_000" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
