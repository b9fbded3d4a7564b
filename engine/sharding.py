"""The device mesh, the one table from logical axes of arrays to axes of the mesh, and how a function runs on all of its devices.

Each data shard is a replica with a mesh, weights and a cache of its own, so no program knows of the others. Inside a replica the devices
form a grid: whole experts along `expert`, slices of every expert's width along `tensor`; heads and vocabulary are shared by all of them.

Programs say themselves where devices talk to each other: what is under `on_mesh` sees one device's share of every array, and the functions
at the end of this file are all the communication there is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.config import MeshConfig, ModelConfig
from engine.errors import ConfigError
from engine.model.params import Axis
from engine.shapes import Array, Int32

MESH_AXES = ("expert", "tensor")

RULES: dict[Axis | None, tuple[str, ...]] = {
    "vocab": MESH_AXES,
    "model": (),
    "q_heads": MESH_AXES,
    "kv_heads": MESH_AXES,
    "expert": ("expert",),
    "ffn": ("tensor",),
    None: (),
}


def make_meshes(config: MeshConfig, model: ModelConfig) -> tuple[Mesh, ...]:
    """One mesh for each data shard, over the first devices of each process, the same number of each for each shard.

    Raises `ConfigError` for too few devices, or widths or processes that do not divide.
    """
    check_widths(config, model)
    devices = jax.devices()
    wanted = config.data * config.expert * config.tensor
    if wanted > len(devices):
        raise ConfigError(f"the mesh {config.data} x {config.expert} x {config.tensor} wants {wanted} devices, {len(devices)} are here")
    num_processes = jax.process_count()
    share, rest = divmod(config.expert * config.tensor, num_processes)
    if rest:
        raise ConfigError(
            f"{config.expert * config.tensor} devices of one replica cannot be shared evenly by {num_processes} processes: choose another "
            "number of processes, or run a server on each machine behind a router"
        )
    by_process = [[device for device in devices if device.process_index == index] for index in range(num_processes)]
    if min(map(len, by_process)) < config.data * share:
        raise ConfigError(f"{config.data * share} devices of each process are wanted, one has {min(map(len, by_process))}")
    grids = np.array([own[: config.data * share] for own in by_process])  # [processes, data shards * share]
    grids = grids.reshape(num_processes, config.data, share).swapaxes(0, 1).reshape(config.data, config.expert, config.tensor)
    return tuple(Mesh(grid, MESH_AXES) for grid in grids)


def check_widths(config: MeshConfig, model: ModelConfig) -> None:
    """Raises `ConfigError` where an axis of the model cannot be shared evenly; kv heads may be held by several devices instead."""
    size = config.expert * config.tensor
    if model.num_experts % config.expert:
        raise ConfigError(f"expert parallel size {config.expert} does not divide num_experts {model.num_experts}")
    if model.num_kv_heads % size and size % model.num_kv_heads:
        raise ConfigError(f"tensor parallel size {size} neither divides num_kv_heads {model.num_kv_heads} nor is a multiple of it")
    shared = (("num_q_heads", model.num_q_heads, size), ("vocab_size", model.vocab_size, size), ("ffn_size", model.ffn_size, config.tensor))
    for name, width, num_devices in shared:
        if width % num_devices:
            raise ConfigError(f"tensor parallel size {num_devices} does not divide {name} {width}")


def num_cached_heads(model: ModelConfig, num_devices: int) -> int:
    """Heads of the KV cache over all devices of a replica: where there are more devices than kv heads, several hold the same one."""
    return max(model.num_kv_heads, num_devices)


def sharding_of(mesh: Mesh, axes: tuple[Axis | None, ...]) -> NamedSharding:
    """Where an array with these logical axes lives."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] or None for axis in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def on_mesh(function: Callable[..., Any], mesh: Mesh, *, arguments: Any, results: Any) -> Callable[..., Any]:
    """`function` on every device, each with its share of the arguments; the results are put together from the devices' shares.

    `arguments` is a tuple of trees of arrays or shapes with shardings, `results` a tree of shardings, or one for all. What is replicated
    in the results every device must compute alike.
    """
    in_specs = jax.tree.map(lambda leaf: _spec(leaf.sharding), arguments)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=jax.tree.map(_spec, results), check_vma=False)


def _spec(sharding: Any) -> PartitionSpec:
    """An array without a mesh lies whole on the only device."""
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def sum_over_devices(x: Array) -> Array:
    """The sum of all devices' arrays, on each of them: one all-reduce."""
    return x if jax.lax.axis_size(MESH_AXES) == 1 else jax.lax.psum(x, MESH_AXES)


def concatenate_over_devices(x: Array) -> Array:
    """All devices' arrays behind each other along the last axis, on each of them: one all-gather."""
    return x if jax.lax.axis_size(MESH_AXES) == 1 else jax.lax.all_gather(x, MESH_AXES, axis=x.ndim - 1, tiled=True)


def first_own(axis: Axis, num_own: int) -> Int32[Array, ""]:
    """Index of the first entry of a sharded logical axis that this device holds, of which it holds `num_own`."""
    return jnp.int32(jax.lax.axis_index(RULES[axis]) * num_own)
