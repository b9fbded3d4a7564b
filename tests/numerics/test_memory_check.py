"""What an engine counts before it loads is what it then has on its devices, and what does not fit is refused at the first byte."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from small_checkpoints import CONFIG, converted, opened, write_released

from engine.checkpoint.load import param_shapes
from engine.config import EngineOptions, KVDType, MeshConfig, SchedulerConfig, read_model_config
from engine.errors import ConfigError, DoesNotFitError
from engine.footprint import Device, device_bytes, kv_bytes_per_token, slot_bytes, weights_by_kind
from engine.memory_check import config_for, setup_for
from engine.model.params import each_spec, param_specs
from engine.plan import Plan, Question, make_plan
from engine.programs import state_shapes
from engine.sharding import make_meshes

MODEL = replace(CONFIG, num_kv_heads=2, num_experts=4, num_selected_experts=2)
PLENTY = 1 << 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("forms")
    released = write_released(directory / "released", config=MODEL)
    converted(released, directory / "bfloat16", "bfloat16")
    converted(released, directory / "int4", "int4", group=64)
    return directory


def options_for(model_dir: Path, *, mesh: MeshConfig = MeshConfig(), kv_dtype: KVDType = "float32", **changes: Any) -> EngineOptions:
    model = read_model_config(model_dir)
    scheduler = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=model.sequence_len)
    return EngineOptions(
        model=model, model_dir=str(model_dir), scheduler=scheduler, dtype="float32", mesh=mesh, kv_dtype=kv_dtype, **changes
    )


def an_accelerator(memory_bytes: int) -> Device:
    return Device(name="accelerator", memory_bytes=memory_bytes)


def a_host(memory_bytes: int, *, num_sharing: int = 1) -> Device:
    return Device(name="cpu", memory_bytes=memory_bytes, is_host=True, num_sharing=num_sharing)


def plan_of(options: EngineOptions, device: Device, *, cache_bytes: int | None = None) -> Plan:
    backend = "cpu" if device.is_host else "gpu"
    setup = setup_for(options, opened(Path(options.model_dir)), backend=backend)
    return make_plan(Question(setup=setup, device=device, cache_bytes=cache_bytes))


def bytes_of_a_device(shapes: Any) -> int:
    def of(leaf: jax.ShapeDtypeStruct) -> int:
        assert leaf.sharding is not None
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        return size

    return sum(of(leaf) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("form", ["released", "bfloat16", "int4"])
@pytest.mark.parametrize("backend", ["gpu", "cpu"])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(tensor=2), MeshConfig(tensor=8), MeshConfig(expert=4), MeshConfig(expert=2, tensor=4)], ids=str
)
def test_every_weight_takes_on_each_device_what_was_counted(models: Path, form: str, backend: str, mesh: MeshConfig):
    options = options_for(models / form, mesh=mesh)
    checkpoint = opened(models / form)
    setup = setup_for(options, checkpoint, backend=backend)
    (devices,) = make_meshes(mesh, options.model)

    shapes = param_shapes(checkpoint, options.model, dtype="float32", mesh=devices, keep_int8=backend == "gpu")

    specs = param_specs(options.model)
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: hasattr(leaf, "axes"))
    structure = jax.tree.structure(specs, is_leaf=lambda leaf: hasattr(leaf, "axes"))
    for spec, arrays in zip(leaves, structure.flatten_up_to(shapes), strict=True):
        assert bytes_of_a_device(arrays) == device_bytes(spec, setup), spec.name
    assert sum(device_bytes(spec, setup) for spec in each_spec(specs)) == sum(each.device_bytes for each in weights_by_kind(setup))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(tensor=2), MeshConfig(expert=2, tensor=4)], ids=str)
def test_cache_and_slots_take_on_each_device_what_was_counted(models: Path, kv_dtype: KVDType, mesh: MeshConfig):
    options = options_for(models / "released", mesh=mesh, kv_dtype=kv_dtype)
    config = config_for(options, an_accelerator(2 << 30))
    setup = setup_for(options, opened(models / "released"), backend="gpu")
    (devices,) = make_meshes(mesh, options.model)

    state = state_shapes(config, devices)

    assert bytes_of_a_device(state.cache) == (config.cache.num_blocks + 1) * 16 * kv_bytes_per_token(setup)
    last_tokens_bytes = 4 * 4
    assert bytes_of_a_device(state.slots) == slot_bytes(setup) + last_tokens_bytes


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(tensor=8)], ids=str)
def test_the_cache_that_is_served_with_is_the_planned_one(models: Path, mesh: MeshConfig):
    options = options_for(models / "int4", mesh=mesh, kv_dtype="int8")

    plan = plan_of(options, an_accelerator(2 << 30))
    config = config_for(options, an_accelerator(2 << 30))

    assert plan.problem is None
    assert config.cache.num_blocks == plan.cache_blocks
    asked = config_for(replace(options, cache_bytes=plan.largest_cache_bytes), an_accelerator(2 << 30))
    assert asked.cache.num_blocks == plan.cache_blocks


def test_an_accelerator_that_holds_one_sequence_serves_and_with_a_byte_less_it_does_not(models: Path):
    options = options_for(models / "released", mesh=MeshConfig(tensor=2))
    plan = plan_of(options, an_accelerator(PLENTY))
    blocks = options.scheduler.max_model_len // 16
    needed = plan.weight_bytes + sum(plan.temporaries.values()) + (blocks + 1) * plan.block_bytes

    assert config_for(options, an_accelerator(needed)).cache.num_blocks == blocks
    with pytest.raises(DoesNotFitError, match=r"hold 48 tokens, one sequence of the longest context is 64") as refused:
        config_for(options, an_accelerator(needed - 1))

    answer = json.loads(refused.value.plan)
    changes = [each["change"] for each in answer["alternatives"]]
    assert any("--tensor-parallel-size 4" in change for change in changes)
    assert any("int4 weights" in change for change in changes)


def test_a_cache_that_was_asked_for_fits_to_the_byte(models: Path):
    asked = 1 << 20
    options = options_for(models / "released", cache_bytes=asked)
    plan = plan_of(options, an_accelerator(PLENTY), cache_bytes=asked)
    needed = plan.weight_bytes + sum(plan.temporaries.values()) + asked + plan.block_bytes

    assert config_for(options, an_accelerator(needed)).cache.num_blocks == asked // plan.block_bytes
    with pytest.raises(DoesNotFitError, match=r"the KV cache takes 0\.00 GB of each device") as refused:
        config_for(options, an_accelerator(needed - 1))

    smaller = json.loads(refused.value.plan)["alternatives"][0]["change"]
    assert smaller == f"a smaller cache (--kv-cache-memory-bytes {asked - plan.block_bytes})"
    fitting = replace(options, cache_bytes=asked - plan.block_bytes)
    assert config_for(fitting, an_accelerator(needed - 1)).cache.num_blocks == asked // plan.block_bytes - 1


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_host_that_holds_all_its_devices_arrays_serves_and_with_less_it_does_not(models: Path, num_devices: int):
    asked = 1 << 20
    options = options_for(models / "released", mesh=MeshConfig(tensor=num_devices), cache_bytes=asked)
    plan = plan_of(options, a_host(PLENTY, num_sharing=num_devices), cache_bytes=asked)
    assert set(plan.temporaries) == {"slots"}
    needed = num_devices * (plan.weight_bytes + plan.temporaries["slots"] + (plan.cache_blocks + 1) * plan.block_bytes)

    config_for(options, a_host(needed, num_sharing=num_devices))
    with pytest.raises(DoesNotFitError, match=f"the host has .*{'for each of 4 devices' if num_devices > 1 else ''}"):
        config_for(options, a_host(needed - 1, num_sharing=num_devices))


def test_weights_that_a_host_has_no_room_for_as_floats_are_offered_packed(models: Path):
    options = options_for(models / "released", cache_bytes=64 << 10)
    weight_bytes = plan_of(options, a_host(PLENTY)).weight_bytes

    with pytest.raises(DoesNotFitError, match="the weights take") as refused:
        config_for(options, a_host(weight_bytes))

    offered = [each["change"] for each in json.loads(refused.value.plan)["alternatives"]]
    assert offered[0] == "int8 weights kept packed (--cpu-weights packed)"
    config_for(replace(options, cpu_weights="packed"), a_host(weight_bytes))


def test_a_cache_too_small_for_a_sequence_is_no_matter_of_memory(models: Path):
    options = options_for(models / "released", cache_bytes=1000)

    with pytest.raises(ConfigError, match="raise --kv-cache-memory-bytes") as refused:
        config_for(options, a_host(PLENTY))

    assert not isinstance(refused.value, DoesNotFitError)
