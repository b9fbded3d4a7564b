"""Slices of the real matrices, read from whatever form a tensor is stored in. Used where weights are loaded, converted and compared."""

import numpy as np
from numpy.typing import DTypeLike

from engine.checkpoint.tensors import HostArray, HostTensor, WeightForm

Index = tuple[slice, ...]


def real_slice(tensor: HostTensor, index: Index, dtype: DTypeLike) -> np.ndarray:
    """The values of `tensor[index]`, in `dtype`; `index` has one slice without steps per dimension of the spec.

    Raises `CheckpointError` where the files have changed.
    """
    return read_slice(tensor.form, tensor.weight, tensor.scales, index, dtype)


def read_slice(form: WeightForm, weight: HostArray, scales: HostArray | None, index: Index, dtype: DTypeLike) -> np.ndarray:
    """The same of arrays that are open already; the product with the scales is taken in float32."""
    if scales is None:
        return np.asarray(weight[index], dtype)
    num_rows = weight.shape[-2] * (2 if form == "int4" else 1)
    start, stop, _ = index[-2].indices(num_rows)
    rows = (slice(start // 2, -(-stop // 2)) if form == "int4" else slice(start, stop),)
    stored = np.asarray(weight[(*index[:-2], *rows, index[-1])])
    integers = unpack_int4(stored)[..., start % 2 : start % 2 + stop - start, :] if form == "int4" else stored
    groups = np.arange(start, stop) // (num_rows // scales.shape[-2])
    part = np.asarray(scales[(*index[:-2], slice(groups[0], groups[-1] + 1), index[-1])], np.float32)
    with np.errstate(invalid="ignore"):  # scales that are not finite are `verify`'s to tell
        return (integers.astype(np.float32) * part[..., groups - groups[0], :]).astype(dtype, copy=False)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """uint8 [*lead, k / 2, n] -> int8 [*lead, k, n] from -8 to 7: row 2i is in the lower half of byte i, row 2i + 1 in the upper."""
    *lead, half, n = packed.shape
    integers = np.empty((*lead, half, 2, n), np.int8)
    integers[..., 0, :] = packed & 15
    integers[..., 1, :] = packed >> 4
    integers -= 8
    return integers.reshape(*lead, 2 * half, n)
