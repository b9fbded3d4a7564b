"""What an engine does before it loads anything: look how much memory is here, count what it will need, and take the rest for the cache.

The counting is `engine/footprint.py`'s, so that the cache an engine gets is the one that `grok-server plan` tells of for the same memory.
On a CPU, where nothing has a share of the memory of its own, only what is certain counts: weights, cache and slots.
"""

import json
from pathlib import Path

import jax

from engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from engine.config import EngineConfig, EngineOptions
from engine.errors import ConfigError, DoesNotFitError
from engine.footprint import Device, Setup
from engine.host_memory import host_memory_bytes
from engine.plan import Question, as_json, make_plan
from engine.stored_form import as_stored


def config_for(options: EngineOptions, device: Device) -> EngineConfig:
    """The configuration for devices of this kind.

    Raises `DoesNotFitError` where the memory does not suffice, `ConfigError` for widths that do not divide or a cache that holds no whole
    sequence, and `CheckpointError` for files that are no such model.
    """
    backend = "cpu" if device.is_host else "gpu"
    setup = setup_for(options, open_checkpoint(Path(options.model_dir), options.model), backend=backend)
    cache_bytes = options.cache_bytes
    if cache_bytes is None and device.is_host:
        cache_bytes = options.default_cpu_cache_bytes(memory_bytes=device.memory_bytes)
    plan = make_plan(Question(setup=setup, device=device, cache_bytes=cache_bytes))
    if plan.problem is not None:
        raise DoesNotFitError(f"it does not fit: {plan.problem}", plan=json.dumps(as_json(plan)))
    return options.resolve(backend=backend, free_bytes=plan.largest_cache_bytes if cache_bytes is None else cache_bytes)


def device_here(options: EngineOptions) -> Device:
    """What may be used of the devices of this process. Raises `ConfigError` where they do not say it."""
    devices = jax.local_devices()[: options.mesh.data * options.mesh.expert * options.mesh.tensor]
    if jax.default_backend() == "cpu":
        return Device(name="cpu", memory_bytes=host_memory_bytes(), is_host=True, num_sharing=len(devices))
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    if not min(limits):
        raise ConfigError(f"the devices ({devices[0].device_kind}) do not say how much memory they have")
    return Device(name=devices[0].device_kind, memory_bytes=min(limits))


def setup_for(options: EngineOptions, checkpoint: Checkpoint, *, backend: str) -> Setup:
    """What will be on the devices, in the forms that it will have there."""
    setup = Setup(
        model=options.model,
        mesh=options.mesh,
        scheduler=options.scheduler,
        weights=options.dtype_on(backend),
        kv=options.kv_dtype_on(backend),
        dtype=options.dtype_on(backend),
        block_size=options.block_size,
    )
    return as_stored(setup, checkpoint) if backend != "cpu" or options.cpu_weights == "packed" else setup
