"""int8 and int4 weights with scale groups, as array types that the layer code does not see.

An int8 weight `[*lead, k, n]` has scales `[*lead, groups, n]`: group g covers rows `g * k/groups` to `(g+1) * k/groups - 1` of the
contracting axis, and the real value is `weight * scale`, symmetric, without a zero point (xai-org/grok-1, `QuantizedWeight8bit`). The
release has one group for column-parallel matrices and eight for row-parallel ones, so the scales never simply broadcast.

int4 is the same with groups of 64 or 128 rows and integers from -8 to 7, two to a byte along the contracting axis: byte i of a column holds
row 2i in its lower and row 2i + 1 in its upper half, each plus 8. Neighbours share a byte so that any even cut of the rows is a cut of the
bytes.
"""

from dataclasses import dataclass
from typing import Any, TypeGuard

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PackedInt4Array:
    """`weight` uint8 [*lead, k / 2, n], `scales` bfloat16 or float32 [*lead, groups, n]."""

    weight: Any  # [*lead, k / 2, n]
    scales: Any  # [*lead, groups, n]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that this stands for."""
        *lead, half, n = self.weight.shape
        return (*lead, 2 * half, n)

    def __getitem__(self, index: int) -> "PackedInt4Array":
        """One matrix of a stack, e.g. one expert."""
        return PackedInt4Array(self.weight[index], self.scales[index])


def dequantize(array: QuantizedArray | PackedInt4Array, dtype: jnp.dtype) -> Float[Array, "*lead k n"]:
    """The real values: the product is exact in float32 (8 bits times at most 24) up to its one rounding, then cast to `dtype`."""
    if isinstance(array, PackedInt4Array):
        return jnp.stack(dequantize_halves(array, dtype), axis=-2).reshape(array.shape)
    *lead, k, n = array.weight.shape
    groups = array.scales.shape[-2]
    grouped = array.weight.reshape(*lead, groups, k // groups, n).astype(jnp.float32)
    real = grouped * array.scales.astype(jnp.float32)[..., :, None, :]
    return real.reshape(*lead, k, n).astype(dtype)


def dequantize_halves(array: PackedInt4Array, dtype: jnp.dtype) -> tuple[Float[Array, "*lead k2 n"], Float[Array, "*lead k2 n"]]:
    """The even and the odd rows of the real matrix, each a function of one byte and one scale per value, so that they need no room."""
    *lead, half, n = array.weight.shape
    groups = array.scales.shape[-2]
    scales = array.scales.astype(jnp.float32)[..., :, None, :]

    def real(nibbles: Array) -> Array:
        grouped = (nibbles.astype(jnp.int32) - 8).astype(jnp.float32).reshape(*lead, groups, half // groups, n)
        return (grouped * scales).reshape(*lead, half, n).astype(dtype)

    return real(array.weight & 15), real(array.weight >> 4)


def is_quantized(leaf: Any) -> TypeGuard[QuantizedArray | PackedInt4Array]:
    """Whether a leaf of the parameters is one of the types here, and not a plain array."""
    return isinstance(leaf, QuantizedArray | PackedInt4Array)
