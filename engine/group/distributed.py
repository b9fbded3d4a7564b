"""The runtimes of a group's processes as one: `jax.distributed`, and what has to hold for it.

On a CPU they talk by gloo, over the address to which each machine's own name resolves; on GPUs by NCCL. Both find ports of their own.
Used by `engine/group/start.py`, which has the group's connection beside it: the runtime's own watch takes minutes to notice a death.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax._src import distributed as runtime

from engine.config import GroupConfig
from engine.errors import ConfigError

JOIN_TIMEOUT_S = 120


def join(group: GroupConfig, *, process_id: int, coordinator: str) -> None:
    """Meet the other processes at `coordinator`, which process 0 serves. Raises `ConfigError` for GPUs that cannot be shared."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if _num_gpus():  # each tunes for itself: for the share of one that finds its program in its cache the others would wait in vain
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_shard_autotuning=false".lstrip()
    jax.distributed.initialize(
        coordinator,
        group.num_processes,
        process_id,
        local_device_ids=_local_device_ids(group, process_id),
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_TIMEOUT_S,
        coordinator_bind_address=coordinator,
    )
    jax.devices()  # all look for theirs at the same time
    # jax writes its compilation cache in process 0 alone, yet what one process compiled for a CPU serves no other: see `own_cache_dir`.
    runtime.global_state.process_id = 0


def own_cache_dir(directory: str | None, group: GroupConfig, *, process_id: int) -> str | None:
    """Where a process of a group keeps its compiled programs: those of another have the same names and run elsewhere."""
    return None if directory is None else str(Path(directory) / f"process-{process_id}-of-{group.num_processes}")


def _local_device_ids(group: GroupConfig, process_id: int) -> Sequence[int] | None:
    """This process's share of the machine's GPUs, counted among the visible ones; None where it has all, or they are no GPUs."""
    num_gpus = _num_gpus()
    if group.processes_per_node == 1 or num_gpus == 0:
        return None
    if num_gpus % group.processes_per_node:
        raise ConfigError(f"{group.processes_per_node} processes cannot share the {num_gpus} GPUs of this machine evenly")
    share = num_gpus // group.processes_per_node
    first = process_id % group.processes_per_node * share
    return range(first, first + share)


def _num_gpus() -> int:
    """Of NVIDIA, that this machine lets processes see; jax would take them all if it were asked."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(list(Path("/dev").glob("nvidia[0-9]*")) if visible is None else [name for name in visible.split(",") if name])
