"""The experts: each token's chosen ones, each a GELU-gated feed-forward, weighted and summed.

On the CPU the (token, choice) pairs are sorted by expert and every expert multiplies only its own rows, tile by tile; nothing is dropped
and padding is never computed. Elsewhere every expert computes all rows and unchosen results get weight zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engine.batch import TILE
from engine.ops import tiles
from engine.ops.linear import linear
from engine.shapes import Array, Float, Float32, Int32


class Experts(NamedTuple):
    """Weights of one layer's experts, plain or quantised, stacked on the first axis."""

    gate: Any  # [E, D, F]
    up: Any  # [E, D, F]
    down: Any  # [E, F, D]


def route(probs: Float32[Array, "rows e"], num_selected: int) -> tuple[Float32[Array, "rows k"], Int32[Array, "rows k"]]:
    """The largest probabilities, not renormalised, and their experts; the lower index wins a tie."""
    weights, chosen = jax.lax.top_k(probs, num_selected)
    return weights, chosen


def mixture(
    x: Float[Array, "t d"],
    weights: Float32[Array, "t k"],
    chosen: Int32[Array, "t k"],
    experts: Experts,
    num_tokens: Int32[Array, ""],
) -> Float32[Array, "t d"]:
    """Sum over each token's chosen experts of weight times expert output, in the order of the choices.

    `chosen` counts from the first expert in `experts`; choices of others, before or behind these, add nothing.
    """
    by_choice = _sorted(x, chosen, experts, num_tokens) if tiles.loops_over_tiles() else _dense(x, chosen, experts)
    total = jnp.zeros(by_choice.shape[::2], jnp.float32)
    for choice in range(chosen.shape[1]):
        total = total + weights[:, choice, None] * by_choice[:, choice]
    return total


def feed_forward(x: Float[Array, "rows d"], expert: Experts) -> Float32[Array, "rows d"]:
    """One expert, whose weights are those of a stack without its first axis: tanh-GELU on the gate only."""
    hidden = jax.nn.gelu(linear(x, expert.gate), approximate=True) * linear(x, expert.up)
    return linear(hidden.astype(x.dtype), expert.down)


def _sorted(x: Float[Array, "t d"], chosen: Int32[Array, "t k"], experts: Experts, num_tokens: Int32[Array, ""]) -> Float32[Array, "t k d"]:
    num_rows, num_selected = chosen.shape
    num_experts, num_pairs = experts.gate.shape[0], num_rows * num_selected
    flat = chosen.reshape(-1)
    is_real = jnp.arange(num_pairs, dtype=jnp.int32) // num_selected < num_tokens
    flat = jnp.where(is_real & (flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # pairs of expert 0 first, padding and others' last
    counts = jnp.sum(flat[None] == jnp.arange(num_experts, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    starts = jnp.cumsum(counts) - counts
    padded_order = jnp.pad(order, (0, TILE))

    results = jnp.zeros((num_pairs, x.shape[1]), jnp.float32)
    for expert in range(num_experts):

        def compute_tile(i: Int32[Array, ""], results: Float32[Array, "pairs d"], expert: int = expert) -> Float32[Array, "pairs d"]:
            pairs = jax.lax.dynamic_slice_in_dim(padded_order, starts[expert] + i * TILE, TILE)
            is_own = i * TILE + jnp.arange(TILE, dtype=jnp.int32) < counts[expert]
            own, _ = jax.lax.optimization_barrier((Experts(*(weight[expert] for weight in experts)), i))  # or XLA takes the cast of packed
            rows = feed_forward(x[pairs // num_selected], own)  # weights out of the loop, and all experts' floats are there at once
            return results.at[jnp.where(is_own, pairs, num_pairs)].set(rows, mode="drop")

        results = jax.lax.fori_loop(0, -(-counts[expert] // TILE), compute_tile, results)
    return results.reshape(num_rows, num_selected, -1)


def _dense(x: Float[Array, "t d"], chosen: Int32[Array, "t k"], experts: Experts) -> Float32[Array, "t k d"]:
    """The experts are a batch dimension of each product, which an accelerator's compiler makes one kernel that reads int8 as it is.

    Given them one by one, XLA first writes all of a layer's matrices to memory as floats.
    """
    num_experts = experts.gate.shape[0]
    rows = jax.vmap(feed_forward)(jnp.broadcast_to(x, (num_experts, *x.shape)), experts)
    is_own = (chosen >= 0) & (chosen < num_experts)
    tokens = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(is_own[..., None], rows[jnp.where(is_own, chosen, 0), tokens], 0.0)
