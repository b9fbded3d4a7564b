"""`grok-server plan` as people and scripts use it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_checkpoints import converted, write_released

TINY_A = Path(__file__).parents[1] / "data" / "tiny-a"


def plan(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "server", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "100"}, check=False)


def test_grok_1_needs_no_files_and_fits_eight_h100s():
    result = plan()

    assert result.returncode == 0, result.stderr
    assert "318,239,694,848 bytes" in result.stdout
    assert "It fits." in result.stdout


def test_what_does_not_fit_ends_with_status_1_and_what_would():
    result = plan("--device", "h200", "-tp", "1")

    assert result.returncode == 1
    assert "It does not fit" in result.stdout
    assert "--tensor-parallel-size 4" in result.stdout


def test_a_model_directory_is_counted_from_its_configuration():
    result = plan("--model", str(TINY_A), "-tp", "1", "--json")

    answer = json.loads(result.stdout)
    assert result.returncode == 0
    assert answer["question"]["setup"]["model"]["sequence_len"] == 256
    released = sum(path.stat().st_size for path in (TINY_A / "ckpt-0").iterdir())
    assert 0.8 * released < answer["payload_bytes"] < released


def test_the_files_of_a_directory_say_the_form_of_the_weights(tmp_path: Path):
    model = write_released(tmp_path / "released")
    converted(model, tmp_path / "int4", "int4", group=64)
    converted(model, tmp_path / "bfloat16", "bfloat16")

    found = [json.loads(plan("--model", str(tmp_path / form), "--tp", "1", "--json").stdout) for form in ("released", "bfloat16", "int4")]

    setups = [answer["question"]["setup"] for answer in found]
    assert [setup["weights"] for setup in setups] == ["int8", "bfloat16", "int4"]
    assert setups[2]["int4_group"] == 64
    told = json.loads(plan("--model", str(tmp_path / "int4"), "--tp", "1", "--weights", "int8", "--json").stdout)
    assert told["question"]["setup"]["weights"] == "int8"


def test_a_directory_with_a_configuration_alone_is_counted_as_released(tmp_path: Path):
    shutil.copy(TINY_A / "config.json", tmp_path)

    assert json.loads(plan("--model", str(tmp_path), "--tp", "1", "--json").stdout)["question"]["setup"]["weights"] == "int8"


def test_memory_of_another_size_is_taken_for_the_devices_own():
    question = json.loads(plan("--device-memory", "48GiB", "--json").stdout)["question"]

    assert question["device"]["memory_bytes"] == 48 << 30


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-tp", "3"], "num_kv_heads 8"),
        (["--tp", "3"], "num_kv_heads 8"),
        (["--dp", "2", "--tp", "3"], "num_kv_heads 8"),
        (["--model", str(TINY_A), "--tp", "1", "--weights", "int4"], "int4 groups of 128 do not divide"),
        (["--weights", "int5"], "--weights: expected one of float32, bfloat16, int8, int4"),
        (["--kv-cache-dtype", "int4"], "--kv-cache-dtype: expected one of"),
        (["--device", "abacus"], "none of a100-80, h100-80"),
        (["--device-memory", "much"], "--device-memory: expected a size like 48GiB"),
        (["--model", "/does/not/exist"], "neither a directory nor one of grok-1, grok-1-tiny"),
        (["--max-model-len", "8193"], "made for 8,192 tokens"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_status_2(arguments: list[str], complaint: str):
    result = plan(*arguments)

    assert result.returncode == 2
    assert result.stdout == ""
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_flags_of_parallelism_mean_what_they_mean_to_serve():
    result = plan("-tp", "16", "--data-parallel-size", "2", "--enable-expert-parallel", "--kv-cache-dtype", "fp8", "--json")

    answer = json.loads(result.stdout)
    setup = answer["question"]["setup"]
    assert setup["mesh"] == {"data": 2, "expert": 8, "tensor": 2}
    assert setup["kv"] == "fp8"
    assert answer["kv_bytes_per_token"] == 64 * 2 * (128 + 4)
    assert answer["cache_tokens"] == 2 * 16 * answer["cache_blocks"]


def test_serving_what_does_not_fit_is_refused_with_the_plan_before_anything_is_loaded():
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        str(TINY_A),
        "--skip-tokenizer-init",
        "--port",
        "0",
        "--kv-cache-memory-bytes",
        "1PB",
    ]

    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "100"}, check=False)

    assert result.returncode == 2
    first, *table = result.stderr.splitlines()
    assert first.startswith("error: it does not fit: the KV cache takes 1,000,000.0")
    assert "load" not in result.stdout
    assert any(line.startswith("left for the KV cache") for line in table)
    assert any(line.startswith("a smaller cache (--kv-cache-memory-bytes ") for line in table)


def test_a_compiled_plan_lists_two_all_reduces_per_layer():
    result = plan("--model", str(TINY_A), "-tp", "2", "--max-num-batched-tokens", "16", "--compile")

    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["all-reduce,", "attention", "1"] in [row[:3] for row in rows]
    assert ["all-reduce,", "moe", "1"] in [row[:3] for row in rows]
    assert [row[-4:-2] for row in rows if row[:2] == ["all-gather,", "sample"]] == [["sample", "1"]]
    assert "A greedy step of 16 tokens" in result.stdout
