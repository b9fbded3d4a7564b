"""EngineConfig -> EngineCore: the one start-up function, and the only host file that imports jax.

Checks the files, then loads the weights and compiles every program at the same time; each reports its progress. `compile_ahead` does what
can be done before weights and device memory are there, for a process that stands by. Both raise `EngineError` with one clear line for
whatever a restart would not cure.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import Mesh

from engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.load import load_params, param_shapes
from engine.compile_cache import drop_damaged_entries
from engine.config import EngineConfig
from engine.constraints import Grammars
from engine.core import EngineCore
from engine.model.params import Params, each_spec, param_specs
from engine.programs import Programs
from engine.runner import ModelRunner
from engine.sharding import make_meshes
from engine.types import EngineInfo, Progress


def build_engine(
    config: EngineConfig,
    *,
    report: Callable[[Progress], None],
    programs: Programs | None = None,
    grammars: Grammars | None = None,
) -> EngineCore:
    """A ready engine. Raises `ConfigError` for a mesh that does not fit, `CheckpointError` for files that do not hold the weights.

    `programs` that were compiled ahead are used where they fit what is in the files now. Without `grammars`, requests with a grammar are
    refused.
    """
    use_compile_cache(config.compile_cache_dir)
    (mesh,) = make_meshes(config.mesh, config.model)
    start = time.monotonic()
    checkpoint = open_checkpoint(Path(config.model_dir), config.model)
    shapes = _param_shapes(checkpoint, config, mesh)
    threads = ThreadPoolExecutor(1)  # left behind, not waited for, where the weights cannot be loaded
    if programs is None or not programs.fit(config, shapes, mesh):
        programs = Programs(config, shapes, mesh)
        compiling = threads.submit(_compile, programs, config, report)
    else:
        compiling = None
    params = load_params(checkpoint, config.model, dtype=config.dtype, mesh=mesh, keep_int8=_keeps_int8(), report=report)
    load_s = time.monotonic() - start
    compile_s = 0.0 if compiling is None else compiling.result()
    runner = ModelRunner(config, params, mesh, programs)
    info = EngineInfo(
        vocab_size=config.model.vocab_size,
        max_model_len=config.scheduler.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_logprobs=config.max_logprobs,
        block_size=config.cache.block_size,
        num_blocks=config.cache.num_blocks,
        dtype=config.dtype,
        backend=jax.default_backend(),
        num_devices=mesh.size,
        num_params=sum(spec.num_params for spec in each_spec(param_specs(config.model))),
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        num_programs=programs.num_compiled,
        num_cached_programs=programs.num_cached,
        step_s=runner.warm_up(),
        load_s=load_s,
        compile_s=compile_s,
    )
    return EngineCore(config, runner, info, grammars=grammars)


def compile_ahead(config: EngineConfig) -> Programs:
    """The programs of an engine that may be built later. Raises as `build_engine` does."""
    use_compile_cache(config.compile_cache_dir)
    (mesh,) = make_meshes(config.mesh, config.model)
    checkpoint = open_checkpoint(Path(config.model_dir), config.model)
    programs = Programs(config, _param_shapes(checkpoint, config, mesh), mesh)
    _compile(programs, config, lambda progress: None)  # noqa: ARG005
    return programs


def _compile(programs: Programs, config: EngineConfig, report: Callable[[Progress], None]) -> float:
    """Returns how many seconds it took."""
    start = time.monotonic()
    programs.compile(report)
    if config.compile_cache_dir is not None and programs.num_cached < programs.num_compiled:
        drop_damaged_entries(Path(config.compile_cache_dir))
    return time.monotonic() - start


def _param_shapes(checkpoint: Checkpoint, config: EngineConfig, mesh: Mesh) -> Params:
    return param_shapes(checkpoint, config.model, dtype=config.dtype, mesh=mesh, keep_int8=_keeps_int8())


def _keeps_int8() -> bool:
    return jax.default_backend() != "cpu"


def use_compile_cache(directory: str | None) -> None:
    """Keep compiled programs on disk, however small or quickly compiled."""
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
