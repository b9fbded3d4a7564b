"""The Hugging Face layouts: which tensor is which, what a slice reads, and that mixed, damaged and hostile files are refused by name."""

import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from huggingface_layouts import config_of, integer, integers, layout_of, tensor, text, torch_pickle, write_repository, write_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import CONFIG, converted, edit_json, opened, write_released

from engine.checkpoint.dequantize import real_slice
from engine.checkpoint.tensors import Checkpoint
from engine.checkpoint.torch_format import read_torch
from engine.checkpoint.verify import verify
from engine.config import ModelConfig, read_model_config
from engine.errors import CheckpointError, ConfigError

LAYOUTS = ("hpcai", "keyfan")
KINDS = ("safetensors", "bin")
GATE = "transformer/decoder_layer_1/moe/linear"
CANARY = "canary-was-executed"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return opened(write_released(tmp_path_factory.mktemp("released") / "model"))


def write(model_dir: Path, checkpoint: Checkpoint, *, layout: str = "hpcai", kind: str = "safetensors", **options: Any) -> Path:
    return write_repository(model_dir, layout_of(checkpoint, layout), config_of(CONFIG, layout), kind=kind, **options)


def refuse(model_dir: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(model_dir)
    assert "\n" not in str(caught.value)


# What opens


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_files", "has_index"), [(1, False), (3, True), (3, False)], ids=["one file", "index", "no index"])
def test_every_tensor_is_the_release_in_bfloat16(
    released: Checkpoint, tmp_path: Path, layout: str, kind: str, num_files: int, has_index: bool
) -> None:
    model_dir = write(tmp_path / "model", released, layout=layout, kind=kind, num_files=num_files, has_index=has_index)

    found = opened(model_dir)

    assert found.format == "huggingface"
    assert found.tensors.keys() == released.tensors.keys()
    assert len(found.file_sizes) == num_files
    for name, tensor_found in found.tensors.items():
        assert tensor_found.form == "bfloat16"
        assert tensor_found.weight.shape == tensor_found.spec.shape
        whole = (slice(None),) * len(tensor_found.spec.shape)
        np.testing.assert_array_equal(tensor_found.weight[whole], real_slice(released.tensors[name], whole, ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_stacked_experts_is_the_slice_of_the_whole(released: Checkpoint, tmp_path: Path, kind: str) -> None:
    weight = opened(write(tmp_path / "model", released, kind=kind)).tensors[GATE].weight
    whole = weight[...]

    for index in [
        (slice(1, 2), slice(None), slice(3, 9)),
        (slice(None), slice(5, 6), slice(None)),
        (slice(0, 1), slice(10, 30), slice(0, 256)),
    ]:
        np.testing.assert_array_equal(weight[index], whole[index])


def test_matrices_are_mapped_not_read(released: Checkpoint, tmp_path: Path) -> None:
    tensors = opened(write(tmp_path / "model", released, kind="bin")).tensors

    assert isinstance(tensors["transformer/decoder_layer_0/multi_head_attention/query"].weight, np.memmap)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_their_configuration_is_ours(layout: str) -> None:
    found = ModelConfig.from_json(config_of(CONFIG, layout))

    assert found == ModelConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__ if name != "row_parallel_scale_groups"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "git"}, "model_type is 'git', which is not Grok-1; expected 'grok-1' or 'grok'"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
        ({"residual_moe": True}, "residual_moe is True"),
        ({"final_logit_softcapping": 50.0}, "final_logit_softcapping is 50.0"),
        ({"num_local_experts": 3}, "num_experts 2 contradicts num_local_experts 3"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 128"),
        ({"hidden_size": "wide"}, "num_attention_heads 8 does not divide hidden_size 'wide'"),
        ({"num_experts": None}, "missing num_experts"),
    ],
)
def test_a_configuration_of_another_model_is_refused(change: dict[str, Any], match: str) -> None:
    raw = config_of(CONFIG, "hpcai") | change

    with pytest.raises(ConfigError, match=match):
        ModelConfig.from_json(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_converts_and_verifies(released: Checkpoint, tmp_path: Path, kind: str) -> None:
    model_dir = write(tmp_path / "model", released, kind=kind, num_files=2)

    converted(model_dir, tmp_path / "int4", "int4")
    converted(model_dir, tmp_path / "bfloat16", "bfloat16")

    assert read_model_config(tmp_path / "int4") == read_model_config(model_dir)
    np.testing.assert_array_equal(opened(tmp_path / "bfloat16").tensors[GATE].weight[...], opened(model_dir).tensors[GATE].weight[...])
    assert verify(opened(model_dir), report=lambda _: None).num_files == 2


def test_verifying_finds_values_that_are_not_finite(released: Checkpoint, tmp_path: Path) -> None:
    arrays = layout_of(released, "keyfan")
    arrays["transformer.decoder_layer.0.moe.1.linear.weight"][3, 4] = np.inf
    model_dir = write_repository(tmp_path / "model", arrays, config_of(CONFIG, "keyfan"), kind="bin")

    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: 1 values of the weight of transformer/decoder_layer_0/moe/linear are"):
        verify(opened(model_dir), report=lambda _: None)


def test_safetensors_are_taken_where_both_kinds_are_there(released: Checkpoint, tmp_path: Path) -> None:
    model_dir = write(tmp_path / "model", released)
    (model_dir / "pytorch_model.bin").write_bytes(b"not looked at")

    assert opened(model_dir).tensors[GATE].path.name == "model.safetensors"


def test_a_head_that_is_the_embedding_may_be_stored_twice(released: Checkpoint, tmp_path: Path) -> None:
    arrays = layout_of(released, "hpcai")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    arrays["model.layers.0.attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert len(opened(write_repository(tmp_path / "tied", arrays, config_of(CONFIG, "hpcai"), kind="bin")).tensors) == 26

    arrays["lm_head.weight"] = arrays["lm_head.weight"] + arrays["lm_head.weight"]
    refuse(write_repository(tmp_path / "untied", arrays, config_of(CONFIG, "hpcai"), kind="bin"), "lm_head.weight is not the embedding")


# What is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named(released: Checkpoint, tmp_path: Path, kind: str, has_index: bool) -> None:
    model_dir = write(tmp_path / "model", released, kind=kind, num_files=3, has_index=has_index)
    next(model_dir.glob(f"*-00002-of-00003.{kind}")).unlink()

    refuse(model_dir, r"-00002-of-00003\..*: cannot be opened: No such file" if has_index else "file 00002 of 00003 is missing")


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_files_are_refused(released: Checkpoint, tmp_path: Path, kind: str) -> None:
    model_dir = write(tmp_path / "model", released, kind=kind, num_files=2)
    first, second = sorted(model_dir.glob(f"*.{kind}"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)

    refuse(model_dir, f"{first.name}: holds .* has it in {second.name}; files were swapped or two checkpoints mixed")


def test_files_of_two_checkpoints_are_refused(released: Checkpoint, tmp_path: Path) -> None:
    model_dir = write(tmp_path / "model", released, num_files=2, has_index=False)
    other = write(tmp_path / "other", released, num_files=3, has_index=False)
    for path in other.glob("*.safetensors"):
        path.rename(model_dir / path.name)
    refuse(model_dir, "are of two checkpoints; remove one of them")

    for path in model_dir.glob("*-of-00003.safetensors"):
        path.unlink()
    first, second = sorted(model_dir.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    refuse(model_dir, f"{second.name}: holds .*, and so does {first.name}; two checkpoints were mixed")


def test_other_tensors_than_the_configuration_has_are_refused(released: Checkpoint, tmp_path: Path) -> None:
    arrays, config = layout_of(released, "hpcai"), config_of(CONFIG, "hpcai")

    def refuse_with(name: str, change: dict[str, np.ndarray | None], match: str, **config_change: Any) -> None:
        changed = {key: value for key, value in (arrays | change).items() if value is not None}
        refuse(write_repository(tmp_path / name, changed, config | config_change, kind="safetensors"), match)

    norm = "model.layers.1.pre_moe_norm.scale"
    refuse_with("less", {norm: None}, f"{norm} is in none of its files")
    refuse_with(
        "more", {"model.layers.1.bias": np.zeros(3, np.float32)}, "model.safetensors: 'model.layers.1.bias' is no tensor of this model"
    )
    refuse_with("shape", {norm: np.ones(7, np.float32)}, rf"expected {norm} as bfloat16 or float32 \[128\], found float32 \[7\]")
    refuse_with("dtype", {norm: np.ones(128, np.int8)}, "found int8")
    refuse_with(
        "unknown", {"model.embed_tokens.weight": None}, "holds neither model.embed_tokens.weight nor transformer.in_out_embed.weight"
    )
    refuse_with("fewer layers", {}, "holds 2 layers, config.json has 1", num_hidden_layers=1)
    refuse_with("many layers", {}, "holds 2 layers, config.json has 1,000,000,000", num_hidden_layers=10**9)
    query = arrays["model.layers.0.attn.q_proj.weight"]
    refuse_with("transposed", {"model.layers.0.attn.k_proj.weight": query}, "expected model.layers.0.attn.k_proj.weight as")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda raw: {"weight_map": raw["weight_map"] | {"x": "../../etc/passwd"}}, "names '../../etc/passwd', which is no file"),
        (lambda raw: {"weight_map": raw["weight_map"] | {"x": "/model.safetensors"}}, "names '/model.safetensors', which is no file"),
        (lambda raw: {"weight_map": raw["weight_map"] | {"x": 3}}, "is damaged: expected a weight_map"),
        (lambda _: {"weight_map": {}}, "is damaged: expected a weight_map"),
        (lambda _: [], "is damaged: expected a weight_map"),
        (lambda raw: {"weight_map": raw["weight_map"] | {"x": "model-00001-of-00002.safetensors"}}, "00001.*: lacks 'x', which"),
        (lambda raw: {"weight_map": dict(list(raw["weight_map"].items())[1:])}, "does not know it; files were swapped or"),
    ],
)
def test_a_damaged_index_is_refused(released: Checkpoint, tmp_path: Path, change: Any, match: str) -> None:
    model_dir = write(tmp_path / "model", released, num_files=2)
    edit_json(model_dir / "model.safetensors.index.json", change)

    refuse(model_dir, match)


# torch's files


SOME = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4,), ml_dtypes.bfloat16)}


