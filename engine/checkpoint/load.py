"""Checked files -> weights on the devices, each process reading only the slices that its devices need.

On the CPU int8 matrices are turned into the compute dtype once, here: XLA would convert them again in every step. Elsewhere they stay int8
beside their scales.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from engine.checkpoint.checkpoint import Checkpoint, HostTensor
from engine.config import DType, ModelConfig
from engine.model.params import Params, ParamSpec, dtype_of, map_specs, param_specs
from engine.model.quantized import QuantizedArray
from engine.sharding import sharding_of
from engine.types import Progress

FILES_AT_ONCE = 2

Index = tuple[slice, ...]
Read = Callable[[Index], NDArray[Any]]
Put = Callable[[tuple[int, ...], jnp.dtype, NamedSharding, Read], Any]  # shape, type and place of an array, and how to read a slice of it


def load_params(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: DType, mesh: Mesh, keep_int8: bool, report: Callable[[Progress], None]
) -> Params:
    """Every tensor of a checked checkpoint as a device array, `QuantizedArray` where `keep_int8` asks for it."""
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    lock = threading.Lock()
    done = 0

    def load(spec: ParamSpec) -> Any:
        nonlocal done
        tensor = checkpoint.tensors[spec.name]
        array = _place(tensor, spec, dtype=dtype, mesh=mesh, keep_int8=keep_int8, put=_put_array)
        jax.block_until_ready(array)
        with lock:
            done += tensor.num_bytes
            report(Progress(phase="load", done=done, total=total, unit="bytes", detail=spec.name))
        return array

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        jobs = map_specs(lambda spec: threads.submit(load, spec), param_specs(config))
        return jax.tree.map(lambda job: job.result(), jobs)


def param_shapes(checkpoint: Checkpoint, config: ModelConfig, *, dtype: DType, mesh: Mesh, keep_int8: bool) -> Params:
    """What `load_params` returns, with a `ShapeDtypeStruct` in place of every array."""

    def shape_of(spec: ParamSpec) -> Any:
        return _place(checkpoint.tensors[spec.name], spec, dtype=dtype, mesh=mesh, keep_int8=keep_int8, put=_put_shape)

    return map_specs(shape_of, param_specs(config))


def _place(tensor: HostTensor, spec: ParamSpec, *, dtype: DType, mesh: Mesh, keep_int8: bool, put: Put) -> Any:
    """One tensor on its devices. The file is mapped once, and only the slices that devices ask for are read."""
    weight, scales, target = tensor.weight, tensor.scales, dtype_of(spec, dtype)
    sharding = sharding_of(mesh, spec.axes)
    if scales is None:
        return put(spec.shape, target, sharding, lambda index: np.asarray(weight[index], target))
    if not keep_int8:
        return put(spec.shape, target, sharding, lambda index: dequantized_slice(weight, scales, index, target))
    splits_groups = scales.shape[-2] % mesh.shape["tensor"] == 0
    scale_axes = spec.axes if splits_groups else (*spec.axes[:-2], None, spec.axes[-1])
    return QuantizedArray(
        put(spec.shape, weight.dtype, sharding, lambda index: np.asarray(weight[index])),
        put(scales.shape, scales.dtype, sharding_of(mesh, scale_axes), lambda index: np.asarray(scales[index])),
    )


def _put_array(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, read: Read) -> jax.Array:  # noqa: ARG001
    return jax.make_array_from_callback(shape, sharding, lambda index: read(cast(Index, index)))


def _put_shape(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, read: Read) -> jax.ShapeDtypeStruct:  # noqa: ARG001
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def dequantized_slice(weight: NDArray[Any], scales: NDArray[Any], index: Index, dtype: jnp.dtype) -> NDArray[Any]:
    """A slice of the real matrix: `weight` int8 [*lead, k, n], `scales` [*lead, groups, n]; the product is taken in float32."""
    rows_per_group = weight.shape[-2] // scales.shape[-2]
    groups = np.arange(weight.shape[-2])[index[-2]] // rows_per_group
    part = np.asarray(scales[(*index[:-2], slice(None), index[-1])], np.float32)
    return (np.asarray(weight[index], np.float32) * part[..., groups, :]).astype(dtype)
