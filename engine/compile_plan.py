"""`python -m engine.compile_plan`: the whole decode step for a mesh, compiled from shapes alone.

`grok-server plan --compile` runs it with the question that `engine/plan_query.py` answers, too. There are no weights and no files: the
programs are traced in the form that accelerators get, with the weights as they are kept there. Where the compiler of the planned devices is
installed (`engine/target.py`) it compiles for these, else XLA for as many fake devices on the CPU. What the programs themselves say holds
for every backend: where devices talk, how often and of how many bytes. What is the compiler's choice, temporaries and collectives that it
adds or joins, holds for the one that compiled.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import msgspec
import numpy as np
from jax.sharding import Mesh

from engine.batch import StepLayout
from engine.checkpoint.load import param_shapes
from engine.checkpoint.store import arrays_of
from engine.checkpoint.tensors import ITEM_BYTES, Checkpoint, FileArray, HostArray, HostTensor, StoredArray, StoredDType
from engine.config import CacheConfig, EngineConfig, MeshConfig, blocks_per_sequence
from engine.errors import EngineError
from engine.footprint import Setup, num_scale_groups
from engine.hlo import Collective, collectives
from engine.model.params import ParamSpec, each_spec, param_specs
from engine.ops import tiles
from engine.plan import make_plan
from engine.plan_query import read_question
from engine.programs import Programs
from engine.sharding import MESH_AXES, make_meshes
from engine.target import devices_to_compile_for, forbid_timing

LAYER_SCOPE = "jit(decoder_layer)"
SCOPES = ("embed", "attention", "moe", "sample")  # as `engine/model/transformer.py` and `engine/device_step.py` name them
_DEVICE_COUNT = "--xla_force_host_platform_device_count"
_NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Collectives of one kind at one place in the program."""

    kind: str
    scope: str  # "embed", "attention", "moe", "sample"; empty for what the compiler has added
    is_in_layers: bool
    count: int  # in the whole program
    per_layer: float | None  # None outside of the layers
    num_bytes: int  # of one result, on one device; the largest
    is_in_loop: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """One compiled bucket. Bytes are those of one device, as the backend's compiler has laid them out."""

    num_tokens: int
    num_seqs: int
    seconds: float  # to trace and compile
    exchanges: list[Exchange]
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int  # beside what is written in place


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPlan:
    """All that was compiled."""

    backend: str  # for which XLA compiled, the planned device or "cpu"; the programs are an accelerator's in any case
    num_layers: int
    steps: list[CompiledStep]


def compile_plan(setup: Setup, *, cache_blocks: int, target: Sequence[Any] | None = None, num_steps: int = 2) -> CompiledPlan:
    """Compile the greedy step of the smallest bucket, and of the largest, for the `target` devices or as many on the CPU.

    Raises `ConfigError` for widths that do not divide.
    """
    steps: list[CompiledStep] = []
    for layout, program, seconds in compiled_steps(setup, cache_blocks=cache_blocks, target=target, num_steps=num_steps):
        memory = program.memory_analysis()
        steps.append(
            CompiledStep(
                num_tokens=layout.num_tokens,
                num_seqs=layout.num_seqs,
                seconds=round(seconds, 1),
                exchanges=exchanges(collectives(program.as_text()), num_layers=setup.model.num_layers),
                argument_bytes=memory.argument_size_in_bytes,
                temporary_bytes=memory.temp_size_in_bytes,
                output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            )
        )
    return CompiledPlan(backend="cpu" if target is None else target[0].device_kind, num_layers=setup.model.num_layers, steps=steps)


