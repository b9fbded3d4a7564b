"""`grok-server convert`: what the operator sees, and that a server's engine loads the result."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoints import converted, edit_json, write_released

COMMAND = (sys.executable, "-m", "server")


def grok_server(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"COLUMNS": "200"}
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=env)


def test_a_checkpoint_is_converted_compared_and_inspected(tmp_path: Path):
    released = write_released(tmp_path / "released")

    done = grok_server("convert", released, tmp_path / "int4", "--weights", "int4", "--group", "64")
    compared = grok_server("convert", "--verify", released, tmp_path / "int4")
    inspected = grok_server("inspect", tmp_path / "int4", "--verify")

    assert (done.returncode, done.stderr) == (0, "")
    assert "26 tensors as int4" in done.stdout
    assert "no tokenizer.model lay beside the source" in done.stdout
    assert (compared.returncode, compared.stderr) == (0, "")
    assert "26 tensors, 11 equal to the bit, RMS error at most" in compared.stdout
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert "256 x 128" in inspected.stdout
    assert "num digests 2" in inspected.stdout


def test_the_logit_error_of_a_prompt_is_shown_behind_a_conversion_and_behind_a_comparison(tmp_path: Path):
    released = write_released(tmp_path / "released")
    prompt = ("--compare-token-ids", "1, 5, 9, 31")

    done = grok_server("convert", released, tmp_path / "int4", "--weights", "int4", "--group", "64", *prompt)
    compared = grok_server("convert", "--verify", released, tmp_path / "int4", *prompt)

    assert (done.returncode, done.stderr, compared.returncode, compared.stderr) == (0, "", 0, "")
    assert "26 tensors as int4" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "1 5 9 31" in line)
    assert row.split()[4] == "4"
    assert row in compared.stdout.splitlines()


def test_what_cannot_be_converted_is_one_line_and_status_2(tmp_path: Path):
    released = write_released(tmp_path / "released")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()

    for arguments, complaint in (
        ([released, tmp_path / "out"], "--weights must be one of int8, bfloat16, int4"),
        ([released, tmp_path / "out", "--weights", "int3"], "--weights must be one of int8, bfloat16, int4, found int3"),
        ([released, tmp_path / "out", "--weights", "int4", "--group", "32"], "--group must be 64 or 128, found 32"),
        ([released, tmp_path / "out", "--weights", "int8", "--verify"], "--verify compares what is there"),
        ([released, tmp_path / "out", "--weights", "int8", "--compare-token-ids", "1,x"], "must be like 1,523,42, found '1,x'"),
        ([released, tmp_path / "out", "--weights", "int8", "--compare-prompt", "-x"], "there is no tokenizer.model for --compare-prompt"),
        ([released, tmp_path / "full", "--weights", "int8"], "is not empty"),
        ([tmp_path / "nowhere", tmp_path / "out", "--weights", "int8"], "found nothing"),
        (["--verify", released, tmp_path / "full"], "holds no checkpoint"),
    ):
        result = grok_server("convert", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert complaint in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_server_refuses_an_unfinished_conversion(tmp_path: Path):
    grok_server("convert", write_released(tmp_path / "released"), tmp_path / "int8", "--weights", "int8")
    (tmp_path / "int8" / "manifest.json").unlink()

    result = grok_server("serve", tmp_path / "int8", "--skip-tokenizer-init", "--port", "0")

    assert result.returncode == 2
    assert "holds no manifest.json: a conversion was interrupted; run it again with the same arguments" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `int8` and as `int4`, beside its release."""
    folder = tmp_path_factory.mktemp("conversions")
    write_released(folder / "released")
    converted(folder / "released", folder / "int8", "int8")
    converted(folder / "released", folder / "int4", "int4")
    return folder


def lose_a_shard(model: Path) -> None:
    (model / "weights-00001.safetensors").unlink()


def mix_two_conversions(model: Path) -> None:
    shutil.copy(model.with_name("int4") / "weights-00001.safetensors", model)


def mix_two_formats(model: Path) -> None:
    shutil.copytree(model.with_name("released") / "ckpt-0", model / "ckpt-0")


def cut_the_manifest_off(model: Path) -> None:
    content = (model / "manifest.json").read_bytes()
    (model / "manifest.json").write_bytes(content[:500])


def name_a_file_elsewhere(model: Path) -> None:
    edit_json(model / "manifest.json", lambda raw: raw["files"][-1].update(file="../int8/weights-00001.safetensors"))


def claim_another_size(model: Path) -> None:
    edit_json(model / "manifest.json", lambda raw: raw["files"][-1].update(size=5))


def claim_other_shapes(model: Path) -> None:
    edit_json(model / "config.json", lambda raw: raw.update(num_layers=3))


@pytest.mark.parametrize(
    ("damage", "arguments", "complaint"),
    [
        (lose_a_shard, [], "weights-00001.safetensors: is missing, manifest.json names it; copy all files of one conversion here again"),
        (mix_two_conversions, [], "two checkpoints were mixed; copy all files of one conversion here again, or convert again"),
        (mix_two_formats, [], "holds files of two checkpoints"),
        (cut_the_manifest_off, [], "manifest.json: is not valid JSON"),
        (name_a_file_elsewhere, [], "names '../int8/weights-00001.safetensors', which is no file of a conversion"),
        (claim_another_size, [], "expected 5 bytes by its manifest, found"),
        (claim_other_shapes, [], "was written for num_layers 2, config.json has 3; put the converted config.json back"),
        (lambda _: None, ["--tensor-parallel-size", "3"], "tensor parallel size 3 neither divides num_kv_heads 4 nor is a multiple of it"),
    ],
)
def test_a_server_refuses_what_it_cannot_trust_before_it_loads_anything(
    conversions: Path, damage: Callable[[Path], object], arguments: list[str], complaint: str
):
    model = conversions / "damaged"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(conversions / "int8", model)
    damage(model)

    result = grok_server("serve", model, "--skip-tokenizer-init", "--port", "0", *arguments)

    assert result.returncode == 2, result.stderr
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Ready" not in result.stdout
    assert "load:" not in result.stdout
