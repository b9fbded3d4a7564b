"""Matrix products: `x @ w` for plain and for quantised weights, always accumulated in float32."""

import jax
import jax.numpy as jnp

from engine.model.quantized import QuantizedArray
from engine.shapes import Array, Float, Float32


def linear(x: Float[Array, "rows k"], w: Float[Array, "k n"] | QuantizedArray) -> Float32[Array, "rows n"]:
    """The product in float32. Quantised weights stay int8: each scale group is multiplied on its own and scaled afterwards."""
    if isinstance(w, QuantizedArray):
        return _quantized_linear(x, w)
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _quantized_linear(x: Float[Array, "rows k"], w: QuantizedArray) -> Float32[Array, "rows n"]:
    groups, _ = w.scales.shape
    parts = jnp.split(x, groups, axis=1)
    weights = jnp.split(w.weight, groups, axis=0)
    total = jnp.zeros((x.shape[0], w.scales.shape[1]), jnp.float32)
    for part, weight, scale in zip(parts, weights, w.scales.astype(jnp.float32), strict=True):
        total = total + linear(part, weight.astype(x.dtype)) * scale[None]
    return total
