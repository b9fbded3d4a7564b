"""Whole steps compiled from shapes: what is exchanged where, that nothing is allocated, and what becomes of int8 weights on the way."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from forward_harness import engine_config
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from engine.checkpoint.load import param_shapes
from engine.compile_plan import compile_plan, declared_checkpoint
from engine.config import MeshConfig, ModelConfig, SchedulerConfig
from engine.device_step import StepOutput, run_greedy
from engine.footprint import Setup, weights_by_kind
from engine.ops import tiles
from engine.programs import shardings_of, state_shapes, step_layouts
from engine.sharding import make_meshes, on_mesh, replicated

MODEL = ModelConfig(
    vocab_size=64,
    sequence_len=64,
    emb_size=48,
    key_size=16,
    num_q_heads=8,
    num_kv_heads=8,
    num_layers=3,
    num_experts=8,
    num_selected_experts=2,
    ffn_size=2048,
    embedding_multiplier_scale=8.0,
    output_multiplier_scale=0.5,
    attn_output_multiplier=0.25,
    row_parallel_scale_groups=8,
)
SCHEDULER = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)


def a_setup(mesh: MeshConfig, **changes: Any) -> Setup:
    fields = {"model": MODEL, "mesh": mesh, "scheduler": SCHEDULER, "weights": "int8", "kv": "bfloat16", "dtype": "bfloat16", **changes}
    return Setup(**fields)


@pytest.mark.parametrize("mesh", [MeshConfig(tensor=8), MeshConfig(expert=4, tensor=2)], ids=["8 widths", "4 experts x 2 widths"])
def test_a_step_has_two_all_reduces_of_its_activations_in_each_layer_and_no_more(mesh: MeshConfig):
    small, full = compile_plan(a_setup(mesh), cache_blocks=8).steps

    for step, num_tokens in ((small, 16), (full, 32)):
        assert step.num_tokens == num_tokens
        inside = {(each.kind, each.scope): each for each in step.exchanges if each.is_in_layers}
        assert inside.keys() == {("all-reduce", "attention"), ("all-reduce", "moe")}
        for each in inside.values():
            assert (each.count, each.per_layer, each.is_in_loop) == (3, 1, False)
            assert each.num_bytes == num_tokens * MODEL.emb_size * 4
        outside = [(each.kind, each.scope, each.count) for each in step.exchanges if not each.is_in_layers]
        assert outside == [("all-reduce", "embed", 1), ("all-gather", "sample", 1)]


def test_on_one_device_nothing_is_exchanged():
    assert [step.exchanges for step in compile_plan(a_setup(MeshConfig()), cache_blocks=8, num_steps=1).steps] == [[]]


def test_a_steps_arguments_are_what_the_footprint_counts():
    """Weights, cache and slots; beside them only the packed step."""
    setup = a_setup(MeshConfig(tensor=8), kv="int8")

    step = compile_plan(setup, cache_blocks=8, num_steps=1).steps[0]

    cache_bytes = 9 * 16 * 2 * MODEL.num_layers * (MODEL.key_size + 4)
    slot_bytes = SCHEDULER.max_num_seqs * MODEL.vocab_size * 10.125
    counted = sum(each.device_bytes for each in weights_by_kind(setup)) + cache_bytes + slot_bytes
    assert counted <= step.argument_bytes < counted + 4096


def test_compiling_a_step_takes_no_memory_of_its_weights():
    """One layer with 154 GB of them."""
    model = replace(MODEL, emb_size=6144, ffn_size=1 << 20, num_layers=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    (step,) = compile_plan(a_setup(MeshConfig(tensor=8), model=model), cache_blocks=8, num_steps=1).steps

    assert step.argument_bytes * 8 > 150e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # kilobytes


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(tensor=8), MeshConfig(expert=4, tensor=2)], ids=str)
def test_int8_stays_int8_up_to_the_product(mesh: MeshConfig):
    """No scale is ever multiplied into a matrix: the only floats of an expert's size are products' own operands, cast where they are used.

    That an accelerator's compiler reads such a cast into the product shows where that compiler is: `benchmarks/int8_on_gpu.py`.
    """
    stack_size = MODEL.num_experts // mesh.expert * MODEL.emb_size * MODEL.ffn_size // mesh.tensor

    step = greedy_step(mesh).jaxpr
    casts = [(equation, consumers) for equation, consumers in floats(step) if equation.invars[0].aval.dtype == np.int8]
    wide = [equation for equation, _ in floats(step) if equation.outvars[0].aval.size >= stack_size]

    assert len(casts) == 7  # query, key, value, attention_out, gate, up and down, each with all experts of a device
    for equation, consumers in casts:
        assert equation.primitive.name == "convert_element_type"
        assert [consumer.primitive.name for consumer in consumers] == ["dot_general"]
    assert [id(equation) for equation in wide] == [id(equation) for equation, _ in casts if equation.outvars[0].aval.size >= stack_size]
    assert len(wide) == 3


def greedy_step(mesh_config: MeshConfig) -> ClosedJaxpr:
    setup = a_setup(mesh_config)
    config = engine_config(MODEL, mesh=mesh_config, dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=16)
    with tiles.for_accelerators():
        (mesh,) = make_meshes(mesh_config, MODEL)
        params = param_shapes(declared_checkpoint(setup), MODEL, dtype="bfloat16", mesh=mesh, keep_int8=True)
        (layout,) = step_layouts(config)
        state, each = state_shapes(config, mesh), replicated(mesh)
        arguments = (params, state, jax.ShapeDtypeStruct((layout.packed_len,), np.int32, sharding=each))
        results = (shardings_of(state), StepOutput(each, each, None, None))
        step = on_mesh(partial(run_greedy, layout=layout, config=config), mesh, arguments=arguments, results=results)
        return jax.make_jaxpr(step)(*arguments)


def floats(jaxpr: Jaxpr) -> Iterator[tuple[JaxprEqn, list[JaxprEqn]]]:
    """Each equation, however deep, whose result is floats, with those that use it. A layer counts once."""
    seen: set[int] = set()
    open_jaxprs = [jaxpr]
    while open_jaxprs:
        current = open_jaxprs.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for equation in current.eqns:
            inner = [part for value in equation.params.values() for part in jaxprs_in(value)]
            open_jaxprs += inner
            if not inner and equation.invars and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
                yield equation, [other for other in current.eqns if any(variable is equation.outvars[0] for variable in other.invars)]


def jaxprs_in(value: Any) -> list[Jaxpr]:
    if isinstance(value, list | tuple):
        return [part for each in value for part in jaxprs_in(each)]
    value = getattr(value, "jaxpr", value)
    return [value] if isinstance(value, Jaxpr) else []


def test_the_command_compiles_on_as_many_fake_devices_as_the_mesh_has():
    query = {
        "model": MODEL,
        "device": "h100-80",
        "num_devices": 4,
        "scheduler": {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16},
    }

    def ask(**changes: Any) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "engine.compile_plan"]
        process = subprocess.run(command, input=msgspec.json.encode({**query, **changes}), capture_output=True, timeout=120, check=False)
        return process.returncode, json.loads(process.stdout)

    status, answer = ask()
    assert (status, answer["backend"], answer["num_layers"]) == (0, "cpu", 3)
    assert [step["num_tokens"] for step in answer["steps"]] == [16]

    status, answer = ask(num_devices=3)
    assert status == 2
    assert "num_kv_heads 8" in answer["error"]