def compiled_steps(
    setup: Setup, *, cache_blocks: int, target: Sequence[Any] | None, num_steps: int
) -> Iterator[tuple[StepLayout, Any, float]]:
    """Buckets with their compiled programs, and how many seconds each took."""
    replica = MeshConfig(expert=setup.mesh.expert, tensor=setup.mesh.tensor)
    config = EngineConfig(
        model=setup.model,
        model_dir="",
        dtype=setup.dtype,
        mesh=replica,
        cache=CacheConfig(block_size=setup.block_size, num_blocks=cache_blocks, dtype=setup.kv),
        scheduler=setup.scheduler,
    )
    if target is None:
        (mesh,) = make_meshes(replica, setup.model)
    else:
        mesh = Mesh(np.array(target).reshape(replica.expert, replica.tensor), MESH_AXES)
    params = param_shapes(declared_checkpoint(setup), setup.model, dtype=setup.dtype, mesh=mesh, keep_int8=True)
    with tiles.for_accelerators():
        programs = Programs(config, params, mesh)
        for layout in sorted({programs.layouts[0], programs.layouts[-1]}, key=lambda layout: layout.num_tokens)[:num_steps]:
            start = time.monotonic()
            programs.compile_greedy(layout)
            yield layout, programs.greedy_steps[layout], time.monotonic() - start


def exchanges(found: list[Collective], *, num_layers: int) -> list[Exchange]:
    """Collectives of the same kind and place together, in the order of their first."""
    groups: dict[tuple[str, str, bool], list[Collective]] = {}
    for one in found:
        is_in_layers = LAYER_SCOPE in one.scopes
        inner = one.scopes[one.scopes.index(LAYER_SCOPE) + 1 :] if is_in_layers else one.scopes
        scope = next((name for name in inner if name in SCOPES), "")
        groups.setdefault((one.kind, scope, is_in_layers), []).append(one)
    return [
        Exchange(
            kind=kind,
            scope=scope,
            is_in_layers=is_in_layers,
            count=len(group),
            per_layer=len(group) / num_layers if is_in_layers else None,
            num_bytes=max(one.num_bytes for one in group),
            is_in_loop=any(one.is_in_loop for one in group),
        )
        for (kind, scope, is_in_layers), group in groups.items()
    ]


def declared_checkpoint(setup: Setup) -> Checkpoint:
    """A checkpoint as the model's declaration has it: shapes and types, no files and no numbers."""

    def tensor_of(spec: ParamSpec) -> HostTensor:
        form = setup.weights if spec.is_quantized else "float32"
        arrays = {
            name: _Declared(dtype=dtype, shape=shape)
            for name, (dtype, shape) in arrays_of(spec, form, num_scale_groups(spec, setup)).items()
        }
        return HostTensor(spec=spec, form=form, weight_source=arrays["weight"], scales_source=arrays.get("scales"))

    specs = param_specs(setup.model)
    return Checkpoint(format="store", directory=Path(), tensors={spec.name: tensor_of(spec) for spec in each_spec(specs)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Declared:
    """An array without numbers, which can be opened and then has none but zeros, of which there is one in memory."""

    dtype: StoredDType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def regions(self) -> tuple[FileArray, ...]:
        return (FileArray(path=Path("declared"), file_size=0, stored=StoredArray(dtype=self.dtype, shape=self.shape, offset=0)),)

    def open(self) -> HostArray:
        return np.broadcast_to(np.zeros((), _NUMPY[self.dtype]), self.shape)


def main() -> int:
    """Standard input to standard output, as `engine/plan_query.py` does it."""
    try:
        question = read_question(sys.stdin.buffer.read())
        setup = question.setup
        blocks = max(make_plan(question).cache_blocks, blocks_per_sequence(setup.scheduler, setup.block_size))
        pretend(setup.shard_size)
        forbid_timing()
        target = devices_to_compile_for(question.device, setup.shard_size)
        compiled = compile_plan(setup, cache_blocks=blocks, target=target)
    except (EngineError, msgspec.DecodeError) as error:
        print(json.dumps({"error": str(error)}))
        return 2
    print(json.dumps(asdict(compiled)))
    return 0


def pretend(count: int) -> None:
    """Have as many fake devices on the CPU, and leave accelerators alone. Before anything else asks jax for devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICE_COUNT)]
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{_DEVICE_COUNT}={count}"])
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    sys.exit(main())
