"""Conversions: what they write, that an interrupted one is taken up, and that nothing half done ever loads."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from full_disk import NO_DISK
from small_checkpoints import CONFIG, converted, edit_json, opened, write_released

from engine.checkpoint.compare import Comparison, compare
from engine.checkpoint.convert import ConvertProgress, Settings, TargetForm, convert
from engine.checkpoint.dequantize import real_slice
from engine.checkpoint.quantize import quantize, quantize_int4
from engine.checkpoint.verify import verify
from engine.errors import CheckpointError, EngineError

DOWN = "transformer/decoder_layer_1/moe/linear_1"
EMBEDDING = "language_model/in_out_embed"
SMALL_FILES = 60_000  # bytes


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return write_released(tmp_path / "released")


def real(model_dir: Path, name: str) -> np.ndarray:
    tensor = opened(model_dir).tensors[name]
    return real_slice(tensor, (slice(None),) * len(tensor.spec.shape), np.float32)


def compared(source: Path, target: Path) -> dict[str, Comparison]:
    found = compare(source, target, report=lambda _: None, report_progress=lambda _: None)
    return {comparison.name: comparison for comparison in found}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class Stop(Exception):
    """Stands for whatever ends a conversion from outside."""


def interrupted(source: Path, target: Path, *, after: int, weights: TargetForm = "int8") -> None:
    """Begin to convert and stop once `after` tensors are done."""

    def report(progress: ConvertProgress) -> None:
        if progress.tensors_done > after:
            raise Stop

    with pytest.raises(Stop):
        convert(source, target, Settings(weights=weights, group=64), report=report, max_file_bytes=SMALL_FILES)


# What is written


@pytest.mark.parametrize(("weights", "matrix", "embedding"), [("int8", "int8", "float32"), ("bfloat16",) * 3, ("int4", "int4", "bfloat16")])
def test_matrices_have_the_form_asked_for_and_norms_and_router_stay_float32(
    released: Path, tmp_path: Path, weights: TargetForm, matrix: str, embedding: str
) -> None:
    converted(released, tmp_path / "out", weights)

    tensors = opened(tmp_path / "out").tensors
    assert {tensor.form for tensor in tensors.values() if tensor.spec.is_quantized} == {matrix}
    assert tensors[EMBEDDING].form == embedding
    assert {tensor.form for name, tensor in tensors.items() if name.endswith(("router", "rms_norm_1"))} == {"float32"}


def test_bfloat16_is_the_real_value_rounded_once(released: Path, tmp_path: Path) -> None:
    converted(released, tmp_path / "out", "bfloat16")

    found = opened(tmp_path / "out").tensors[DOWN].weight[...]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, real(released, DOWN).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("group", [64, 128])
def test_int4_takes_at_most_54_hundredths_of_int8(released: Path, tmp_path: Path, group: int) -> None:
    converted(released, tmp_path / "int8")
    converted(released, tmp_path / "int4", "int4", group=group)

    before, after = opened(tmp_path / "int8"), opened(tmp_path / "int4")
    for name, tensor in after.tensors.items():
        if tensor.spec.is_quantized:
            # 4 bits and a scale of 16 bits per group, against 8 bits and a scale for half or all of a short column
            assert tensor.num_bytes == tensor.spec.num_params * (0.5 + 2 / group)
            assert tensor.num_bytes <= 0.54 * before.tensors[name].spec.num_params


def test_int4_values_are_within_half_a_step_of_the_source_or_clipped() -> None:
    weight = np.random.default_rng(3).standard_normal((2, 128, 300)).astype(np.float32) * np.logspace(-6, 3, 300, dtype=np.float32)

    packed, scales = quantize_int4(weight, 64)

    assert (packed.shape, packed.dtype, scales.shape, scales.dtype) == ((2, 64, 300), np.uint8, (2, 2, 300), ml_dtypes.bfloat16)
    integers = np.stack([packed & 15, packed >> 4], axis=-2).reshape(weight.shape).astype(np.float32) - 8
    step = np.repeat(scales.astype(np.float32), 64, axis=-2)
    error = np.abs(integers * step - weight)
    is_clipped = (integers == -8) | (integers == 7)
    assert np.all(error[~is_clipped] <= 0.5001 * np.abs(step)[~is_clipped])
    assert np.all(error <= 2 * np.abs(step))
    assert np.sqrt(np.square(error / step).mean()) < 0.31


def test_int4_of_zeros_and_of_values_beyond_numbers() -> None:
    packed, scales = quantize_int4(np.zeros((64, 2), np.float32), 64)

    np.testing.assert_array_equal(packed, 0x88)
    assert np.isfinite(scales.astype(np.float32)).all()
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_int4(np.full((64, 2), np.inf, np.float32), 64)
    with pytest.raises(CheckpointError, match="int4 groups of 64 do not divide 96 rows"):
        quantize_int4(np.zeros((96, 2), np.float32), 64)


def test_int8_of_a_source_that_is_not_int8_is_quantised_as_checkpoints_are_written(released: Path, tmp_path: Path) -> None:
    converted(released, tmp_path / "bfloat16", "bfloat16")
    converted(tmp_path / "bfloat16", tmp_path / "int8")

    checkpoint = opened(tmp_path / "int8")
    weight, scales = quantize(real(tmp_path / "bfloat16", DOWN), 2)
    assert checkpoint.row_parallel_scale_groups == 2
    np.testing.assert_array_equal(checkpoint.tensors[DOWN].weight[...], weight)
    np.testing.assert_array_equal(checkpoint.tensors[DOWN].scales[...], scales)  # pyright: ignore[reportOptionalSubscript]


def test_a_converted_checkpoint_converts_again(released: Path, tmp_path: Path) -> None:
    converted(released, tmp_path / "int8")
    converted(released, tmp_path / "int4", "int4")
    converted(tmp_path / "int8", tmp_path / "int4-of-int8", "int4")
    converted(tmp_path / "int4", tmp_path / "int4-again", "int4")

    for again in ("int4-of-int8", "int4-again"):
        assert all(
            comparison.is_exact and not comparison.max_error for comparison in compared(tmp_path / "int4", tmp_path / again).values()
        )


def test_files_are_of_bounded_size_and_a_larger_tensor_has_its_own(released: Path, tmp_path: Path) -> None:
    converted(released, tmp_path / "out", max_file_bytes=SMALL_FILES)

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    files = [file for file in manifest["files"] if "tensors" in file]
    for file in files:
        assert file["size"] <= SMALL_FILES + 4096 or len(file["tensors"]) == 1
    assert sum(len(file["tensors"]) for file in files) == 26


def test_the_tokenizer_comes_along_from_beside_the_source(released: Path, tmp_path: Path) -> None:
    assert not converted(released, tmp_path / "without").has_tokenizer
    (released / "tokenizer.model").write_bytes(b"pieces")

    assert converted(released / "ckpt-0", tmp_path / "with").has_tokenizer
    assert (tmp_path / "with" / "tokenizer.model").read_bytes() == b"pieces"
    assert opened(tmp_path / "with").row_parallel_scale_groups == 2


def test_the_number_of_scale_groups_is_written_down_where_only_the_files_know_it(released: Path, tmp_path: Path) -> None:
    edit_json(released / "config.json", lambda raw: raw | {"row_parallel_scale_groups": None})

    converted(released, tmp_path / "out")

    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["row_parallel_scale_groups"] == 2


def test_progress_counts_every_byte_and_every_tensor_once(released: Path, tmp_path: Path) -> None:
    seen: list[ConvertProgress] = []

    totals = convert(released, tmp_path / "out", Settings(weights="int4", group=64), report=seen.append)

    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1].done == seen[-1].total == totals.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1].tensors_done == seen[-1].tensors_total == 26


def test_the_same_conversion_gives_the_same_files(released: Path, tmp_path: Path) -> None:
    converted(released, tmp_path / "one", "int4")
    converted(released, tmp_path / "two", "int4")

    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


# Interruption


@pytest.mark.parametrize("after", [0, 5, 20, 25])
def test_an_interrupted_conversion_does_not_load_and_is_taken_up(released: Path, tmp_path: Path, after: int) -> None:
    target = tmp_path / "out"
    converted(released, tmp_path / "whole", max_file_bytes=SMALL_FILES)

    interrupted(released, target, after=after)
    with pytest.raises(CheckpointError, match="a conversion was interrupted; run it again with the same arguments"):
        opened(target)
    assert not list(target.glob("*.part"))
    finished = {path.name: path.stat().st_ino for path in target.glob("weights-*")}
    totals = converted(released, target, max_file_bytes=SMALL_FILES)

    assert totals.files_kept == len(finished)
    assert finished.items() <= {path.name: path.stat().st_ino for path in target.iterdir()}.items()
    assert files_of(target) == files_of(tmp_path / "whole")


def test_a_killed_conversion_is_taken_up_whatever_it_left(released: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    converted(released, tmp_path / "whole", max_file_bytes=SMALL_FILES)
    interrupted(released, target, after=12)
    finished = sorted(target.glob("weights-*"))
    finished[0].write_bytes(finished[0].read_bytes()[:-1])  # cut off
    content = bytearray(finished[1].read_bytes())
    content[-1] ^= 1
    finished[1].write_bytes(content)  # another digest
    finished[2].unlink()  # noted, but never given its name
    (target / "weights-00008.safetensors.part").write_bytes(b"half")
    (target / "weights-00009.safetensors").write_bytes(b"never noted")
    (target / "manifest.json.part").write_bytes(b"half")

    totals = converted(released, target, max_file_bytes=SMALL_FILES)

    assert totals.files_kept == len(finished) - 3
    assert files_of(target) == files_of(tmp_path / "whole")


def test_a_conversion_that_ended_before_it_forgot_its_journal_is_whole(released: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupted(released, target, after=3)
    journal = (target / "conversion.json").read_bytes()
    converted(released, target, max_file_bytes=SMALL_FILES)
    (target / "conversion.json").write_bytes(journal)
    assert len(opened(target).tensors) == 26

    converted(released, target, max_file_bytes=SMALL_FILES)

    assert not (target / "conversion.json").exists()
    verify(opened(target), report=lambda _: None)


@pytest.mark.parametrize("change", ["weights", "group", "source"])
def test_an_unfinished_conversion_of_something_else_is_not_touched(released: Path, tmp_path: Path, change: str) -> None:
    target = tmp_path / "out"
    interrupted(released, target, after=5, weights="int4")
    before = files_of(target)
    source = write_released(tmp_path / "other", seed=2) if change == "source" else released

    with pytest.raises(CheckpointError, match="holds an unfinished conversion of another source or with other settings"):
        converted(
            source,
            target,
            "bfloat16" if change == "weights" else "int4",
            group=128 if change == "group" else 64,
            max_file_bytes=SMALL_FILES,
        )
    assert files_of(target) == before


def test_a_directory_with_anything_else_in_it_is_not_touched(released: Path, tmp_path: Path) -> None:
    def refuse(target: Path, match: str) -> None:
        before = files_of(target)
        with pytest.raises(CheckpointError, match=match):
            converted(released, target, max_file_bytes=SMALL_FILES)
        assert files_of(target) == before

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    refuse(tmp_path / "full", "is not empty and holds no unfinished conversion")
    refuse(released / "ckpt-0", "is not empty")
    interrupted(released, tmp_path / "out", after=5)
    (tmp_path / "out" / "thesis.tex").touch()
    refuse(tmp_path / "out", "thesis.tex: is no file of a conversion")
    (tmp_path / "out" / "thesis.tex").unlink()
    (tmp_path / "out" / "conversion.json").write_bytes(b"{")
    refuse(tmp_path / "out", "conversion.json: is damaged")
    converted(released, tmp_path / "done")
    refuse(tmp_path / "done", "holds a finished checkpoint")


def test_a_target_that_is_a_file_is_one_line(released: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CheckpointError, match="file: cannot be made"):
        converted(released, tmp_path / "file")


def test_two_conversions_do_not_write_into_one_directory(released: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def report(_: ConvertProgress) -> None:
        with pytest.raises(CheckpointError, match="another conversion is writing there"):
            converted(released, target)

    convert(released, target, Settings(weights="int8"), report=report)
    assert len(opened(target).tensors) == 26


# A full disk


LIMITED = """
import resource, runpy, sys
most_bytes = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
runpy.run_module("engine.checkpoint", run_name="__main__")
"""


def run_convert(source: Path, target: Path, *, most_bytes: int) -> "subprocess.CompletedProcess[str]":
    """The command, in a process whose files may not grow beyond `most_bytes`."""
    command = [sys.executable, "-c", LIMITED, str(most_bytes), "convert", str(source), str(target), "--weights", "int8"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("after", [0, 5, 26])
def test_a_disk_that_fills_up_ends_a_conversion_and_the_next_run_ends_it_as_if_nothing_had_been(released: Path, tmp_path: Path, after: int):
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = shutil.which("unshare") or pytest.skip("there is no unshare")
    program = Path(__file__).parents[1] / "support" / "full_disk.py"
    command = [unshare, "--user", "--map-root-user", "--mount", sys.executable, program, released, disk, str(after)]

    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(program.parents[2])})

    if done.returncode == NO_DISK or done.stderr.startswith("unshare:"):
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (
        f"cannot be written: {os.strerror(errno.ENOSPC)}; the finished files are kept: make room and run the same again" in found["first"]
    )
    assert "manifest.json" not in found["left"]
    assert not [name for name in found["left"] if name.endswith(".part")]
    assert "a conversion was interrupted" in found["loads"]
    assert found["kept"] == sum(name.startswith("weights-") for name in found["left"])
    resumed, undisturbed = found["digests"]
    assert resumed == undisturbed


def test_a_write_that_fails_is_one_line_and_leaves_nothing_that_loads(released: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"

    done = run_convert(released, target, most_bytes=100_000)

    assert done.returncode == 2
    assert done.stderr == ""
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert f"weights-00001.safetensors: cannot be written: {os.strerror(errno.EFBIG)}; the finished files are kept" in error
    assert {path.name for path in target.iterdir()} == {"config.json", "conversion.json"}
    with pytest.raises(CheckpointError, match="a conversion was interrupted"):
        opened(target)
    converted(released, target, group=128)
    assert len(opened(target).tensors) == 26


def test_a_disk_with_too_little_room_is_refused_before_anything_large_is_written(released: Path, tmp_path: Path) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    convert_command = f"{sys.executable} -m engine.checkpoint convert {released} {target}/out --weights int8"
    command = f"mount -t tmpfs -o size=200k none {target} && exec {convert_command}"
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", target], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")

    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)

    assert done.returncode == 2
    assert "bytes are still to be written," in json.loads(done.stdout.splitlines()[-1])["error"]


# Comparison


def test_int8_is_compared_to_the_bit_and_the_rest_by_its_error(released: Path, tmp_path: Path) -> None:
    for weights in ("int8", "bfloat16", "int4"):
        converted(released, tmp_path / weights, weights)

    assert all(found.is_exact and found.max_error == found.rms_error == 0 for found in compared(released, tmp_path / "int8").values())
    bfloat16 = compared(released, tmp_path / "bfloat16")
    assert 0 < bfloat16[DOWN].rms_error < bfloat16[DOWN].max_error < 2**-8
    int4 = compared(released, tmp_path / "int4")
    assert not int4[DOWN].is_exact
    assert 0.05 < int4[DOWN].rms_error < 0.1
    assert int4["language_model/rms_norm"].is_exact


@pytest.mark.parametrize("weights", ["int8", "bfloat16", "int4"])
def test_values_that_rounding_does_not_explain_are_found(released: Path, tmp_path: Path, weights: TargetForm) -> None:
    converted(write_released(tmp_path / "other", seed=2), tmp_path / "out", weights)

    with pytest.raises(CheckpointError, match=r"differs from .* by more than rounding: language_model/in_out_embed by .* and 16 more"):
        compared(released, tmp_path / "out")


def test_a_single_wrong_bit_of_int8_is_found(released: Path, tmp_path: Path) -> None:
    converted(released, tmp_path / "out")
    tensor = opened(tmp_path / "out").tensors[DOWN]
    content = bytearray(tensor.path.read_bytes())
    content[tensor.regions[0].stored.offset + 7] ^= 1
    tensor.path.write_bytes(content)

    with pytest.raises(CheckpointError, match=f"by more than rounding: {DOWN} by"):
        compared(released, tmp_path / "out")


def test_another_model_is_not_compared(released: Path, tmp_path: Path) -> None:
    write_released(tmp_path / "other", config=replace(CONFIG, num_layers=1))

    with pytest.raises(CheckpointError, match=r"is of another model than .*decoder_layer_1/moe/linear of .* is not in it"):
        compared(released, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"is of another model than .*, which has no transformer/decoder_layer_1"):
        compared(tmp_path / "other", released)


# Sources that do not convert


def test_a_width_that_groups_do_not_divide_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_released(tmp_path / "released", config=replace(CONFIG, ffn_size=200, row_parallel_scale_groups=1))

    with pytest.raises(CheckpointError, match="moe/linear_1: int4 groups of 64 do not divide its 200 rows; use --weights int8"):
        converted(tmp_path / "released", tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused_by_the_name_of_their_tensor(released: Path, tmp_path: Path) -> None:
    tensor = opened(released).tensors[DOWN]
    content = bytearray(tensor.path.read_bytes())
    offset = tensor.regions[1].stored.offset
    content[offset : offset + 2] = b"\x80\x7f"  # infinity
    tensor.path.write_bytes(content)

    with pytest.raises(CheckpointError, match=f"{DOWN}: weights to quantise hold values that are not finite"):
        converted(released, tmp_path / "out", "int4")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_source_is_refused_before_anything_is_written(released: Path, tmp_path: Path, damage: str) -> None:
    path = released / "ckpt-0" / "tensor00007_000"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(EngineError, match=f"tensor00007_000: .*{damage}"):
        converted(released, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The command


def run(*arguments: str | Path) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run([sys.executable, "-m", "engine.checkpoint", *map(str, arguments)], capture_output=True, text=True)
    assert done.stderr == "" or "usage:" in done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_converts_and_compares_in_lines_of_json(released: Path, tmp_path: Path) -> None:
    status, lines = run("convert", released, tmp_path / "out", "--weights", "int4", "--group", "64")

    assert status == 0
    assert {next(iter(line)) for line in lines[:-1]} == {"progress"}
    assert lines[-1]["totals"]["tensors"] == lines[-2]["progress"]["tensors_done"] == 26

    status, lines = run("convert", "--verify", released, tmp_path / "out")
    assert status == 0
    assert lines[0]["comparison"]["name"] == EMBEDDING
    assert lines[-1]["totals"] == {"tensors": 26, "exact": 11, "max_rms_error": lines[-1]["totals"]["max_rms_error"]}


def test_the_command_asks_for_a_form_or_a_comparison(released: Path, tmp_path: Path) -> None:
    assert run("convert", released, tmp_path / "out")[0] == 2
    assert run("convert", released, tmp_path / "out", "--weights", "int8", "--verify")[0] == 2
    assert run("convert", released, tmp_path / "out", "--weights", "int4", "--group", "32")[0] == 2
    assert not (tmp_path / "out").exists()
