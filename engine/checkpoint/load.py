"""Checked files -> weights on the devices, each process reading only the slices that its devices need.

On the CPU int8 and int4 matrices are turned into the compute dtype once, here: XLA would convert them again in every step. Elsewhere they
stay as they are beside their scales.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from engine.checkpoint.dequantize import Index, read_slice
from engine.checkpoint.tensors import Checkpoint, HostArray, HostTensor
from engine.config import DType, ModelConfig
from engine.errors import CheckpointError
from engine.model.params import Params, ParamSpec, dtype_of, map_specs, param_specs
from engine.model.quantized import PackedInt4Array, QuantizedArray
from engine.sharding import num_cached_heads, sharding_of
from engine.types import Progress

FILES_AT_ONCE = 2

Read = Callable[[Index], NDArray[Any]]
Put = Callable[[tuple[int, ...], jnp.dtype, NamedSharding, Read], Any]  # shape, type and place of an array, and how to read a slice of it


def load_params(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: DType, mesh: Mesh, keep_int8: bool, report: Callable[[Progress], None]
) -> Params:
    """Every tensor of a checked checkpoint as a device array; with `keep_int8` int8 and int4 matrices stay what they are.

    Raises `CheckpointError` where the devices cannot share the scale groups, or the files have changed.
    """
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    lock = threading.Lock()
    done = 0

    def load(spec: ParamSpec) -> Any:
        nonlocal done
        tensor = checkpoint.tensors[spec.name]
        array = _place(tensor, spec, config, dtype=dtype, mesh=mesh, keep_int8=keep_int8, put=_put_array)
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
        return _place(checkpoint.tensors[spec.name], spec, config, dtype=dtype, mesh=mesh, keep_int8=keep_int8, put=_put_shape)

    return map_specs(shape_of, param_specs(config))


def _place(tensor: HostTensor, spec: ParamSpec, config: ModelConfig, *, dtype: DType, mesh: Mesh, keep_int8: bool, put: Put) -> Any:
    """One tensor on its devices. The file is mapped once, and only the slices that devices ask for are read."""
    weight, scales, target = tensor.weight, tensor.scales, dtype_of(spec, dtype)
    sharding = sharding_of(mesh, spec.axes)
    if "kv_heads" in spec.axes and mesh.size > config.num_kv_heads:
        copies = num_cached_heads(config, mesh.size) // config.num_kv_heads
        weight = _CopiedHeads(weight, config.key_size, copies)
        scales = None if scales is None else _CopiedHeads(scales, config.key_size, copies)
        spec = replace(spec, shape=weight.shape)
    if scales is None or not keep_int8:
        return put(spec.shape, target, sharding, lambda index: read_slice(tensor.form, weight, scales, index, target))
    groups, is_split = _device_groups(tensor, scales, num_parts=_num_parts(sharding))
    scale_axes = spec.axes if is_split else (*spec.axes[:-2], None, spec.axes[-1])
    repeats = groups // scales.shape[-2]
    return (PackedInt4Array if tensor.form == "int4" else QuantizedArray)(
        put(weight.shape, weight.dtype, sharding, lambda index: np.asarray(weight[index])),
        put(
            (*scales.shape[:-2], groups, scales.shape[-1]),
            scales.dtype,
            sharding_of(mesh, scale_axes),
            lambda index: _repeated_slice(scales, index, repeats=repeats),
        ),
    )


@dataclass(frozen=True, slots=True)
class _CopiedHeads:
    """A matrix whose columns are heads, with every head there several times in a row, one for each device that holds it."""

    array: HostArray  # [k, heads * width]
    width: int
    copies: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.array.shape
        return rows, columns * self.copies

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def __getitem__(self, index: Any, /) -> NDArray[Any]:
        """`index` is two slices, of which the second is one head or all."""
        rows, columns = index
        start, stop, _ = columns.indices(self.shape[1])
        heads = (
            self.array[rows, first : first + self.width]
            for first in (head // self.copies * self.width for head in range(start // self.width, stop // self.width))
        )
        return np.concatenate(list(heads), axis=1)


def _num_parts(sharding: NamedSharding) -> int:
    """How many parts the contracting axis of a matrix is cut into."""
    names = sharding.spec[-2]
    return prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))


def _device_groups(tensor: HostTensor, scales: HostArray, *, num_parts: int) -> tuple[int, bool]:
    """How many scale groups the devices get together, and whether each gets only its own.

    Where a part of the contracting axis begins inside a group, the group is cut there and its scale repeated, so that a device needs no
    row of scales but its own. One group for the whole axis stays one.
    """
    rows, groups = tensor.spec.shape[-2], scales.shape[-2]
    if num_parts == 1:
        return groups, False
    cut = groups if groups == 1 else lcm(groups, num_parts)
    rows_per_byte = 2 if tensor.form == "int4" else 1
    if rows % (num_parts * rows_per_byte) or rows % (cut * rows_per_byte):
        raise CheckpointError(
            f"{tensor.path}: the {rows:,} rows of {tensor.spec.name}, {tensor.form} in {groups} groups, cannot be shared by {num_parts} "
            "devices: choose a smaller tensor parallel size, or another form of weights"
        )
    return cut, groups > 1


def _repeated_slice(scales: HostArray, index: Index, *, repeats: int) -> NDArray[Any]:
    """A slice of the scales in which every group occurs `repeats` times."""
    groups = np.arange(scales.shape[-2] * repeats)[index[-2]] // repeats
    part = np.asarray(scales[(*index[:-2], slice(groups[0], groups[-1] + 1), index[-1])])
    return part if repeats == 1 else part[..., groups - groups[0], :]


def _put_array(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, read: Read) -> jax.Array:  # noqa: ARG001
    return jax.make_array_from_callback(shape, sharding, lambda index: read(cast(Index, index)))


def _put_shape(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, read: Read) -> jax.ShapeDtypeStruct:  # noqa: ARG001
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
