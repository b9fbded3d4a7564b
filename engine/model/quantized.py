"""int8 weights with scale groups, as an array type that the layer code does not see.

A weight `[*lead, k, n]` has scales `[*lead, groups, n]`: group g covers rows `g * k/groups` to `(g+1) * k/groups - 1` of the contracting
axis, and the real value is `weight * scale`, symmetric, without a zero point (xai-org/grok-1, `QuantizedWeight8bit`). The release has one
group for column-parallel matrices and eight for row-parallel ones, so the scales never simply broadcast.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from engine.shapes import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class QuantizedArray:
    """`weight` int8 [*lead, k, n], `scales` bfloat16 or float32 [*lead, groups, n]."""

    weight: Any  # [*lead, k, n]
    scales: Any  # [*lead, groups, n]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that this stands for."""
        return self.weight.shape

    def __getitem__(self, index: int) -> "QuantizedArray":
        """One matrix of a stack, e.g. one expert."""
        return QuantizedArray(self.weight[index], self.scales[index])


def dequantize(array: QuantizedArray, dtype: jnp.dtype) -> Float[Array, "*lead k n"]:
    """The real values: the product is exact in float32 (8 bits times at most 24) up to its one rounding, then cast to `dtype`."""
    *lead, k, n = array.weight.shape
    groups = array.scales.shape[-2]
    grouped = array.weight.reshape(*lead, groups, k // groups, n).astype(jnp.float32)
    real = grouped * array.scales.astype(jnp.float32)[..., :, None, :]
    return real.reshape(*lead, k, n).astype(dtype)
