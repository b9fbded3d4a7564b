"""RMS norm as Grok-1 has it: the stored scale multiplies directly, there is no `1 +`."""

import jax
import jax.numpy as jnp

from engine.shapes import Array, Float


def rms_norm(x: Float[Array, "rows d"], scale: Float[Array, "d"], eps: float) -> Float[Array, "rows d"]:
    """Normalise in float32 (`eps` inside the root), return in x's dtype."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (scale.astype(jnp.float32)[None] * wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
