"""The forms of the KV cache: what they round, what they take, and that no program ever widens a whole cache."""

import re
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from forward_harness import ForwardHarness, engine_config, small_model
from numpy.typing import NDArray

from engine.config import CacheConfig, DType, EngineConfig, KVDType, MeshConfig, kv_bytes_per_token
from engine.footprint import Setup
from engine.footprint import kv_bytes_per_token as planned_bytes_per_token
from engine.model.cache import CacheArray, cache_shapes, read_blocks, write_cache
from engine.model.params import random_params
from engine.programs import Programs, shapes_of
from engine.runner import empty_state
from engine.sharding import make_meshes, replicated

KV_DTYPES: tuple[KVDType, ...] = ("float32", "bfloat16", "int8", "fp8")
EIGHT_BITS: tuple[KVDType, ...] = ("int8", "fp8")
MODEL = small_model()
NUM_BLOCKS, BLOCK_SIZE = 8, 4


def config_with(dtype: KVDType, **changes: object) -> EngineConfig:
    config = engine_config(MODEL, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=32)
    return replace(config, cache=replace(config.cache, dtype=dtype), **changes)


def empty_array(dtype: KVDType) -> CacheArray:
    """Keys of one layer."""
    mesh = make_meshes(MeshConfig(), MODEL)[0]
    shapes = cache_shapes(config_with(dtype), num_heads=MODEL.num_kv_heads, place=lambda _: replicated(mesh))
    return jax.tree.map(lambda field: jnp.zeros(field.shape, field.dtype), shapes[0].keys)


