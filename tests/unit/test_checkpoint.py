"""A whole checkpoint directory: which file is which tensor, and that every way of being wrong is refused by name."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.checkpoint import __main__ as command
from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.released import find_released_dir, specs_in_file_order, tensor_file_name
from engine.checkpoint.released_format import read_index
from engine.checkpoint.released_writer import write_tensor
from engine.checkpoint.save import random_tensors, save_checkpoint
from engine.checkpoint.tensors import Checkpoint
from engine.checkpoint.verify import verify
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.types import Progress

TINY = Path(__file__).parents[1] / "data" / "tiny-a"
BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = ModelConfig(
    vocab_size=32,
    sequence_len=64,
    emb_size=8,
    key_size=4,
    num_q_heads=4,
    num_kv_heads=2,
    num_layers=2,
    num_experts=2,
    num_selected_experts=1,
    ffn_size=24,
    embedding_multiplier_scale=2.8,
    output_multiplier_scale=0.5,
    attn_output_multiplier=0.5,
    row_parallel_scale_groups=2,
)


def write_config(model_dir: Path, config: ModelConfig) -> None:
    (model_dir / "config.json").write_text(json.dumps({name: getattr(config, name) for name in config.__slots__}))


def make_model(model_dir: Path, config: ModelConfig = CONFIG) -> Path:
    save_checkpoint(model_dir, config, make_tensor=random_tensors(config, seed=1))
    write_config(model_dir, config)
    return model_dir


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def tensor_path(model_dir: Path, name: str) -> Path:
    return model_dir / "ckpt-0" / tensor_file_name([spec.name for spec in specs_in_file_order(CONFIG)].index(name))


def refuse(model_dir: Path, match: str, config: ModelConfig = CONFIG) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(model_dir, config)
    assert "\n" not in str(caught.value)


QUERY = "transformer/decoder_layer_0/multi_head_attention/query"
ATTENTION_OUT = "transformer/decoder_layer_0/multi_head_attention/linear"
EXPERTS_DOWN = "transformer/decoder_layer_0/moe/linear_1"
NORM = "transformer/decoder_layer_1/rms_norm_2"


# Which file is which tensor


def test_the_files_of_one_layer_are_in_the_order_of_the_release() -> None:
    assert [spec.name.removeprefix("transformer/decoder_layer_0/") for spec in specs_in_file_order(replace(CONFIG, num_layers=1))] == [
        "language_model/in_out_embed",
        "language_model/rms_norm",
        "moe/linear",
        "moe/linear_1",
        "moe/linear_v",
        "multi_head_attention/key",
        "multi_head_attention/linear",
        "multi_head_attention/query",
        "multi_head_attention/value",
        "rms_norm",
        "rms_norm_1",
        "rms_norm_2",
        "rms_norm_3",
        "router",
    ]


def test_twelve_layers_lie_on_disk_in_the_order_of_their_names_as_strings(tmp_path: Path) -> None:
    config = replace(CONFIG, num_layers=12)
    make_model(tmp_path, config)
    for position, layer in enumerate([0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]):
        write_tensor(tmp_path / "ckpt-0" / f"tensor{2 + 12 * position + 8:05d}_000", np.full(8, layer, np.float32))  # +8 is rms_norm_1

    checkpoint = open_checkpoint(tmp_path, config)

    assert [checkpoint.tensors[f"transformer/decoder_layer_{layer}/rms_norm_1"].weight[0] for layer in range(12)] == list(range(12))


def test_tiny_a_opens_with_the_names_of_its_manifest() -> None:
    checkpoint = open_checkpoint(TINY, ModelConfig.from_json(json.loads((TINY / "config.json").read_bytes())))

    entries = json.loads((TINY / "manifest.json").read_bytes())
    assert [(tensor.path.name, name) for name, tensor in checkpoint.tensors.items()] == [
        (entry["file"], entry["param"].rpartition("/")[0]) for entry in entries
    ]
    assert checkpoint.num_params == 1_115_712
    assert checkpoint.row_parallel_scale_groups == 2
    tensor = checkpoint.tensors[EXPERTS_DOWN]
    assert tensor.scales is not None
    assert tensor.num_bytes == 8 * 344 * 64 + 8 * 2 * 64 * 2


def test_what_was_written_is_what_is_opened(model_dir: Path) -> None:
    draw = random_tensors(CONFIG, seed=1)

    for tensor in open_checkpoint(model_dir, CONFIG).tensors.values():
        weight, scales = draw(tensor.spec)
        np.testing.assert_array_equal(tensor.weight[...], weight)
        assert (tensor.scales is None) == (scales is None)
        if scales is not None:
            np.testing.assert_array_equal(tensor.scales[...], scales)


def test_an_open_checkpoint_holds_no_file_descriptors(model_dir: Path) -> None:
    before = len(os.listdir("/dev/fd"))

    checkpoint = open_checkpoint(model_dir, CONFIG)
    for tensor in checkpoint.tensors.values():
        assert tensor.weight[...].size

    assert len(os.listdir("/dev/fd")) == before


# Where the files are


@pytest.mark.parametrize("name", ["ckpt-0", "ckpt"])
def test_the_directory_around_the_tensors_or_their_own_is_accepted(model_dir: Path, name: str) -> None:
    (model_dir / "ckpt-0").rename(model_dir / name)

    assert find_released_dir(model_dir) == model_dir / name
    assert find_released_dir(model_dir / name) == model_dir / name
    assert len(open_checkpoint(model_dir / name, CONFIG).tensors) == 26


def test_other_files_beside_the_tensors_do_not_matter(model_dir: Path) -> None:
    for name in ("README.md", ".gitattributes", "tokenizer.model", "config.json", "manifest.json"):
        (model_dir / "ckpt-0" / name).write_text("[]")

    assert len(open_checkpoint(model_dir, CONFIG).tensors) == 26


def test_a_directory_without_tensors_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no checkpoint")
    refuse(tmp_path / "absent", "found nothing")
    (tmp_path / "ckpt-0").mkdir()
    refuse(tmp_path, "holds no checkpoint")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "found a file")


def test_two_checkpoints_in_one_directory_are_refused(model_dir: Path) -> None:
    (model_dir / "ckpt").symlink_to("ckpt-0")

    refuse(model_dir, "tensor files in both .*ckpt-0 and .*ckpt;")


def test_a_stray_file_beside_the_folder_of_the_tensors_does_not_matter_and_in_it_does(model_dir: Path) -> None:
    (model_dir / "tensor_index.txt").touch()

    assert len(open_checkpoint(model_dir, CONFIG).tensors) == 26
    (model_dir / "ckpt-0" / "tensor_index.txt").touch()
    refuse(model_dir, "ckpt-0/tensor_index.txt: is a surplus file")


# Wrong files


def test_a_missing_file_is_named(model_dir: Path) -> None:
    (model_dir / "ckpt-0" / "tensor00005_000").unlink()

    refuse(model_dir, "tensor00005_000: is missing; a model of 2 layers has 26 files .*, found 25")


@pytest.mark.parametrize(
    "name", ["tensor00026_000", "tensor00003_001", "tensor00003_000.aria2", "tensor3", "tensor000003_000", "tensor-copy"]
)
def test_a_surplus_tensor_file_is_named(model_dir: Path, name: str) -> None:
    (model_dir / "ckpt-0" / name).touch()

    refuse(model_dir, f"{name}: is a surplus file")


def test_a_file_of_another_shard_does_not_stand_in_for_a_missing_one(model_dir: Path) -> None:
    (model_dir / "ckpt-0" / "tensor00003_000").rename(model_dir / "ckpt-0" / "tensor00003_001")

    refuse(model_dir, "tensor00003_000: is missing")


@pytest.mark.parametrize("num_layers", [1, 3, 10**9])
def test_a_configuration_with_other_layers_is_refused_before_anything_is_built(model_dir: Path, num_layers: int) -> None:
    refuse(model_dir, "surplus|missing", replace(CONFIG, num_layers=num_layers))


@pytest.mark.parametrize(
    ("name", "weight", "scales", "match"),
    [
        (NORM, np.ones(9, np.float32), None, r"expected .*rms_norm_2 as float32 \[8\], found float32 \[9\]"),
        (NORM, np.ones((8, 1), np.float32), None, r"float32 \[8\], found float32 \[8, 1\]"),
        (NORM, np.ones((1, 8), np.int8), np.ones((1, 8), BF16), r"float32 \[8\], found int8 \[1, 8\] with scales bfloat16"),
        (QUERY, np.ones((8, 16), np.float32), None, r"int8 \[8, 16\] with bfloat16 scales, found float32 \[8, 16\]$"),
        (QUERY, np.ones((16, 8), np.int8), np.ones((1, 8), BF16), r"int8 \[8, 16\] .*, found int8 \[16, 8\]"),
        (QUERY, np.ones((8, 16), np.int8), np.ones((2, 16), BF16), r"groups being 1, found scales \[2, 16\]"),
        (QUERY, np.ones((8, 16), np.int8), np.ones((1, 8), BF16), r"scales \[groups, 16\], .* found scales \[1, 8\]"),
        (QUERY, np.ones((8, 16), np.int8), np.ones(16, BF16), r"found scales \[16\]"),
        (ATTENTION_OUT, np.ones((16, 8), np.int8), np.ones((1, 8), BF16), r"groups being 2, found scales \[1, 8\]"),
        (EXPERTS_DOWN, np.ones((2, 24, 8), np.int8), np.ones((1, 2, 8), BF16), r"scales \[2, groups, 8\], .* found scales \[1, 2, 8\]"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(model_dir: Path, name: str, weight: np.ndarray, scales: np.ndarray | None, match: str) -> None:
    path = tensor_path(model_dir, name)
    write_tensor(path, weight, scales=scales)

    refuse(model_dir, f"{path.name}: .*{match}")


def test_swapped_files_are_refused(model_dir: Path) -> None:
    first, second = tensor_path(model_dir, QUERY), tensor_path(model_dir, ATTENTION_OUT)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)

    refuse(model_dir, f"{second.name}: expected {ATTENTION_OUT}")


def test_damaged_and_hostile_files_are_refused_by_name(model_dir: Path) -> None:
    path = tensor_path(model_dir, NORM)
    content = path.read_bytes()

    for damaged, match in {
        content[:-1]: "truncated",
        content + b"\0": "longer than its content",
        content.replace(b"ndarray", b"nbarray"): "names 'numpy.nbarray'",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.": "names 'os.system'.*nothing was executed",
        b"": "is empty",
    }.items():
        path.write_bytes(damaged)
        refuse(model_dir, f"{path.name}: .*{match}")


def test_something_else_under_the_name_of_a_tensor_is_refused(model_dir: Path) -> None:
    path = tensor_path(model_dir, NORM)

    path.unlink()
    path.mkdir()
    refuse(model_dir, f"{path.name}: .*found a directory")
    path.rmdir()
    os.mkfifo(path)
    refuse(model_dir, f"{path.name}: .*found a named pipe")
    path.unlink()
    path.symlink_to("gone")
    refuse(model_dir, f"{path.name}: .*link to gone")


def test_a_directory_of_links_into_a_hub_cache_opens(model_dir: Path) -> None:
    blobs = model_dir / "blobs"
    (model_dir / "ckpt-0").rename(blobs)
    (model_dir / "ckpt-0").mkdir()
    for blob in blobs.iterdir():
        (model_dir / "ckpt-0" / blob.name).symlink_to(f"../blobs/{blob.name}")

    assert len(open_checkpoint(model_dir, CONFIG).tensors) == 26


# Scale groups and a missing configuration


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_scale_groups_come_from_the_files_where_the_configuration_has_none(tmp_path: Path, groups: int) -> None:
    make_model(tmp_path, replace(CONFIG, row_parallel_scale_groups=groups))

    checkpoint = open_checkpoint(tmp_path, replace(CONFIG, row_parallel_scale_groups=None))

    assert checkpoint.row_parallel_scale_groups == groups


def test_scale_groups_must_agree_over_the_checkpoint_and_divide_the_rows(model_dir: Path) -> None:
    anything = replace(CONFIG, row_parallel_scale_groups=None)

    write_tensor(tensor_path(model_dir, ATTENTION_OUT), np.ones((16, 8), np.int8), scales=np.ones((4, 8), BF16))
    refuse(model_dir, "groups being 2, found scales .4, 8", anything)

    write_tensor(tensor_path(model_dir, EXPERTS_DOWN), np.ones((2, 24, 8), np.int8), scales=np.ones((2, 5, 8), BF16))
    refuse(model_dir, "groups being a divisor of 24, found scales .2, 5, 8", anything)


def test_files_of_another_model_without_a_configuration_say_that_it_is_missing(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()

    refuse(model_dir, "found 26; config.json is missing.*with vocab_size, .*attn_output_multiplier", ModelConfig.preset("grok-1"))


# Verifying


def verify_quietly(checkpoint: Checkpoint) -> Any:
    return verify(checkpoint, report=lambda _: None)


def test_verifying_reads_every_byte_and_reports_how_far_it_is(model_dir: Path) -> None:
    reports: list[Progress] = []

    totals = verify(open_checkpoint(model_dir, CONFIG), report=reports.append)

    num_bytes = sum(path.stat().st_size for path in (model_dir / "ckpt-0").iterdir())
    assert (totals.num_bytes, totals.num_files, totals.num_digests) == (num_bytes, 26, 0)
    assert (reports[-1].done, reports[-1].total, reports[-1].unit) == (num_bytes, num_bytes, "bytes")
    assert [report.done for report in reports] == sorted({report.done for report in reports})


def test_verifying_finds_every_value_that_is_not_finite(model_dir: Path) -> None:
    scales = np.ones((2, 8), BF16)
    scales[1, 3] = np.nan
    write_tensor(tensor_path(model_dir, ATTENTION_OUT), np.ones((16, 8), np.int8), scales=scales)
    write_tensor(tensor_path(model_dir, NORM), np.array([1, np.inf, -np.inf, 1, 1, 1, 1, 1], np.float32))

    with pytest.raises(CheckpointError, match=r"tensor00006_000: 1 values of the scales .*; .*tensor00023_000: 2 values of the weight"):
        verify_quietly(open_checkpoint(model_dir, CONFIG))


def digests(model_dir: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((model_dir / "ckpt-0").iterdir())}


@pytest.mark.parametrize("folder", [".", "ckpt-0"])
@pytest.mark.parametrize("form", ["list", "object of digests", "object of entries"])
def test_digests_are_compared_where_a_manifest_lies_beside_the_files(model_dir: Path, folder: str, form: str) -> None:
    known = digests(model_dir)
    manifest: Any = {
        "list": [
            {"file": name, "sha256": digest.upper(), "size": (model_dir / "ckpt-0" / name).stat().st_size} for name, digest in known.items()
        ],
        "object of digests": known,
        "object of entries": {name: {"sha256": digest} for name, digest in known.items()},
    }[form]
    (model_dir / folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = open_checkpoint(model_dir, CONFIG)
    assert verify_quietly(checkpoint).num_digests == 26

    path = tensor_path(model_dir, EXPERTS_DOWN)
    content = bytearray(path.read_bytes())
    content[read_index(path).weight.offset + 100] ^= 1
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=f"{path.name}: expected SHA-256 .* by its manifest"):
        verify_quietly(checkpoint)


def test_a_manifest_above_may_name_the_folder_of_the_tensors(model_dir: Path) -> None:
    (model_dir / "manifest.json").write_text(json.dumps({f"ckpt-0/{name}": digest for name, digest in digests(model_dir).items()}))

    totals = verify_quietly(open_checkpoint(model_dir, CONFIG))

    assert (totals.num_files, totals.num_digests) == (26, 26)


def test_a_manifest_above_a_folder_of_another_name_is_not_ours(model_dir: Path) -> None:
    (model_dir / "ckpt-0").rename(model_dir / "weights")
    (model_dir / "manifest.json").write_text("not ours")

    assert verify_quietly(open_checkpoint(model_dir / "weights", CONFIG)).num_digests == 0


def test_swapped_files_of_the_same_shape_are_found_by_their_digests(model_dir: Path) -> None:
    (model_dir / "manifest.json").write_text(json.dumps(digests(model_dir)))
    norms = model_dir / "ckpt-0" / "tensor00009_000", model_dir / "ckpt-0" / "tensor00010_000"
    contents = [path.read_bytes() for path in norms]
    norms[0].write_bytes(contents[1])
    norms[1].write_bytes(contents[0])

    with pytest.raises(CheckpointError, match=r"tensor00009_000: expected SHA-256 .*tensor00010_000: expected SHA-256"):
        verify_quietly(open_checkpoint(model_dir, CONFIG))


def test_a_manifest_may_name_other_files_of_its_folder(model_dir: Path) -> None:
    (model_dir / "README.md").write_text("hello")
    manifest = [{"file": "README.md", "sha256": hashlib.sha256(b"hello").hexdigest(), "size": 5}]
    (model_dir / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = open_checkpoint(model_dir, CONFIG)
    assert verify_quietly(checkpoint).num_digests == 1

    (model_dir / "README.md").write_text("hello!")
    with pytest.raises(CheckpointError, match=r"README.md: expected 5 bytes .*found 6; .*README.md: expected SHA-256"):
        verify_quietly(checkpoint)
    (model_dir / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README.md: cannot be opened"):
        verify_quietly(checkpoint)


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        ('[{"file": "../secret", "sha256": "%s"}]' % ("0" * 64), "not a path inside"),
        ('{"/etc/passwd": {"size": 1}}', "not a path inside"),
        ('{"a/../../b": {}}', "not a path inside"),
        ('[{"file": 3}]', "name a file"),
        ("[7]", "name a file"),
        ("7", "expected a list"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"tensor00000_000": "abc"}', "64 hexadecimal"),
        ('{"tensor00000_000": {"size": "3"}}', "number of bytes"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(model_dir: Path, manifest: str, match: str) -> None:
    (model_dir / "manifest.json").write_text(manifest)

    with pytest.raises(CheckpointError, match=f"manifest.json: .*{match}"):
        verify_quietly(open_checkpoint(model_dir, CONFIG))


# The command


def inspect(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    monkeypatch.setattr(sys, "argv", ["engine.checkpoint", "inspect", *arguments])
    status = command.main()
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_inspect_prints_each_tensor_and_the_totals(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = inspect(str(model_dir), monkeypatch=monkeypatch, capsys=capsys)

    assert status == 0
    assert [next(iter(line)) for line in lines] == ["tensor"] * 26 + ["totals"]
    assert lines[6]["tensor"] == {
        "file": "tensor00006_000",
        "name": ATTENTION_OUT,
        "dtype": "int8",
        "shape": [16, 8],
        "scales": [2, 8],
        "bytes": 16 * 8 + 2 * 8 * 2,
    }
    assert lines[-1]["totals"]["bytes"] == sum(path.stat().st_size for path in (model_dir / "ckpt-0").iterdir())
    assert (lines[-1]["totals"]["format"], lines[-1]["totals"]["tensors"], lines[-1]["totals"]["files"]) == ("released", 26, 26)
    assert lines[-1]["totals"]["verified"] is None


def test_inspect_verify_prints_progress(model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = inspect(str(model_dir), "--verify", monkeypatch=monkeypatch, capsys=capsys)

    assert status == 0
    assert lines[-2]["progress"]["done"] == lines[-2]["progress"]["total"] == lines[-1]["totals"]["bytes"]
    assert lines[-1]["totals"]["verified"]["num_files"] == 26


def test_inspect_of_a_damaged_checkpoint_ends_with_one_cause_and_status_2(model_dir: Path) -> None:
    path = tensor_path(model_dir, NORM)
    path.write_bytes(path.read_bytes()[:-3])

    done = subprocess.run([sys.executable, "-m", "engine.checkpoint", "inspect", str(model_dir)], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr == ""
    assert f"{path.name}: the file is truncated" in json.loads(done.stdout.splitlines()[-1])["error"]
