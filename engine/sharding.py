"""The device mesh, and the one table from logical axes of arrays to axes of the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.config import MeshConfig, ModelConfig
from engine.errors import ConfigError
from engine.model.params import Axis

MESH_AXES = ("data", "expert", "tensor")

RULES: dict[Axis | None, str | None] = {
    "vocab": None,
    "model": None,
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "expert": "expert",
    "ffn": "tensor",
    None: None,
}


def make_mesh(config: MeshConfig, model: ModelConfig) -> Mesh:
    """A mesh over the first devices. Raises `ConfigError` for too few devices or widths that do not divide."""
    wanted = config.data * config.expert * config.tensor
    devices = jax.devices()
    if wanted > len(devices):
        raise ConfigError(f"the mesh {config.data} x {config.expert} x {config.tensor} wants {wanted} devices, {len(devices)} are here")
    for size, name in ((model.num_kv_heads, "num_kv_heads"), (model.ffn_size, "ffn_size")):
        if size % config.tensor:
            raise ConfigError(f"tensor parallel size {config.tensor} does not divide {name} {size}")
    if model.num_experts % config.expert:
        raise ConfigError(f"expert parallel size {config.expert} does not divide num_experts {model.num_experts}")
    return Mesh(np.array(devices[:wanted]).reshape(config.data, config.expert, config.tensor), MESH_AXES)


def sharding_of(mesh: Mesh, axes: tuple[Axis | None, ...]) -> NamedSharding:
    """Where an array with these logical axes lives."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
