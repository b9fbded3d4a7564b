"""The KV cache's forms on the device: what a token's keys and values become when they are written, and what is read of them.

float32 and bfloat16 are kept as they are. int8 and fp8 (float8_e4m3fn) are symmetric, with a float32 scale for each token and kv head: the
largest value of the head becomes the largest of the form. Every token is rounded once, when it is written, and even its own query reads it
back like that, so nothing depends on the step in which a key was computed.

bfloat16 and fp8 lie in the arrays as bits, in unsigned integers. Where a backend has no such floats (a CPU has not), XLA would turn the
whole cache into wider ones and back in every step; of integers it moves what is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from engine.config import EngineConfig, KVDType
from engine.model.params import Axis
from engine.shapes import Array, Float, Float32, Int32, Shaped

STORED_AS: dict[KVDType, jnp.dtype] = {
    "float32": jnp.dtype(jnp.float32),
    "bfloat16": jnp.dtype(jnp.uint16),
    "int8": jnp.dtype(jnp.int8),
    "fp8": jnp.dtype(jnp.uint8),
}
_MEANT = {jnp.dtype(jnp.uint16): jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.uint8): jnp.dtype(jnp.float8_e4m3fn)}
_LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}  # of the forms with scales
_SMALLEST = 1e-30  # largest value of a head that is not taken for zeros, so that no scale is 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class CacheArray:
    """Keys or values of one layer. N is the pool and the scratch block."""

    bits: Any  # [N, P, K, C], as in `STORED_AS`
    scales: Any  # float32 [N, P, K]; None where the form has none

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys (already rotated) and values of one layer."""

    keys: CacheArray
    values: CacheArray


KVCache = tuple[LayerCache, ...]


def cache_shapes(config: EngineConfig, *, num_heads: int, place: Callable[[tuple[Axis | None, ...]], NamedSharding]) -> KVCache:
    """Shape, type and place of the whole cache, which has one block more than the pool: the scratch block."""
    shape = (config.cache.num_blocks + 1, config.cache.block_size, num_heads, config.model.key_size)
    stored = STORED_AS[config.kv_dtype]
    bits = jax.ShapeDtypeStruct(shape, stored, sharding=place((None, None, "kv_heads", None)))
    scales = jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=place((None, None, "kv_heads")))
    array = CacheArray(bits, scales if _meant(stored) in _LARGEST else None)
    return tuple(LayerCache(array, array) for _ in range(config.model.num_layers))


def write_cache(cache: CacheArray, rows: Float[Array, "t k c"], cache_slots: Int32[Array, "t"]) -> CacheArray:
    """Put the keys or values of the step's tokens into their slots, in the cache's form; padding goes to the scratch block."""
    meant, scales = _meant(cache.bits.dtype), cache.scales
    if scales is not None:
        wide = rows.astype(jnp.float32)
        own = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), _SMALLEST) * jnp.float32(1 / _LARGEST[meant])
        rows = jnp.clip(wide / own[..., None], -_LARGEST[meant], _LARGEST[meant])
        rows = jnp.round(rows) if meant == jnp.int8 else rows
        scales = _written(scales, own, cache_slots)
    bits = rows.astype(meant)
    bits = bits if meant == cache.bits.dtype else jax.lax.bitcast_convert_type(bits, cache.bits.dtype)
    return CacheArray(_written(cache.bits, bits, cache_slots), scales)


def read_blocks(
    cache: CacheArray, blocks: Int32[Array, "b"], dtype: jnp.dtype
) -> tuple[Float[Array, "t k c"], Float32[Array, "t k"] | None]:
    """The tokens of some blocks, exact in `dtype` but for float32 read as bfloat16, and what they are still to be multiplied with."""
    bits = cache.bits[blocks].reshape(-1, *cache.bits.shape[2:])
    meant = _meant(bits.dtype)
    numbers = bits if meant == bits.dtype else jax.lax.bitcast_convert_type(bits, meant)
    return numbers.astype(dtype), None if cache.scales is None else cache.scales[blocks].reshape(-1, cache.scales.shape[2])


def _meant(stored: jnp.dtype) -> jnp.dtype:
    return _MEANT.get(jnp.dtype(stored), jnp.dtype(stored))


def _written(array: Shaped[Array, "n p ..."], rows: Shaped[Array, "t ..."], cache_slots: Int32[Array, "t"]) -> Shaped[Array, "n p ..."]:
    num_blocks, block_size, *head = array.shape
    return array.reshape(num_blocks * block_size, *head).at[cache_slots].set(rows).reshape(array.shape)
