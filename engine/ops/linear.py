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
    groups, n = w.scales.shape
    grouped_x = x.reshape(x.shape[0], groups, -1)
    grouped_w = w.weight.reshape(groups, -1, n).astype(x.dtype)
    partial = jnp.einsum("tgk,gkn->tgn", grouped_x, grouped_w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.sum(partial * w.scales.astype(jnp.float32)[None], axis=1)
