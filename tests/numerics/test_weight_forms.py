"""Converted weights in the engine: int8 and bfloat16 give what they must, int4 the same packed on the devices as dequantised at load."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward_harness import ForwardHarness, engine_config, no_report
from huggingface_layouts import config_of, layout_of, write_repository
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray
from numpy_grok import numpy_logits
from small_checkpoints import CONFIG, converted, opened, write_released

from engine.checkpoint.load import load_params, param_shapes
from engine.config import DType, MeshConfig, SchedulerConfig, read_model_config
from engine.errors import CheckpointError
from engine.footprint import Setup, device_bytes
from engine.model.params import Params, param_specs
from engine.model.quantized import PackedInt4Array, dequantize
from engine.ops.linear import linear
from engine.sharding import MESH_AXES, make_meshes

pytestmark = pytest.mark.timeout(400)  # sharded programs compile slowly

TINY_A = Path(__file__).parents[1] / "data" / "tiny-a"
ORACLE = np.load(TINY_A / "oracle.npz")
TOLERANCE = 1e-4
MODEL = replace(CONFIG, num_layers=1, num_kv_heads=8, num_experts=4, num_selected_experts=2, row_parallel_scale_groups=4)
PROMPT = np.random.default_rng(7).integers(0, MODEL.vocab_size, 21).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released form and all that it converts to, by name."""
    directory = tmp_path_factory.mktemp("forms")
    released = write_released(directory / "released", config=MODEL)
    for form in ("int8", "bfloat16"):
        converted(released, directory / form, form)
    for group in (64, 128):
        converted(released, directory / f"int4-{group}", "int4", group=group)
    return directory


def load(model_dir: Path, *, mesh: MeshConfig = MeshConfig(), dtype: DType = "float32", keep_int8: bool = False) -> Params:
    model = read_model_config(model_dir)
    return load_params(opened(model_dir), model, dtype=dtype, mesh=make_meshes(mesh, model)[0], keep_int8=keep_int8, report=no_report)


def logits(params: Params, *, mesh: MeshConfig = MeshConfig(), dtype: DType = "float32") -> NDArray[np.float32]:
    config = engine_config(MODEL, mesh=mesh, dtype=dtype, max_num_batched_tokens=32)
    (found,) = ForwardHarness(config, params).run([(PROMPT, [len(PROMPT)])])
    return found


def packed_leaves(params: Params) -> list[PackedInt4Array]:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PackedInt4Array))
    return [leaf for leaf in leaves if isinstance(leaf, PackedInt4Array)]


def num_bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("keep_int8", [False, True])
def test_int8_loads_the_arrays_of_the_release(models: Path, keep_int8: bool):
    released, converted_params = load(models / "released", keep_int8=keep_int8), load(models / "int8", keep_int8=keep_int8)

    jax.tree.map(np.testing.assert_array_equal, converted_params, released)


def test_bfloat16_weights_give_the_logits_of_their_values(models: Path):
    params = load(models / "bfloat16")

    np.testing.assert_allclose(logits(params), numpy_logits(params, PROMPT, MODEL), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("group", [64, 128])
def test_packed_int4_gives_the_logits_of_int4_turned_into_floats_at_load(models: Path, group: int):
    plain, packed = load(models / f"int4-{group}"), load(models / f"int4-{group}", keep_int8=True)

    assert len(packed_leaves(packed)) == 7
    expected = numpy_logits(plain, PROMPT, MODEL)
    np.testing.assert_allclose(logits(plain), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits(packed), expected, rtol=0, atol=TOLERANCE)


def test_packed_int4_is_dequantised_on_the_device_as_it_is_at_load(models: Path):
    plain, packed = load(models / "int4-64", dtype="bfloat16"), load(models / "int4-64", dtype="bfloat16", keep_int8=True)

    restored = jax.tree.map(
        lambda leaf: dequantize(leaf, np.dtype(jnp.bfloat16)) if isinstance(leaf, PackedInt4Array) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, PackedInt4Array),
    )

    jax.tree.map(np.testing.assert_array_equal, restored, plain)


@pytest.mark.parametrize("group", [64, 128])
def test_packed_int4_takes_at_most_54_hundredths_of_int8_on_the_device(models: Path, group: int):
    int8 = load(models / "released", keep_int8=True, dtype="bfloat16")
    int4 = load(models / f"int4-{group}", keep_int8=True, dtype="bfloat16")

    for name in ("query", "key", "value", "attention_out", "experts_gate", "experts_up", "experts_down"):
        matrix = getattr(int4.layers[0], name)
        assert isinstance(matrix, PackedInt4Array)
        assert num_bytes(matrix) <= 0.54 * getattr(int8.layers[0], name).weight.nbytes


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(tensor=4)])
def test_the_plan_counts_int4_as_it_is_loaded(models: Path, mesh: MeshConfig):
    layer = load(models / "int4-128", mesh=mesh, keep_int8=True).layers[0]
    scheduler = SchedulerConfig(max_model_len=64)
    setup = Setup(model=MODEL, mesh=mesh, scheduler=scheduler, weights="int4", kv="float32", dtype="float32")
    specs = param_specs(MODEL).layers[0]

    def loaded_bytes(name: str) -> int:
        return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(getattr(layer, name)))

    # Not the matrices that are cut by rows: a group of this narrow model lies on two devices, and both have its scale.
    for name in ("query", "key", "value", "experts_gate", "experts_up"):
        assert loaded_bytes(name) == device_bytes(getattr(specs, name), setup)


