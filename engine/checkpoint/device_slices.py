"""An array on its devices, slice by slice: each is read once, in blocks, into memory that a CPU device keeps and any other copies from.

So what exists beside the arrays is at most the slices that are on their way, which `InFlight` bounds, and a block for each of them while
numbers are turned into another type. Nothing of a mapped file stays mapped for the arrays' sake.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from engine.checkpoint.dequantize import Index

BLOCK_BYTES = 16 << 20
_ALIGNMENT = 64  # of memory that a CPU device takes over as it is

Read = Callable[[Index], NDArray[Any]]


class InFlight:
    """Bytes of host memory that slices take on their way to a device. One slice at least is always let through."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._news = threading.Condition()

    @contextmanager
    def room_for(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room, and take it as long as the context lasts."""
        with self._news:
            self._news.wait_for(lambda: not self._num_bytes or self._num_bytes + num_bytes <= self._limit_bytes)
            self._num_bytes += num_bytes
        try:
            yield
        finally:
            with self._news:
                self._num_bytes -= num_bytes
                self._news.notify_all()


def put_slices(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, read: Read, *, in_flight: InFlight, advance: Callable[[float], None]
) -> jax.Array:
    """The array whose slices `read` gives, with those that this process's devices need; `advance` hears of each block's share of them.

    Raises what `read` raises.
    """
    boxes = _local_boxes(shape, sharding)
    num_numbers = sum(_size(box) for box, _ in boxes)
    arrays: dict[Any, jax.Array] = {}
    for box, devices in boxes:
        with in_flight.room_for(_size(box) * dtype.itemsize):
            values = _aligned(tuple(cut.stop - cut.start for cut in box), dtype)
            for block in blocks(box, max_numbers=max(1, BLOCK_BYTES // dtype.itemsize)):
                values[tuple(slice(cut.start - all_.start, cut.stop - all_.start) for cut, all_ in zip(block, box, strict=True))] = read(
                    block
                )
                advance(_size(block) / num_numbers)
            arrays |= {device: jax.block_until_ready(jax.device_put(values, device)) for device in devices}
    ordered = [arrays[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered)


def local_hull(shape: tuple[int, ...], sharding: NamedSharding) -> Index:
    """The smallest slice that has in it all that this process's devices need."""
    boxes = [box for box, _ in _local_boxes(shape, sharding)]
    return tuple(slice(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)) for cuts in zip(*boxes, strict=True))


def blocks(box: Index, *, max_numbers: int) -> Iterator[Index]:
    """Cut along the first axes, so that each block is as contiguous as can be."""
    size = _size(box)
    if size <= max_numbers:
        yield box
        return
    axis = next(axis for axis, cut in enumerate(box) if cut.stop - cut.start > 1)
    cut = box[axis]
    step = max(1, max_numbers * (cut.stop - cut.start) // size)
    for start in range(cut.start, cut.stop, step):
        yield from blocks((*box[:axis], slice(start, min(start + step, cut.stop)), *box[axis + 1 :]), max_numbers=max_numbers)


def _local_boxes(shape: tuple[int, ...], sharding: NamedSharding) -> list[tuple[Index, list[Any]]]:
    """What this process's devices hold, each slice once, with start and stop, and who they are."""
    devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cuts = (cut.indices(size) for cut, size in zip(cast(Index, index), shape, strict=True))
        devices_of.setdefault(tuple((start, stop) for start, stop, _ in cuts), []).append(device)
    return [(tuple(slice(*bound) for bound in bounds), devices) for bounds, devices in devices_of.items()]


def _size(box: Index) -> int:
    return prod(cut.stop - cut.start for cut in box)


def _aligned(shape: tuple[int, ...], dtype: jnp.dtype) -> NDArray[Any]:
    num_bytes = prod(shape) * dtype.itemsize
    room = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + num_bytes].view(dtype).reshape(shape)
