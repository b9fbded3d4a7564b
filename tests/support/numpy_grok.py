"""Grok-1 once more, in NumPy float64: dense attention over the whole prompt, no cache, no batch, one expert after the other.

Follows the description of the released code (xai-org/grok-1, model.py), shares no arithmetic with `engine/model` or `engine/ops`, and is
what they are compared with.
"""

import jax
import numpy as np
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.model.params import LayerParams, Params

Floats = NDArray[np.float64]


def numpy_logits(params: Params, prompt: list[int], config: ModelConfig) -> Floats:
    """Logits [prompt length, V] of plain (not quantised) weights."""
    return logits_of_weights(jax.tree.map(lambda array: np.asarray(array).astype(np.float64), params), prompt, config)


def logits_of_weights(weights: Params, prompt: list[int], config: ModelConfig, *, first: int = 0) -> Floats:
    """The logits from position `first` on. Weights are float64 arrays, or whatever NumPy can multiply with and index like these."""
    x = weights.embedding[prompt] * config.embedding_multiplier_scale
    for layer in weights.layers:
        attended = _attention(layer, _norm(x, layer.pre_attention_norm, config), config)
        x = x + _norm(attended, layer.post_attention_norm, config)
        mixed = _experts(layer, _norm(x, layer.pre_moe_norm, config), config)
        x = x + _norm(mixed, layer.post_moe_norm, config)
    return _norm(x[first:], weights.final_norm, config) @ weights.embedding.T * config.output_multiplier_scale


def _norm(x: Floats, scale: Floats, config: ModelConfig) -> Floats:
    return scale * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps)


def _attention(layer: LayerParams, a: Floats, config: ModelConfig) -> Floats:
    length, width = len(a), config.key_size
    queries = (a @ layer.query).reshape(length, config.num_q_heads, width)
    keys = (a @ layer.key).reshape(length, config.num_kv_heads, width)
    values = (a @ layer.value).reshape(length, config.num_kv_heads, width)
    queries, keys = _rotated(queries, config), _rotated(keys, config)
    heads: list[Floats] = []
    for head in range(config.num_q_heads):
        shared = head // (config.num_q_heads // config.num_kv_heads)
        scores = queries[:, head] @ keys[:, shared].T * config.attn_output_multiplier
        scores = config.attn_logit_cap * np.tanh(scores / config.attn_logit_cap)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        heads.append(_softmax(scores) @ values[:, shared])
    return np.concatenate(heads, axis=1) @ layer.attention_out


def _rotated(x: Floats, config: ModelConfig) -> Floats:
    """Every pair (i, i + C/2) as one complex number, turned by position * base ** (-2i / C)."""
    half = config.key_size // 2
    angles = np.arange(len(x))[:, None] * config.rope_base ** (-2 * np.arange(half) / config.key_size)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _experts(layer: LayerParams, a: Floats, config: ModelConfig) -> Floats:
    probs = _softmax(a @ layer.router)
    chosen = np.argsort(-probs, kind="stable", axis=1)[:, : config.num_selected_experts]
    mixed = np.zeros_like(a)
    for expert in np.unique(chosen):
        gate, up, down = layer.experts_gate[expert], layer.experts_up[expert], layer.experts_down[expert]
        tokens = np.flatnonzero((chosen == expert).any(axis=1))
        hidden = _gelu(a[tokens] @ gate) * (a[tokens] @ up)
        mixed[tokens] += probs[tokens, expert, None] * (hidden @ down)
    return mixed


def _gelu(y: Floats) -> Floats:
    return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


def _softmax(x: Floats) -> Floats:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