def read_back(dtype: KVDType, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of the second block, after they went through the cache."""
    slots = jnp.arange(BLOCK_SIZE, 2 * BLOCK_SIZE, dtype=jnp.int32)
    numbers, scales = read_blocks(
        write_cache(empty_array(dtype), jnp.asarray(rows), slots), jnp.asarray([1], jnp.int32), jnp.dtype("float32")
    )
    return np.asarray(numbers if scales is None else numbers * scales[..., None])


def draw_rows(seed: int) -> NDArray[np.float32]:
    """A block of tokens whose heads differ in size by orders of magnitude."""
    random = np.random.default_rng(seed)
    shape = (BLOCK_SIZE, MODEL.num_kv_heads, MODEL.key_size)
    return (random.standard_normal(shape) * 10.0 ** random.integers(-6, 6, (*shape[:2], 1))).astype(np.float32)


# What is kept of a number


def test_float32_is_kept_as_it_is_and_bfloat16_is_rounded_once():
    rows = draw_rows(1)

    np.testing.assert_array_equal(read_back("float32", rows), rows)
    np.testing.assert_array_equal(read_back("bfloat16", rows), rows.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_int8_is_within_half_of_a_127th_of_the_heads_largest_value():
    rows = draw_rows(2)
    largest = np.abs(rows).max(axis=-1, keepdims=True)

    error = np.abs(read_back("int8", rows) - rows)

    assert np.all(error <= 0.5001 * largest / 127)
    assert np.sqrt(np.square(error / largest).mean()) > 0.1 / 127  # it is 8 bits indeed


def test_fp8_is_within_a_sixteenth_of_every_value_that_is_not_tiny_beside_the_heads_largest():
    rows = draw_rows(3)
    largest = np.abs(rows).max(axis=-1, keepdims=True)

    error = np.abs(read_back("fp8", rows) - rows)

    assert np.all(error <= np.maximum(np.abs(rows) / 16, largest / 448 / 2**9) * 1.0001)
    assert np.sqrt(np.square(error / np.abs(rows)).mean()) > 0.01


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_the_largest_value_of_a_head_comes_back_to_a_rounding_of_float32_and_zeros_stay_zeros(dtype: KVDType):
    rows = draw_rows(4)
    rows[0, 0] = 0
    rows[1, 1] = 1e-38

    found = read_back(dtype, rows)

    np.testing.assert_array_equal(found[0, 0], 0)
    np.testing.assert_allclose(found[1, 1], 0, atol=1e-30)
    np.testing.assert_allclose(np.abs(found[2:]).max(axis=-1), np.abs(rows[2:]).max(axis=-1), rtol=1e-6)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_number_that_is_none_stays_none_and_takes_only_its_own_head_along(dtype: KVDType):
    rows = draw_rows(5)
    rows[2, 1, 3] = np.nan

    found = read_back(dtype, rows)

    assert not np.isfinite(found[2, 1]).all()
    assert np.isfinite(np.delete(found.reshape(-1, MODEL.key_size), 2 * MODEL.num_kv_heads + 1, axis=0)).all()


# What it takes


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_the_arrays_are_as_large_as_the_configuration_and_the_plan_count_them(dtype: KVDType, tensor: int):
    model = replace(MODEL, num_q_heads=8, num_kv_heads=4, vocab_size=64)
    config = replace(config_with(dtype), model=model, mesh=MeshConfig(tensor=tensor))
    (mesh,) = make_meshes(config.mesh, model)

    cache = empty_state(config, mesh).cache

    tokens = (NUM_BLOCKS + 1) * BLOCK_SIZE
    assert sum(array.nbytes for array in jax.tree.leaves(cache)) == tokens * kv_bytes_per_token(model, dtype)
    setup = Setup(model=model, mesh=config.mesh, scheduler=config.scheduler, weights="int8", kv=dtype, dtype="float32")
    for device in mesh.devices.flat:
        own = (shard.data.nbytes for array in jax.tree.leaves(cache) for shard in array.addressable_shards if shard.device == device)
        assert sum(own) == tokens * planned_bytes_per_token(setup)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_no_step_makes_another_array_as_large_as_a_layers_keys(dtype: KVDType, compute: DType):
    cache = CacheConfig(block_size=16, num_blocks=4000, dtype=dtype)
    config = replace(config_with(dtype), cache=cache, dtype=compute)
    (mesh,) = make_meshes(config.mesh, MODEL)
    programs = Programs(config, shapes_of(random_params(MODEL, seed=1, dtype=compute)), mesh)

    programs.compile_greedy(programs.layouts[0])

    (program,) = programs.greedy_steps.values()
    memory = program.memory_analysis()
    one_array = 4001 * 16 * MODEL.num_kv_heads * MODEL.key_size
    assert memory.alias_size_in_bytes >= 4001 * 16 * kv_bytes_per_token(MODEL, dtype)  # all of it is changed in place
    assert memory.temp_size_in_bytes < one_array
    arrays = re.findall(r"(\w+)\[([\d,]+)\]", program.as_text())
    names = {name for name, shape in arrays if prod(int(size) for size in shape.split(",")) == one_array}
    assert names == {{"float32": "f32", "bfloat16": "u16", "int8": "s8", "fp8": "u8"}[dtype]}


# The whole forward pass


ALL_EXPERTS = replace(MODEL, num_selected_experts=MODEL.num_experts)  # so that no rounding changes which ones are chosen
PROMPTS = [np.random.default_rng(seed).integers(0, MODEL.vocab_size, length).tolist() for seed, length in enumerate((30, 7, 19))]


def logits_with(dtype: KVDType, *, tensor: int = 1) -> NDArray[np.float32]:
    cache = CacheConfig(block_size=4, num_blocks=40, dtype=dtype)
    config = replace(config_with(dtype), model=ALL_EXPERTS, cache=cache, mesh=MeshConfig(tensor=tensor))
    params = random_params(ALL_EXPERTS, seed=3, dtype="float32")
    return np.concatenate(ForwardHarness(config, params).run([(prompt, [len(prompt)]) for prompt in PROMPTS]))


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 0.05), ("int8", 0.1), ("fp8", 0.4)])
def test_logits_are_near_those_of_a_float32_cache_but_not_the_same(dtype: KVDType, largest: float):
    exact = logits_with("float32")

    found = logits_with(dtype)

    error = np.abs(found - exact).max() / exact.std()
    assert largest / 50 < error < largest
