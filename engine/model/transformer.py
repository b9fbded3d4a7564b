"""The Grok-1 forward pass over one step's tokens (xai-org/grok-1, model.py).

Layers are functions over their weights. The residual stream is carried in the compute dtype; norms, router, softmax, expert activations and
logits are float32. Four norms a layer: the second and the fourth act on the branch, before it is added.

Everything here runs on each device of a replica (`engine/sharding.py`, `on_mesh`), with that device's share of weights and cache; the
residual stream is whole on all of them.
"""

from functools import partial

import jax
import jax.numpy as jnp

from engine.batch import StepInput
from engine.config import ModelConfig
from engine.model.cache import KVCache, LayerCache, write_cache
from engine.model.params import LayerParams, Params
from engine.ops.attention import paged_attention
from engine.ops.linear import linear
from engine.ops.moe import Experts, mixture, route
from engine.ops.norm import rms_norm
from engine.ops.rope import rotate
from engine.ops.tiles import map_rows
from engine.shapes import Array, Float, Float32, Int32
from engine.sharding import concatenate_over_devices, first_own, sum_over_devices


def forward(params: Params, cache: KVCache, step: StepInput, config: ModelConfig) -> tuple[Float[Array, "t d"], KVCache]:
    """Hidden states of the step's tokens after the last layer, before the final norm, and the cache with their keys and values."""
    with jax.named_scope("embed"):
        x = embed(params.embedding, step.token_ids) * jnp.asarray(config.embedding_multiplier_scale, params.embedding.dtype)
    layers: list[LayerCache] = []
    for layer, layer_cache in zip(params.layers, cache, strict=True):
        x, layer_cache = decoder_layer(layer, layer_cache, x, step, config)
        layers.append(layer_cache)
    return x, tuple(layers)


def embed(embedding: Float[Array, "v d"], token_ids: Int32[Array, "t"]) -> Float[Array, "t d"]:
    """The rows of the tokens; each is on one device, the others add zeros."""
    places = token_ids - first_own("vocab", embedding.shape[0])
    is_own = (places >= 0) & (places < embedding.shape[0])
    rows = embedding[jnp.where(is_own, places, 0)]
    return sum_over_devices(jnp.where(is_own[:, None], rows, jnp.zeros_like(rows)))


@partial(jax.jit, static_argnames="config")  # traced once for all layers and kinds of step; XLA inlines it
def decoder_layer(
    params: LayerParams, cache: LayerCache, x: Float[Array, "t d"], step: StepInput, config: ModelConfig
) -> tuple[Float[Array, "t d"], LayerCache]:
    """One layer: attention branch, then expert branch, each a sum of what the devices make of their heads and their part of the experts."""
    num_tokens = step.counts[0]

    def project(x: Float[Array, "rows d"], positions: Int32[Array, "rows"]) -> tuple[Array, Array, Array]:
        a = rms_norm(x, params.pre_attention_norm, config.rms_norm_eps)
        q, k, v = (
            linear(a, weight).astype(x.dtype).reshape(x.shape[0], -1, config.key_size)
            for weight in (params.query, params.key, params.value)
        )
        return rotate(q, positions, config.rope_base), rotate(k, positions, config.rope_base), v

    def close_attention(x: Float[Array, "rows d"], branch: Float32[Array, "rows d"]) -> tuple[Array, Array, Array, Array]:
        x = x + rms_norm(branch.astype(x.dtype), params.post_attention_norm, config.rms_norm_eps)
        a = rms_norm(x, params.pre_moe_norm, config.rms_norm_eps)
        probs = jax.nn.softmax(linear(a.astype(jnp.float32), params.router), axis=-1)
        return x, a, *route(probs, config.num_selected_experts)

    def close_moe(x: Float[Array, "rows d"], branch: Float32[Array, "rows d"]) -> Float[Array, "rows d"]:
        return x + rms_norm(branch.astype(x.dtype), params.post_moe_norm, config.rms_norm_eps)

    with jax.named_scope("attention"):
        q, k, v = map_rows(project, num_tokens, x, step.positions)
        cache = LayerCache(write_cache(cache.keys, k, step.cache_slots), write_cache(cache.values, v, step.cache_slots))
        heads = paged_attention(q, cache, step, multiplier=config.attn_output_multiplier, cap=config.attn_logit_cap)
        branch = sum_over_devices(map_rows(lambda heads: linear(heads, params.attention_out), num_tokens, heads))
    with jax.named_scope("moe"):
        x, a, weights, chosen = map_rows(close_attention, num_tokens, x, branch)
        experts = Experts(params.experts_gate, params.experts_up, params.experts_down)
        own = chosen - first_own("expert", experts.gate.shape[0])
        branch = sum_over_devices(mixture(a, weights, own, experts, num_tokens))
        return map_rows(close_moe, num_tokens, x, branch), cache


def logits_of(params: Params, x: Float[Array, "rows d"], config: ModelConfig) -> Float32[Array, "rows v"]:
    """Final norm, tied head, and the head's own multiplier, in float32."""
    h = rms_norm(x, params.final_norm, config.rms_norm_eps)
    product = jnp.matmul(h, params.embedding.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return concatenate_over_devices(product * config.output_multiplier_scale)
