"""Checked files -> weights on the devices, each process reading only the slices that its devices need.

On the CPU int8 and int4 matrices are turned into the compute dtype once, here: XLA would convert them again in every step. Elsewhere they
stay as they are beside their scales.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import lcm, prod
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from engine.checkpoint.dequantize import Index, read_slice
from engine.checkpoint.device_slices import InFlight, Read, local_hull, put_slices
from engine.checkpoint.load_meter import LoadMeter
from engine.checkpoint.read_ahead import ReadAhead, Wanted, scaled
from engine.checkpoint.tensors import ArraySource, Checkpoint, FileArray, HostArray, HostTensor
from engine.config import DType, ModelConfig
from engine.errors import CheckpointError
from engine.host_memory import host_memory_bytes
from engine.model.params import Params, ParamSpec, dtype_of, map_specs, param_specs
from engine.model.quantized import PackedInt4Array, QuantizedArray, is_quantized
from engine.sharding import num_cached_heads, sharding_of
from engine.types import Progress

THREADS = min(4, max(2, os.cpu_count() or 2))  # a tensor each
AHEAD_BYTES = 4 << 30  # several files

Put = Callable[[tuple[int, ...], jnp.dtype, NamedSharding, Read], Any]  # shape, type and place of an array, and how to read a slice of it


def load_params(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: DType, mesh: Mesh, keep_int8: bool, report: Callable[[Progress], None]
) -> Params:
    """Every tensor of a checked checkpoint as a device array; with `keep_int8` int8 and int4 matrices stay what they are.

    Beside the arrays themselves, no more is in memory than the two largest tensors have in bytes.

    Raises `CheckpointError` where the devices cannot share the scale groups, or the files have changed; what has not begun by then is not
    begun any more.
    """
    shapes = param_shapes(checkpoint, config, dtype=dtype, mesh=mesh, keep_int8=keep_int8)
    wanted = {spec.name: _wanted(checkpoint.tensors[spec.name], shape) for spec, shape in _pairs(config, shapes)}
    meter = LoadMeter({name: one.num_bytes for name, one in wanted.items()}, report=report)
    in_flight = InFlight(sum(sorted(one.num_bytes for one in wanted.values())[-2:]))
    ahead = ReadAhead(list(wanted.values()), limit_bytes=min(AHEAD_BYTES, host_memory_bytes() // 8))

    def load(spec: ParamSpec) -> Any:
        def advance(share: float) -> None:
            meter.advance(spec.name, int(share * wanted[spec.name].num_bytes))

        put = partial(put_slices, in_flight=in_flight, advance=advance)
        array = _place(checkpoint.tensors[spec.name], spec, config, dtype=dtype, mesh=mesh, keep_int8=keep_int8, put=put)
        ahead.is_done(spec.name)
        meter.finished(spec.name)
        return array

    with ahead, ThreadPoolExecutor(THREADS) as threads:
        jobs = map_specs(lambda spec: threads.submit(load, spec), param_specs(config))
        try:
            return jax.tree.map(lambda job: job.result(), jobs)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _pairs(config: ModelConfig, shapes: Params) -> Iterator[tuple[ParamSpec, Any]]:
    """Each spec with what stands in `shapes` for it."""
    specs = jax.tree.leaves(param_specs(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return zip(specs, jax.tree.leaves(shapes, is_leaf=is_quantized), strict=True)


def _wanted(tensor: HostTensor, placed: Any) -> Wanted:
    """What this process's devices need of one tensor, of which `placed` has shapes and shardings."""
    weight, scales = (placed.weight, placed.scales) if is_quantized(placed) else (placed, placed)
    parts = _parts(tensor.weight_source, weight)
    if tensor.scales_source is not None:
        parts += _parts(tensor.scales_source, scales)
    return Wanted(name=tensor.spec.name, parts=parts)


def _parts(source: ArraySource, placed: jax.ShapeDtypeStruct) -> tuple[tuple[FileArray, Index], ...]:
    """Files and slices. An array that is put together from others is wanted whole."""
    if isinstance(source, FileArray):
        hull = local_hull(placed.shape, cast(NamedSharding, placed.sharding))
        return ((source, scaled(hull, placed.shape, source.shape)),)
    return tuple((region, tuple(slice(0, size) for size in region.shape)) for region in source.regions)


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
        spec = replace(spec, shape=(spec.shape[0], weight.shape[1]))  # int4 lies there with half its rows
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


def _put_shape(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, read: Read) -> jax.ShapeDtypeStruct:  # noqa: ARG001
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
