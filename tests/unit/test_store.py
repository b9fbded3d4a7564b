"""The format that conversions write: what opens, and that every damage, mixture and swap is refused by name before anything is loaded."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from small_checkpoints import CONFIG, converted, edit_json, opened, write_released

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.dequantize import read_slice, unpack_int4
from engine.checkpoint.safetensors_format import encode_header, read_safetensors
from engine.checkpoint.verify import verify
from engine.errors import CheckpointError

QUERY = "transformer/decoder_layer_0/multi_head_attention/query"
DOWN = "transformer/decoder_layer_1/moe/linear_1"
NORM = "transformer/decoder_layer_1/rms_norm_2"
SMALL_FILES = 60_000  # bytes


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return write_released(tmp_path / "released")


@pytest.fixture
def store(released: Path, tmp_path: Path) -> Path:
    converted(released, tmp_path / "store", max_file_bytes=SMALL_FILES)
    return tmp_path / "store"


def refuse(model_dir: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(model_dir)
    assert "\n" not in str(caught.value)


def weights_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("weights-*.safetensors"))


def redigest(model_dir: Path) -> None:
    """Make the manifest agree with whatever the files are now."""

    def change(manifest: Any) -> None:
        for file in manifest["files"]:
            content = (model_dir / file["file"]).read_bytes()
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_json(model_dir / "manifest.json", change)


# What opens


def test_int8_holds_what_the_release_holds_to_the_bit(released: Path, store: Path) -> None:
    before, after = opened(released), opened(store)

    assert after.format == "store"
    assert after.row_parallel_scale_groups == before.row_parallel_scale_groups == 2
    assert len(weights_files(store)) > 3
    for name, tensor in before.tensors.items():
        assert after.tensors[name].form == tensor.form
        np.testing.assert_array_equal(after.tensors[name].weight[...], tensor.weight[...])
        if tensor.scales is not None:
            assert after.tensors[name].scales is not None
            np.testing.assert_array_equal(after.tensors[name].scales[...], tensor.scales[...])  # pyright: ignore[reportOptionalSubscript]


def test_the_safetensors_library_reads_what_we_write(released: Path, store: Path) -> None:
    source = opened(released)
    found: dict[str, np.ndarray] = {}
    for path in weights_files(store):
        with safe_open(path, framework="numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    assert found.keys() == {f"{name}.weight" for name in source.tensors} | {
        f"{name}.scales" for name, tensor in source.tensors.items() if tensor.scales_source
    }
    np.testing.assert_array_equal(found[f"{DOWN}.weight"], source.tensors[DOWN].weight[...])
    assert found[f"{DOWN}.scales"].dtype == ml_dtypes.bfloat16


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.int8),
        "c": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
        "d": np.ones((3, 1), ml_dtypes.bfloat16),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})

    file = read_safetensors(tmp_path / "x.safetensors")

    assert file.metadata == {"format": "np"}
    assert file.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        mapped = file.arrays[name].open()
        assert isinstance(mapped, np.memmap)
        assert mapped.dtype == array.dtype
        np.testing.assert_array_equal(mapped, array)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_a_slice_is_the_slice_of_the_whole(released: Path, tmp_path: Path, form: Any) -> None:
    if form != "float32":
        converted(released, tmp_path / form, form)
    tensor = opened(released if form == "float32" else tmp_path / form).tensors[
        "language_model/in_out_embed" if form == "float32" else DOWN
    ]
    whole = read_slice(tensor.form, tensor.weight, tensor.scales, (slice(None),) * len(tensor.spec.shape), np.float32)

    for rows in (slice(None), slice(3, 30), slice(7, 8), slice(10, 21), slice(1, None), slice(128, 256)):
        index = (*(slice(1, 2),) * (len(tensor.spec.shape) - 2), rows if whole.shape[-2] > 200 else slice(3, 30), slice(5, 9))
        np.testing.assert_array_equal(read_slice(tensor.form, tensor.weight, tensor.scales, index, np.float32), whole[index])


def test_a_byte_of_int4_holds_an_even_row_below_and_an_odd_row_above() -> None:
    packed = np.array([[0x80, 0x0F], [0x31, 0xF7]], np.uint8)

    np.testing.assert_array_equal(unpack_int4(packed), [[-8, 7], [0, -8], [-7, -1], [-5, 7]])


def test_verifying_covers_every_file_with_its_digest(store: Path) -> None:
    totals = verify(opened(store), report=lambda _: None)

    assert totals.num_files == totals.num_digests == len(weights_files(store)) + 1  # config.json
    assert totals.num_bytes == sum(path.stat().st_size for path in [*weights_files(store), store / "config.json"])


# What is refused


def test_a_directory_without_its_manifest_is_unfinished(store: Path) -> None:
    (store / "manifest.json").unlink()

    refuse(store, "holds no manifest.json: a conversion was interrupted; run it again with the same arguments")


def test_a_missing_shard_is_named(store: Path) -> None:
    weights_files(store)[1].unlink()

    refuse(store, "weights-00002.safetensors: is missing, manifest.json names it; copy all files of one conversion here again")


def test_a_directory_with_nothing_but_its_manifest_names_the_missing_file(store: Path) -> None:
    for path in weights_files(store):
        path.unlink()

    refuse(store, "weights-00001.safetensors: is missing")


@pytest.mark.parametrize("kept", [0, 5, 100, 2000, -1])
def test_a_truncated_file_is_named(store: Path, kept: int) -> None:
    path = weights_files(store)[0]
    path.write_bytes(path.read_bytes()[:kept])

    refuse(store, "weights-00001.safetensors: .*truncated")


def test_a_longer_file_is_refused(store: Path) -> None:
    path = weights_files(store)[0]
    path.write_bytes(path.read_bytes() + b"\0")

    refuse(store, "weights-00001.safetensors: is longer than its content")


def test_swapped_files_are_refused_even_where_they_have_the_same_size(store: Path) -> None:
    first, second = weights_files(store)[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)

    refuse(store, "weights-00001.safetensors: was written as 'weights-00002.safetensors'; files were swapped")


def test_files_of_two_conversions_are_a_mixture(store: Path, tmp_path: Path) -> None:
    converted(write_released(tmp_path / "other", seed=2), tmp_path / "other-store", max_file_bytes=SMALL_FILES)
    weights_files(store)[2].write_bytes(weights_files(tmp_path / "other-store")[2].read_bytes())

    refuse(store, "weights-00003.safetensors: is of another conversion than manifest.json; two checkpoints were mixed")


def test_two_formats_in_one_directory_are_refused(store: Path, released: Path) -> None:
    (released / "ckpt-0").rename(store / "ckpt-0")

    refuse(store, "holds files of two checkpoints")


def test_a_surplus_file_is_named(store: Path) -> None:
    (store / "weights-00099.safetensors").write_bytes(weights_files(store)[0].read_bytes())

    refuse(store, "weights-00099.safetensors: is a surplus file")


def test_another_config_is_refused_with_the_difference(store: Path) -> None:
    edit_json(store / "config.json", lambda raw: raw | {"rope_base": 5000.0})

    refuse(store, "manifest.json: was written for rope_base 10000.0, config.json has 5000.0")


def test_a_config_that_was_edited_after_the_conversion_is_refused_even_where_it_says_the_same(store: Path) -> None:
    config = store / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")

    refuse(store, r"config\.json: is not the file that the conversion put here, by its digest in manifest\.json; copy all files")


def test_other_layers_are_refused_before_anything_is_built(store: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["config"]["num_layers"] = 10**9

    edit_json(store / "manifest.json", change)

    with pytest.raises(CheckpointError, match="names 26 tensors, a model of 1,000,000,000 layers has 12,000,000,002"):
        open_checkpoint(store, replace(CONFIG, num_layers=10**9))


def test_wrong_bytes_are_found_by_their_digest(store: Path) -> None:
    path = weights_files(store)[1]
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    checkpoint = opened(store)

    with pytest.raises(CheckpointError, match=r"weights-00002.safetensors: expected SHA-256 .* by its manifest"):
        verify(checkpoint, report=lambda _: None)


def drop(*keys: str | int) -> Any:
    """Removes the entry at this path."""

    def change(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        del raw[keys[-1]]

    return change


def put(value: Any, *keys: str | int) -> Any:
    """Sets the entry at this path."""

    def change(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put(2, "version"), "is of format version 2, this program reads version 1"),
        (drop("conversion"), "is damaged: expected format, version"),
        (put("x", "files"), "is damaged: expected format, version"),
        (put(7, "files", 0), "is damaged: expected every file with its name"),
        (drop("files", 1, "size"), "is damaged: expected every file with its name"),
        (put(True, "files", 1, "size"), "is damaged: expected every file with its name"),
        (put("../weights-00001.safetensors", "files", 1, "file"), "names '../weights-00001.safetensors', which is no file of a conversion"),
        (put("/etc/passwd", "files", 1, "file"), "names '/etc/passwd', which is no file of a conversion"),
        (put("weights-00001.safetensors.part", "files", 1, "file"), "which is no file of a conversion"),
        (drop("files", 1, "tensors"), "listed without its tensors"),
        (drop("files", 2), "names 2[0-9] tensors, a model of 2 layers has 26"),
        (drop("files", 1, "tensors", 0, "form"), "is damaged: expected a tensor with name, form"),
        (put("int5", "files", 1, "tensors", 0, "form"), "is damaged: expected a tensor with name, form"),
        (put("float64", "files", 1, "tensors", 0, "weight", "dtype"), "is damaged: the weight of .* have no dtype or shape"),
        (put([1, 2], "files", 1, "tensors", 0, "weight", "shape"), r"expected language_model/in_out_embed.weight as float32 \[1, 2\] by"),
        (put(NORM, "files", 1, "tensors", 0, "name"), "expected .* by manifest.json, found"),
        (put("bfloat16", "files", 1, "tensors", 0, "form"), "expected language_model/in_out_embed of .* as bfloat16, found weight float32"),
        (put(5, "files", 1, "size"), "weights-00001.safetensors: expected 5 bytes by its manifest, found"),
        (put("another", "conversion"), "two checkpoints were mixed"),
    ],
)
def test_a_damaged_manifest_is_refused_by_what_is_wrong(store: Path, change: Any, match: str) -> None:
    edit_json(store / "manifest.json", change)

    refuse(store, match)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_a_manifest_that_is_no_manifest_is_refused(store: Path, content: bytes) -> None:
    (store / "manifest.json").write_bytes(content)

    refuse(store, r"manifest.json: is (not valid JSON|damaged)")


def test_a_digest_that_is_none_is_refused_when_verifying(store: Path) -> None:
    edit_json(store / "manifest.json", put("abc", "files", 1, "sha256"))

    with pytest.raises(CheckpointError, match=r"the sha256 of 'weights-00001.safetensors' is not 64 hexadecimal digits"):
        verify(opened(store), report=lambda _: None)


# The safetensors header


HEADER = {"x": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}


def file_of(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_what_the_header_tests_begin_from_is_sound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file_of(HEADER))

    assert {name: str(array.stored) for name, array in read_safetensors(tmp_path / "x").arrays.items()} == {
        "x": "int8 [4]",
        "y": "float32 [1]",
    }


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is no safetensors file, or truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "is no safetensors file, or truncated"),
        (file_of(b"{x}"), "header is not valid JSON"),
        (file_of(b"[" * 50_000), "header is not valid JSON"),
        (file_of(b"[]"), "header is not an object"),
        (file_of(b'{"x": {}, "x": {}}'), "a name occurs twice"),
        (file_of({"__metadata__": {"a": 1}}), "metadata in its header are not texts"),
        (file_of({"x": 3}), "entry of 'x' lacks dtype"),
        (file_of(HEADER | {"x": HEADER["x"] | {"dtype": "F64"}}), "'x' is 'F64'; known are F32, BF16, I8, U8"),
        (file_of(HEADER | {"x": HEADER["x"] | {"shape": [-4]}}), r"'x' has the shape \[-4\]; expected positive"),
        (file_of(HEADER | {"x": HEADER["x"] | {"shape": [1] * 9}}), "expected positive sizes"),
        (file_of(HEADER | {"x": HEADER["x"] | {"shape": [5]}}), r"'x' is int8 \[5\], which takes 5 bytes, found 4"),
        (file_of(HEADER | {"x": HEADER["x"] | {"data_offsets": [-4, 0]}}), "takes 4 bytes"),
        (file_of(HEADER | {"x": HEADER["x"] | {"data_offsets": [2, 6]}}), "'x' begins at byte .*, expected"),
        (file_of(HEADER, bytes(7)), "is truncated: .* 'y' ends after"),
        (file_of(HEADER, bytes(9)), "is longer than its content"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=f"x.safetensors: .*{match}") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_first_array_lies_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    header = encode_header({"x": ("int8", (4,))}, {"file": "x"})

    assert len(header) % 64 == 0
    (tmp_path / "x").write_bytes(header + b"abcd")
    assert read_safetensors(tmp_path / "x").arrays["x"].open().tobytes() == b"abcd"
