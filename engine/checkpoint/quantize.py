"""Float weights to int8 as the release stores matrices, or to packed int4, both with bfloat16 scales.

Used when a checkpoint is written, never when it is read.
"""

import ml_dtypes
import numpy as np

from engine.errors import CheckpointError

_TILE_COLUMNS = 128
_SHRINKS = (1.0, 0.9)  # of the int4 scale: the second clips the largest value of a group for a finer step


def quantize(weight: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a float32 `weight` [*lead, k, n] symmetrically per output column and group of k / groups rows.

    Returns int8 [*lead, k, n] and bfloat16 scales [*lead, groups, n]. The scale is rounded to bfloat16 first and the integers are chosen
    for the rounded one, so that `int8 * scale` is within half a scale of every value.

    Raises `CheckpointError` for values that are not finite or groups that do not divide k.
    """
    *lead, k, n = weight.shape
    if groups < 1 or k % groups:
        raise CheckpointError(f"{groups} scale groups do not divide {k} rows")
    if not np.isfinite(weight).all():
        raise CheckpointError("weights to quantise hold values that are not finite")
    grouped = weight.astype(np.float32, copy=False).reshape(*lead, groups, k // groups, n)
    scales = (np.abs(grouped).max(axis=-2) / np.float32(127)).astype(ml_dtypes.bfloat16)
    scales[scales == 0] = 1  # an all-zero column: any scale gives zeros
    integers = np.rint(grouped / scales.astype(np.float32)[..., :, None, :])
    return np.clip(integers, -127, 127).astype(np.int8).reshape(weight.shape), scales


def quantize_int4(weight: np.ndarray, rows_per_group: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a float32 `weight` [*lead, k, n] to integers from -8 to 7 per output column and group of `rows_per_group` rows.

    Returns uint8 [*lead, k / 2, n], where byte i holds row 2i in its lower and row 2i + 1 in its upper half, each plus 8, and bfloat16
    scales [*lead, groups, n]. A scale has the sign that maps the group's largest value to -8, the one integer without an opposite; per
    group it is that value / -8 or 0.9 of it, whichever leaves the smaller squared error. On normal values this has 0.85 of the error of
    the usual largest / 7, and a search over twelve scales would have 0.83.

    Raises `CheckpointError` for values that are not finite or groups that do not divide k.
    """
    *lead, k, n = weight.shape
    if rows_per_group < 2 or rows_per_group % 2 or k % rows_per_group:
        raise CheckpointError(f"int4 groups of {rows_per_group} do not divide {k} rows; choose another group size")
    if not np.isfinite(weight).all():
        raise CheckpointError("weights to quantise hold values that are not finite")
    matrices = weight.astype(np.float32, copy=False).reshape(-1, k, n)
    packed = np.empty((len(matrices), k // 2, n), np.uint8)
    scales = np.empty((len(matrices), k // rows_per_group, n), ml_dtypes.bfloat16)
    for matrix, group, column in np.ndindex(len(matrices), k // rows_per_group, -(-n // _TILE_COLUMNS)):
        columns = slice(column * _TILE_COLUMNS, (column + 1) * _TILE_COLUMNS)
        start = group * rows_per_group
        integers, scales[matrix, group, columns] = _quantize_group(matrices[matrix, start : start + rows_per_group, columns])
        nibbles = (integers + 8).astype(np.uint8)
        packed[matrix, start // 2 : (start + rows_per_group) // 2, columns] = nibbles[0::2] | nibbles[1::2] << 4
    return packed.reshape(*lead, k // 2, n), scales.reshape(*lead, -1, n)


def _quantize_group(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers, still as floats, and bfloat16 scales of the columns of one group; a tile that stays in the processor's cache."""
    lowest, highest = values.min(axis=0), values.max(axis=0)
    largest = np.where(-lowest > highest, lowest, highest)
    first, second = (_round_to_int4(values, largest * np.float32(-shrink / 8)) for shrink in _SHRINKS)
    is_better = second[2] < first[2]
    return np.where(is_better, second[0], first[0]), np.where(is_better, second[1], first[1])


def _round_to_int4(values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scales as they are stored, and the squared error of each column."""
    stored = scale.astype(ml_dtypes.bfloat16)
    stored[stored == 0] = 1  # a group of zeros: any scale gives zeros
    step = stored.astype(np.float32)
    integers = np.clip(np.rint(values / step), -8, 7)
    error = integers * step - values
    return integers, stored, np.einsum("kn,kn->n", error, error)
