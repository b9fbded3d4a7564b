"""From the settings to what the engine process is told: the model's own configuration is read here, and what depends on it checked."""

import os
from dataclasses import replace
from pathlib import Path

from engine.config import EngineOptions, GroupConfig, ModelConfig, SchedulerConfig, mesh_of, read_model_config
from engine.errors import ConfigError
from server.settings import Settings

GROUP_SHARE = 0.9  # of the time for a start without progress, that the processes of a group get to meet: then one says who is missing


def engine_options(settings: Settings, model: ModelConfig | None = None) -> EngineOptions:
    """What the engine process is told; `model` is read from the model directory where it is not given.

    Raises `ConfigError` for sizes that contradict the model.
    """
    model = read_model_config(settings.model_dir) if model is None else model
    max_model_len = model.sequence_len if settings.max_model_len is None else settings.max_model_len
    if max_model_len > model.sequence_len:
        raise ConfigError(f"--max-model-len: the model was made for {model.sequence_len:,} tokens, found {max_model_len:,}")
    compile_cache_dir = _writable_cache_dir(settings.compile_cache_dir)
    return EngineOptions(
        model=model,
        model_dir=str(settings.model_dir),
        dtype=settings.dtype,
        mesh=mesh_of(
            model,
            num_devices=settings.tensor_parallel_size,
            data=settings.data_parallel_size,
            is_expert_parallel=settings.enable_expert_parallel,
        ),
        block_size=settings.block_size,
        kv_dtype=settings.kv_cache_dtype,
        cpu_weights=settings.cpu_weights,
        cache_bytes=None if settings.kv_cache_memory_bytes is None else int(settings.kv_cache_memory_bytes),
        memory_share=settings.gpu_memory_utilization,
        scheduler=SchedulerConfig(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=max_model_len,
        ),
        max_logprobs=settings.max_logprobs,
        compile_cache_dir=None if compile_cache_dir is None else str(compile_cache_dir),
        group=_group(settings),
    )


def _group(settings: Settings) -> GroupConfig | None:
    """The engine processes that work together, if there are several. Raises `ConfigError` for a node that cannot be one of them."""
    if settings.node_rank >= settings.nnodes:
        raise ConfigError(f"--node-rank: of {settings.nnodes} nodes the last has rank {settings.nnodes - 1}, found {settings.node_rank}")
    if settings.nnodes > 1 and settings.master_addr is None:
        raise ConfigError("--master-addr: several nodes need the address of the one with rank 0")
    if settings.nnodes * settings.processes_per_node == 1:
        return None
    group = GroupConfig(
        num_nodes=settings.nnodes,
        processes_per_node=settings.processes_per_node,
        start_timeout_s=GROUP_SHARE * settings.engine_start_timeout,
    )
    return group if settings.master_addr is None else replace(group, host=settings.master_addr, port=settings.master_port)


def _writable_cache_dir(chosen: Path | None) -> Path | None:
    """The directory, made where it is missing. None where the default one cannot be had: only the next start is slower then."""
    try:
        cache_dir = chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grok-server" / "compiled"
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        if chosen is not None:
            raise ConfigError(f"--compile-cache-dir: {error}") from None
        return None
    return cache_dir if os.access(cache_dir, os.W_OK) else None
