"""EngineConfig -> EngineCore: the one start-up function, and the only host file that imports jax.

Checks the files, loads the weights, compiles every program; each phase reports its progress. Raises `EngineError` with one clear line for
whatever a restart would not cure.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.load import load_params
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model.params import each_spec, param_specs
from engine.runner import ModelRunner
from engine.sharding import make_mesh
from engine.types import EngineInfo, Progress


def build_engine(config: EngineConfig, *, report: Callable[[Progress], None]) -> EngineCore:
    """A ready engine. Raises `ConfigError` for a mesh that does not fit, `CheckpointError` for files that do not hold the weights."""
    use_compile_cache(config.compile_cache_dir)
    mesh = make_mesh(config.mesh, config.model)
    start = time.monotonic()
    checkpoint = open_checkpoint(Path(config.model_dir), config.model)
    is_cpu = jax.default_backend() == "cpu"
    params = load_params(checkpoint, config.model, dtype=config.dtype, mesh=mesh, keep_int8=not is_cpu, report=report)
    loaded = time.monotonic()
    runner = ModelRunner(config, params, mesh)
    num_programs = runner.compile(report)
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
        num_programs=num_programs,
        load_s=loaded - start,
        compile_s=time.monotonic() - loaded,
    )
    return EngineCore(config, runner, info)


def use_compile_cache(directory: str | None) -> None:
    """Keep compiled programs on disk, however small or quickly compiled."""
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
