"""EngineConfig -> an engine: the one start-up function, and the only host file that imports jax.

Checks the files, then loads the weights and compiles every program at the same time; each reports its progress. With several data shards
the files are read for the first one, whose devices hand the weights on to the others'. `compile_ahead` does what can be done before
weights and device memory are there, for a process that stands by. All raise `EngineError` with one clear line for whatever a restart
would not cure.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh, NamedSharding

from engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.load import load_params, param_shapes
from engine.compile_cache import drop_damaged_entries
from engine.config import EngineConfig
from engine.constraints import Grammars
from engine.core import EngineCore, WarmRunner
from engine.model.params import Params, each_spec, param_specs
from engine.programs import Programs
from engine.replicas import Replicas
from engine.runner import ModelRunner
from engine.sharding import make_meshes
from engine.types import EngineInfo, Progress


class Leader(Protocol):
    """What this process is to the others of its group; `engine/group/leader.py` has the real one."""

    def wait_until_built(self) -> None:
        """Until they have built what this one has, and wait for calls."""
        ...

    def lead(self, runner: WarmRunner, *, replica: int) -> WarmRunner:
        """The same runner, with every call made by the others, too."""
        ...


def build_engine(
    config: EngineConfig,
    *,
    report: Callable[[Progress], None],
    programs: tuple[Programs, ...] | None = None,
    grammars: Grammars | None = None,
    group: Leader | None = None,
) -> EngineCore | Replicas:
    """A ready engine. Raises `ConfigError` for a mesh that does not fit, `CheckpointError` for files that do not hold the weights.

    `programs` that were compiled ahead are used where they fit what is in the files now. Without `grammars`, requests with a grammar are
    refused. With a `group`, the meshes span the devices of all its processes.
    """
    built = build_runners(config, report=report, programs=programs)
    if group is not None:
        group.wait_until_built()
    cores: list[EngineCore] = []
    for replica, (runner, own_programs) in enumerate(zip(built.runners, built.programs, strict=True)):
        driven = runner if group is None else group.lead(runner, replica=replica)
        info = _info(runner, own_programs, step_s=driven.warm_up(), load_s=built.load_s, compile_s=built.compile_s)
        cores.append(EngineCore(config, driven, info, grammars=grammars.twin() if grammars and cores else grammars))
    return cores[0] if len(cores) == 1 else Replicas(cores)


def compile_ahead(config: EngineConfig) -> tuple[Programs, ...]:
    """The programs of an engine that may be built later. Raises as `build_engine` does."""
    use_compile_cache(config.compile_cache_dir)
    checkpoint = open_checkpoint(Path(config.model_dir), config.model)
    meshes = make_meshes(config.mesh, config.model)
    programs = tuple(Programs(config, _param_shapes(checkpoint, config, mesh), mesh) for mesh in meshes)
    _compile(programs, config, lambda progress: None)  # noqa: ARG005
    return programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The device side of an engine: what each data shard runs, and how long the start took."""

    runners: tuple[ModelRunner, ...]
    programs: tuple[Programs, ...]
    load_s: float
    compile_s: float


def build_runners(config: EngineConfig, *, report: Callable[[Progress], None], programs: tuple[Programs, ...] | None = None) -> Built:
    """Weights and programs on all devices. Raises as `build_engine` does."""
    use_compile_cache(config.compile_cache_dir)
    meshes = make_meshes(config.mesh, config.model)
    start = time.monotonic()
    checkpoint = open_checkpoint(Path(config.model_dir), config.model)
    shapes = [_param_shapes(checkpoint, config, mesh) for mesh in meshes]
    threads = ThreadPoolExecutor(1)  # left behind, not waited for, where the weights cannot be loaded
    if programs is None or not all(each.fit(config, shape, mesh) for each, shape, mesh in zip(programs, shapes, meshes, strict=False)):
        programs = tuple(Programs(config, shape, mesh) for shape, mesh in zip(shapes, meshes, strict=True))
        compiling = threads.submit(_compile, programs, config, report)
    else:
        compiling = None
    params = [load_params(checkpoint, config.model, dtype=config.dtype, mesh=meshes[0], keep_int8=_keeps_packed(config), report=report)]
    params += [copy_params(params[0], meshes[0], to=mesh) for mesh in meshes[1:]]
    load_s = time.monotonic() - start
    compile_s = 0.0 if compiling is None else compiling.result()
    runners = tuple(ModelRunner(config, *each) for each in zip(params, meshes, programs, strict=True))
    return Built(runners=runners, programs=programs, load_s=load_s, compile_s=compile_s)


def copy_params(params: Params, mesh: Mesh, *, to: Mesh) -> Params:
    """The same weights on another mesh of the same shape, from device to device: each gets what the one in its place has."""
    partners = dict(zip(mesh.devices.flat, to.devices.flat, strict=True))

    def copy(array: jax.Array) -> jax.Array:
        shards = [jax.device_put(shard.data, partners[shard.device]) for shard in array.addressable_shards]
        assert isinstance(array.sharding, NamedSharding), "weights are placed by their axes"
        return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(to, array.sharding.spec), shards)

    return jax.block_until_ready(jax.tree.map(copy, params))


def _info(runner: ModelRunner, programs: Programs, *, step_s: float, load_s: float, compile_s: float) -> EngineInfo:
    """Of one data shard."""
    config = runner.config
    return EngineInfo(
        vocab_size=config.model.vocab_size,
        max_model_len=config.scheduler.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_logprobs=config.max_logprobs,
        block_size=config.cache.block_size,
        num_blocks=config.cache.num_blocks,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        backend=jax.default_backend(),
        num_devices=runner.mesh.size,
        num_params=sum(spec.num_params for spec in each_spec(param_specs(config.model))),
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(runner.params)),
        num_programs=programs.num_compiled,
        num_cached_programs=programs.num_cached,
        step_s=step_s,
        load_s=load_s,
        compile_s=compile_s,
    )


def _compile(programs: tuple[Programs, ...], config: EngineConfig, report: Callable[[Progress], None]) -> float:
    """Compile one data shard's after the other's: these may find theirs in the cache then. Returns how many seconds it took."""
    start = time.monotonic()
    for index, each in enumerate(programs):
        each.compile(partial(_report_part, report, index, len(programs)))
    if config.compile_cache_dir is not None and any(each.num_cached < each.num_compiled for each in programs):
        drop_damaged_entries(Path(config.compile_cache_dir))
    return time.monotonic() - start


def _report_part(report: Callable[[Progress], None], index: int, num_parts: int, progress: Progress) -> None:
    """Of a part that begins when those before it are done."""
    report(replace(progress, done=index * progress.total + progress.done, total=num_parts * progress.total))


def _param_shapes(checkpoint: Checkpoint, config: EngineConfig, mesh: Mesh) -> Params:
    return param_shapes(checkpoint, config.model, dtype=config.dtype, mesh=mesh, keep_int8=_keeps_packed(config))


def _keeps_packed(config: EngineConfig) -> bool:
    return jax.default_backend() != "cpu" or config.cpu_weights == "packed"


def use_compile_cache(directory: str | None) -> None:
    """Keep compiled programs on disk, however small or quickly compiled."""
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
