"""Float weights to int8 with bfloat16 scales, as the release stores matrices. Used when a checkpoint is written, never when it is read."""

import ml_dtypes
import numpy as np

from engine.errors import CheckpointError


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
