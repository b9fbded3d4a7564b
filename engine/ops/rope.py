"""Rotary position embedding, "rotate half" convention: dimension i turns with dimension i + C/2."""

import jax.numpy as jnp

from engine.shapes import Array, Float, Int32


def rotate(x: Float[Array, "rows heads c"], positions: Int32[Array, "rows"], base: float) -> Float[Array, "rows heads c"]:
    """Turn queries or keys to their absolute positions, in float32; result in x's dtype. `inv_freq_i = base ** (-2i / C)`."""
    half = x.shape[-1] // 2
    inverse = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    phase = (positions.astype(jnp.float32)[:, None] * inverse[None])[:, None, :]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
