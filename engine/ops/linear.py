"""Matrix products: `x @ w` for plain and for quantised weights, always accumulated in float32."""

import jax
import jax.numpy as jnp

from engine.model.quantized import PackedInt4Array, QuantizedArray, dequantize_halves
from engine.shapes import Array, Float, Float32


def linear(x: Float[Array, "rows k"], w: Float[Array, "k n"] | QuantizedArray | PackedInt4Array) -> Float32[Array, "rows n"]:
    """The product in float32. Quantised weights stay as they are: int8 is scaled behind the product, int4 on its way into it."""
    if isinstance(w, QuantizedArray):
        return _int8_linear(x, w)
    if isinstance(w, PackedInt4Array):
        return _int4_linear(x, w)
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _int8_linear(x: Float[Array, "rows k"], w: QuantizedArray) -> Float32[Array, "rows n"]:
    """Each scale group is multiplied on its own and scaled afterwards. The groups are an axis, along which devices may share the work."""
    groups, n = w.scales.shape
    parts = jnp.einsum(
        "rgk,gkn->grn",
        x.reshape(x.shape[0], groups, -1),
        w.weight.reshape(groups, -1, n).astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(parts * w.scales.astype(jnp.float32)[:, None], axis=0)


def _int4_linear(x: Float[Array, "rows k"], w: PackedInt4Array) -> Float32[Array, "rows n"]:
    """Even and odd rows apart, as they lie in the bytes; the dozens of groups are too many for products of their own."""
    pairs = x.reshape(x.shape[0], -1, 2)
    even, odd = dequantize_halves(w, x.dtype)
    return linear(pairs[:, :, 0], even) + linear(pairs[:, :, 1], odd)
