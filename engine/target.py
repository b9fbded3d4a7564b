"""Devices of a kind that need not be here, to compile for: XLA's CUDA compiler asks for a description of the chip, not for the chip.

Where the CUDA plugin of jax is installed (a GPU machine has it, any Linux machine can), a mesh of such devices takes everything but arrays.
The numbers are those of CUDA's own tables for the chips that `grok-server plan` knows.
"""

import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from engine.footprint import Device

NO_TIMING = "--xla_gpu_autotune_level=0"  # nothing can be tried out on a device that is not here


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What the compiler decides by."""

    compute_capability: tuple[int, int]
    num_cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_cache_bytes: int
    core_memory_bytes: int  # shared memory of one core


_H100 = Chip(compute_capability=(9, 0), num_cores=132, clock_ghz=1.98, l2_cache_bytes=50 << 20, core_memory_bytes=228 << 10)
CHIPS = {
    "a100-80": Chip(compute_capability=(8, 0), num_cores=108, clock_ghz=1.41, l2_cache_bytes=40 << 20, core_memory_bytes=164 << 10),
    "h100-80": _H100,
    "h200": _H100,
    "b200": Chip(compute_capability=(10, 0), num_cores=148, clock_ghz=1.96, l2_cache_bytes=126 << 20, core_memory_bytes=228 << 10),
}


def devices_to_compile_for(device: Device, count: int) -> list[Any] | None:
    """As many devices of this kind; None where their compiler is not installed."""
    chip = CHIPS.get(device.name)
    if chip is None:
        return None
    jax.devices()  # finds the plugins
    try:
        topology = topologies.get_topology_desc("", "cuda", target_config=_description(device, chip), topology=f"1x1x{count}")
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return list(topology.devices)


def forbid_timing() -> None:
    """Before anything else asks jax for devices."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_TIMING}".strip()


def _description(device: Device, chip: Chip) -> str:
    """In the text form of XLA's `GpuTargetConfigProto`."""
    major, minor = chip.compute_capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {chip.core_memory_bytes}
          shared_memory_per_block_optin: {chip.core_memory_bytes - 1024}
          threads_per_core_limit: 2048
          core_count: {chip.num_cores}
          fpus_per_core: {64 if major == 8 else 128}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {int(device.bytes_per_s or 0)}
          l2_cache_size: {chip.l2_cache_bytes}
          clock_rate_ghz: {chip.clock_ghz}
          device_memory_size: {device.memory_bytes}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{device.name}"
    """
