"""Paged attention with Grok-1's score cap.

One query tile (up to `TILE` tokens of one sequence) at a time walks over that sequence's blocks in key tiles of a fixed size, with an
online softmax (arXiv:1805.02867). The walk ends at the tile's own context, so only blocks that exist are read, and the order of additions
over the keys depends on nothing else: not on the batch, not on how a prompt was cut into chunks. Of an 8-bit cache a key tile at a time is
widened, and its scales go to the scores and the softmax's weights, which are far fewer numbers than the keys and values.
"""

import jax
import jax.numpy as jnp

from engine.batch import TILE, StepInput
from engine.model.cache import CacheArray, LayerCache, read_blocks
from engine.ops.tiles import map_each
from engine.shapes import Array, Bool, Float, Float32, Int32

KEY_TILE = 64  # keys per pass of the online softmax; block sizes that do not divide it make their own multiple
MASKED = -1e30


def paged_attention(
    q: Float[Array, "t h c"],
    cache: LayerCache,
    step: StepInput,
    *,
    multiplier: float,
    cap: float,
) -> Float[Array, "t h*c"]:
    """Causal attention of every token of the step over its own sequence, whose keys and values are already in the cache.

    Scores are `cap * tanh(q·k * multiplier / cap)`; softmax and sums in float32; result in q's dtype, heads concatenated.
    """
    _, num_heads, head_width = q.shape
    _, block_size, num_kv_heads, _ = cache.keys.shape
    group = num_heads // num_kv_heads
    blocks_per_tile = max(1, KEY_TILE // block_size)
    key_tile = blocks_per_tile * block_size
    width = step.block_tables.shape[1]
    tables = jnp.pad(step.block_tables, ((0, 0), (0, -width % blocks_per_tile)))
    padded_q = jnp.pad(q, ((0, TILE), (0, 0), (0, 0)))

    def attend(row: Int32[Array, ""], start: Int32[Array, ""], end: Int32[Array, ""]) -> Float[Array, "tile q"]:
        """One query tile; `end` is the position after its last token."""
        tile_q = jax.lax.dynamic_slice_in_dim(padded_q, start, TILE)
        first_position = step.positions[start]
        query_positions = jnp.repeat(first_position + jnp.arange(TILE, dtype=jnp.int32), group)
        by_head = tile_q.reshape(TILE, num_kv_heads, group, head_width).swapaxes(0, 1).reshape(num_kv_heads, TILE * group, head_width)
        table = tables[row]

        def add_key_tile(
            j: Int32[Array, ""], carry: tuple[Float32[Array, "k r"], Float32[Array, "k r"], Float32[Array, "k r c"]]
        ) -> tuple[Float32[Array, "k r"], Float32[Array, "k r"], Float32[Array, "k r c"]]:
            highest, total, weighted = carry
            blocks = jax.lax.dynamic_slice_in_dim(table, j * blocks_per_tile, blocks_per_tile)
            key_positions = j * key_tile + jnp.arange(key_tile, dtype=jnp.int32)
            # Slots past the end hold what their last owner left; not even a NaN of his may reach this sequence.
            is_own = key_positions < end
            k, k_scales = _own_tokens(cache.keys, blocks, is_own, q.dtype)
            v, v_scales = _own_tokens(cache.values, blocks, is_own, q.dtype)
            scores = _scaled(_batched(by_head, k.swapaxes(1, 2)), k_scales) * multiplier
            scores = cap * jnp.tanh(scores / cap)
            is_visible = key_positions[None, :] <= query_positions[:, None]
            scores = jnp.where(is_visible[None], scores, MASKED)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            shrink = jnp.exp(highest - new_highest)
            weights = jnp.where(is_visible[None], jnp.exp(scores - new_highest[..., None]), 0.0)
            total = total * shrink + jnp.sum(weights, axis=-1)
            weighted = weighted * shrink[..., None] + _batched(_scaled(weights, v_scales).astype(v.dtype), v)
            return new_highest, total, weighted

        rows = (num_kv_heads, TILE * group)
        start_carry = (jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, head_width), jnp.float32))
        _, total, weighted = jax.lax.fori_loop(0, -(-end // key_tile), add_key_tile, start_carry)
        out = weighted / jnp.maximum(total, 1e-30)[..., None]
        return out.reshape(num_kv_heads, TILE, group, head_width).swapaxes(0, 1).reshape(TILE, num_heads * head_width).astype(q.dtype)

    tiles = map_each(attend, step.counts[2], step.tile_rows, step.tile_starts, step.tile_ends)
    return tiles.reshape(-1, num_heads * head_width)[step.tile_places]


def _own_tokens(
    cache: CacheArray, blocks: Int32[Array, "b"], is_own: Bool[Array, "m"], dtype: jnp.dtype
) -> tuple[Float[Array, "k m c"], Float32[Array, "k m"] | None]:
    """A tile of keys or values by head, with zeros for what is another's, and the scales that belong to it."""
    tokens, scales = read_blocks(cache, blocks, dtype)
    tokens = jnp.where(is_own[:, None, None], tokens, jnp.zeros_like(tokens)).swapaxes(0, 1)
    return tokens, None if scales is None else jnp.where(is_own[:, None], scales, jnp.zeros_like(scales)).swapaxes(0, 1)


def _scaled(numbers: Float32[Array, "k r m"], scales: Float32[Array, "k m"] | None) -> Float32[Array, "k r m"]:
    return numbers if scales is None else numbers * scales[:, None]


def _batched(a: Float[Array, "k r m"], b: Float[Array, "k m n"]) -> Float32[Array, "k r n"]:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