def refuse_torch(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_torch(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not Path(CANARY).exists()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where a canary would appear
    return tmp_path / "pytorch_model.bin"


def test_tensors_of_a_torch_file_are_mapped_where_they_lie(path: Path) -> None:
    write_torch(path, SOME)

    found = read_torch(path)

    assert found.keys() == SOME.keys()
    for name, array in SOME.items():
        np.testing.assert_array_equal(found[name].open(), array)


def test_the_pickle_that_the_tests_write_is_one() -> None:
    """As the standard library's disassembler sees it."""
    names = [argument for opcode, argument, _ in pickletools.genops(torch_pickle(SOME)) if opcode.name == "GLOBAL"]

    assert set(names) == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "torch BFloat16Storage",
    }


def test_tensors_may_share_a_storage(path: Path) -> None:
    items = [
        text("a"),
        tensor("FloatStorage", "0", (2,), num_items=6),
        text("b"),
        tensor("FloatStorage", "0", (2, 2), num_items=6, offset=2),
    ]
    write_torch(path, {"x": SOME["a"]}, pickle=b"\x80\x02}(" + b"".join(items) + b"u.")

    found = read_torch(path)

    np.testing.assert_array_equal(found["a"].open(), [0, 1])
    np.testing.assert_array_equal(found["b"].open(), [[2, 3], [4, 5]])


def test_compressed_storages_are_refused(path: Path) -> None:
    write_torch(path, SOME, compression=zipfile.ZIP_DEFLATED)

    refuse_torch(path, "'data.pkl' is compressed or encrypted, so it cannot be mapped")


def dict_of(value: bytes) -> bytes:
    return b"\x80\x02}" + text("a") + value + b"s."


def call(function: bytes, arguments: bytes) -> bytes:
    return b"c" + function + b"\n(" + arguments + b"tR"


@pytest.mark.parametrize(
    ("pickle", "match"),
    [
        (
            dict_of(call(b"os\nsystem", text(f"touch {CANARY}"))),
            "names 'os.system', which a file of tensors never does; nothing was executed",
        ),
        (dict_of(call(b"builtins\nexec", text("1"))), "names 'builtins.exec'"),
        (dict_of(call(b"torch.storage\n_load_from_bytes", text("1"))), "names 'torch.storage._load_from_bytes'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(f"touch {CANARY}") + b"\x85R.", "names 'os.system'"),
        (b"cos\nsystem\n(S'x'\ntR.", "names 'os.system'"),
        (b"(S'x'\nios\nsystem\n.", "pickle opcode STRING, which a file of tensors never has"),
        (dict_of(tensor("HalfStorage", "0", (2, 3), num_items=6)), "holds tensors of HalfStorage; known are"),
        (dict_of(tensor("FloatStorage", "9", (2, 3), num_items=6)), "lacks 'data/9'"),
        (dict_of(tensor("FloatStorage", "../0", (2, 3), num_items=6)), "lacks 'data/../0'"),
        (dict_of(tensor("FloatStorage", "0", (2, 3), num_items=7)), "has 24 bytes, expected 7 items of 4"),
        (dict_of(tensor("FloatStorage", "0", (2, 4), num_items=6)), "reaches beyond its storage"),
        (dict_of(tensor("FloatStorage", "0", (2, 3), num_items=6, offset=1)), "reaches beyond its storage"),
        (dict_of(tensor("FloatStorage", "0", (2, 3), num_items=6, offset=-1)), "expected a shape of positive sizes"),
        (dict_of(tensor("FloatStorage", "0", (2, -3), num_items=6)), "expected a shape of positive sizes"),
        (dict_of(tensor("FloatStorage", "0", (3, 2), num_items=6, strides=(1, 3))), "expected a tensor in C order"),
        (dict_of(text("b")), "expected tensors by name, found 'b' as 'a'"),
        (dict_of(b"}"), "expected tensors by name, found dict as 'a'"),
        (b"\x80\x02}(" + (text("a") + tensor("FloatStorage", "0", (2, 3), num_items=6)) * 2 + b"u.", "expected a new name in a dict"),
        (b"\x80\x02}" + integer(3) + integer(4) + b"s.", "expected a new name in a dict"),
        (b"\x80\x02]q\x00h\x00a.", "pickle opcode EMPTY_LIST"),
        (b"\x80\x02h\x05.", "memo entry 5 does not exist"),
        (b"\x80\x02s.", "finds no value"),
        (b"\x80\x02t.", "finds no mark"),
        (b"\x80\x02" + integers((1, 2)) + b"Q.", "expected a reference to a storage"),
        (b"\x80\x02}", "is no pickle: pickle exhausted before seeing STOP"),
        (b"", "is no pickle"),
        (b"\x80\x02N.", "expected one dict of tensors"),
    ],
)
def test_a_hostile_or_damaged_pickle_is_refused(path: Path, pickle: bytes, match: str) -> None:
    write_torch(path, {"x": SOME["a"]}, pickle=pickle)

    refuse_torch(path, match)


@pytest.mark.parametrize("kept", [0, 1, 100, -1, -30])
def test_a_truncated_archive_is_refused(path: Path, kept: int) -> None:
    write_torch(path, SOME)
    path.write_bytes(path.read_bytes()[:kept])

    refuse_torch(path, "is no torch file of version 1.6 or later, or truncated")


def test_a_pointer_to_a_large_file_is_no_weights(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")

    refuse_torch(path, "Git LFS pointer")


def test_big_endian_tensors_and_double_members_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", b"big")
    refuse_torch(path, "expected little-endian tensors")

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    refuse_torch(path, "holds 'other/data.pkl' twice")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_damaged_is_refused_or_read_within_the_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    write_torch(path, SOME)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)

    try:
        found = read_torch(path)
    except CheckpointError:
        return
    for array in found.values():
        assert array.stored.offset + array.num_bytes <= len(content)
        array.open()


def test_a_zip_of_something_else_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", json.dumps({}))

    refuse_torch(path, "lacks 'data.pkl'")
