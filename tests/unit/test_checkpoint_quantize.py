"""Quantising and writing trained weights, and the by-hand script around it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.quantize import quantize
from engine.checkpoint.released import specs_in_file_order
from engine.config import read_model_config
from engine.errors import CheckpointError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny-a"


def real(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    repeats = weight.shape[-2] // scales.shape[-2]
    return weight.astype(np.float64) * np.repeat(scales.astype(np.float64), repeats, axis=-2)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_every_value_is_within_half_a_stored_scale(groups: int) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 16, 40), np.float32) * np.logspace(-6, 3, 40, dtype=np.float32)

    integers, scales = quantize(weight, groups)

    assert integers.dtype == np.int8
    assert integers.shape == weight.shape
    assert scales.dtype == ml_dtypes.bfloat16
    assert scales.shape == (3, groups, 40)
    steps = np.repeat(scales.astype(np.float64), 16 // groups, axis=-2)
    assert np.all(np.abs(real(integers, scales) - weight) <= steps * 0.5001)
    assert integers.min() >= -127


def test_quantising_what_was_quantised_changes_nothing() -> None:
    first = quantize(np.random.default_rng(1).standard_normal((32, 8), np.float32), 4)

    again = quantize(real(*first).astype(np.float32), 4)

    np.testing.assert_array_equal(again[1], first[1])
    np.testing.assert_array_equal(again[0], first[0])


def test_a_column_of_zeros_stays_zero_with_a_finite_scale() -> None:
    weight = np.zeros((4, 2), np.float32)
    weight[:, 1] = 3

    integers, scales = quantize(weight, 2)

    np.testing.assert_array_equal(real(integers, scales)[:, 0], 0)
    assert np.isfinite(scales.astype(np.float32)).all()


def test_weights_that_cannot_be_quantised_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        quantize(np.array([[np.nan]], np.float32), 1)
    with pytest.raises(CheckpointError, match="3 scale groups do not divide 4 rows"):
        quantize(np.ones((4, 2), np.float32), 3)


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "scripts" / "write_checkpoint.py", *map(str, arguments)], capture_output=True, text=True)


def test_the_script_writes_a_random_checkpoint_that_opens(tmp_path: Path) -> None:
    done = run_script("--config", TINY / "config.json", "--out", tmp_path / "model", "--seed", "3")

    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(tmp_path / "model", read_model_config(tmp_path / "model"))
    assert checkpoint.row_parallel_scale_groups == 2
    again = run_script("--config", TINY / "config.json", "--out", tmp_path / "model")
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_the_script_exports_trained_weights(tmp_path: Path) -> None:
    config = read_model_config(TINY)
    random = np.random.default_rng(0)
    trained: dict[str, Any] = {spec.name: random.standard_normal(spec.shape, np.float32) for spec in specs_in_file_order(config)}
    np.savez(tmp_path / "weights.npz", **trained)

    done = run_script("--config", TINY / "config.json", "--out", tmp_path / "model", "--from-npz", tmp_path / "weights.npz")

    assert done.returncode == 0, done.stderr
    for name, tensor in open_checkpoint(tmp_path / "model", config).tensors.items():
        if tensor.scales is None:
            np.testing.assert_array_equal(tensor.weight[...], trained[name])
        else:
            np.testing.assert_allclose(real(tensor.weight, tensor.scales), trained[name], atol=0.5001 * tensor.scales.astype(float).max())


@pytest.mark.parametrize(("change", "match"), [("drop", "is missing"), ("add", "is not a tensor"), ("reshape", "expected float32")])
def test_the_script_refuses_weights_of_another_configuration(tmp_path: Path, change: str, match: str) -> None:
    trained: dict[str, Any] = {spec.name: np.zeros(spec.shape, np.float32) for spec in specs_in_file_order(read_model_config(TINY))}
    if change == "drop":
        del trained["language_model/rms_norm"]
    elif change == "add":
        trained["other"] = np.zeros(1, np.float32)
    else:
        trained["language_model/rms_norm"] = np.zeros(3, np.float32)
    np.savez(tmp_path / "weights.npz", **trained)

    done = run_script("--config", TINY / "config.json", "--out", tmp_path / "model", "--from-npz", tmp_path / "weights.npz")

    assert done.returncode == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_refuses_a_configuration_that_is_none(tmp_path: Path) -> None:
    bad = tmp_path / "config.json"
    bad.write_text(json.dumps({"vocab_size": 3}))

    done = run_script("--config", bad, "--out", tmp_path / "model")

    assert done.returncode == 2
    assert "missing" in done.stderr