@pytest.mark.parametrize(
    ("mesh", "group"),
    [(MeshConfig(tensor=2, expert=2), 64), (MeshConfig(tensor=8), 64), (MeshConfig(tensor=4), 128)],
    ids=["groups split", "groups of 64 are cut in 32", "groups of 128 are cut in 32"],
)
def test_packed_int4_split_over_devices_gives_the_same_logits(models: Path, mesh: MeshConfig, group: int):
    packed = load(models / f"int4-{group}", mesh=mesh, keep_int8=True)

    expected = numpy_logits(load(models / f"int4-{group}"), PROMPT, MODEL)
    np.testing.assert_allclose(logits(packed, mesh=mesh), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("tensor", "group"), [(2, 64), (4, 64), (8, 64), (8, 128)])
def test_each_device_holds_its_rows_and_no_scales_but_theirs(models: Path, tensor: int, group: int):
    layer = load(models / f"int4-{group}", mesh=MeshConfig(tensor=tensor), keep_int8=True).layers[0]

    def share(matrix: PackedInt4Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(part.addressable_shards[0].data.shape for part in (matrix.weight, matrix.scales))  # pyright: ignore[reportReturnType]

    assert share(layer.experts_down)[0] == (4, 256 // 2 // tensor, 128)
    assert share(layer.experts_down)[1][1] == max(1, 256 // group // tensor)
    assert share(layer.experts_gate) == ((4, 64, 256 // tensor), (4, 128 // group, 256 // tensor))
    assert layer.experts_down.shape == (4, 256, 128)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_hugging_face_layout_is_split_over_devices_as_the_release_is(models: Path, tmp_path: Path, kind: str):
    arrays = layout_of(opened(models / "released"), "hpcai")
    model_dir = write_repository(tmp_path / "model", arrays, config_of(MODEL, "hpcai"), kind=kind, num_files=2)

    split = load(model_dir, mesh=MeshConfig(tensor=4, expert=2))

    assert split.layers[0].experts_down.addressable_shards[0].data.shape == (2, 64, 128)
    jax.tree.map(np.testing.assert_array_equal, split, load(model_dir))


@pytest.mark.parametrize("form", ["released", "int4-64"])
def test_a_product_over_devices_needs_one_all_reduce_by_rows_and_nothing_by_columns(models: Path, form: str):
    mesh = MeshConfig(tensor=8)
    layer = load(models / form, mesh=mesh, keep_int8=True).layers[0]
    devices = make_meshes(mesh, MODEL)[0]

    def collectives(matrix: Any, x_axes: PartitionSpec, axes: PartitionSpec) -> list[str]:
        x = jax.ShapeDtypeStruct((4, matrix.shape[0]), np.float32, sharding=NamedSharding(devices, x_axes))
        text = jax.jit(linear, out_shardings=NamedSharding(devices, axes)).lower(x, matrix).compile().as_text()
        return re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text or "")

    assert collectives(layer.attention_out, PartitionSpec(None, "tensor"), PartitionSpec()) == ["all-reduce"]
    assert collectives(layer.query, PartitionSpec(), PartitionSpec(None, "tensor")) == []


@pytest.mark.parametrize("layout", ["hpcai", "keyfan"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tiny_a_in_a_hugging_face_layout_gives_its_logits_with_weights_rounded_to_bfloat16(tmp_path: Path, layout: str, kind: str):
    released, config = opened(TINY_A), read_model_config(TINY_A)
    model_dir = write_repository(tmp_path / layout, layout_of(released, layout), config_of(config, layout), kind=kind, num_files=3)

    params = load(model_dir)

    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(np.float32), load(TINY_A))
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    prompt = ORACLE["prompt_4"].tolist()
    (found,) = ForwardHarness(engine_config(config, max_num_batched_tokens=80), params).run([(prompt, [len(prompt)])])
    np.testing.assert_allclose(found, numpy_logits(rounded, prompt, config), rtol=0, atol=TOLERANCE)
    assert np.sqrt(np.square(found - ORACLE["f32/full_logits_4"]).mean()) < 0.05


def test_devices_that_cannot_share_the_bytes_are_refused(tmp_path: Path):
    config = replace(MODEL, ffn_size=64)
    converted(write_released(tmp_path / "released", config=config), tmp_path / "int4", "int4")
    mesh: Any = AbstractMesh((1, 64), MESH_AXES)

    with pytest.raises(CheckpointError, match=r"the 64 rows of .*moe/linear_1, int4 in 1 groups, cannot be shared by 64 devices"):
        param_shapes(opened(tmp_path / "int4"), config, dtype="float32", mesh=mesh, keep_int8=True)
