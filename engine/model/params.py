"""Every weight, declared once: released name, shape, logical axes, whether it is stored as int8, and how random ones are drawn.

Expected files, random init, shardings and the memory count all come from `param_specs`. `Params` is one tree with three kinds of leaves,
depending on who asks: `ParamSpec` here, host arrays while loading, device arrays (or `QuantizedArray`) in the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from engine.config import ModelConfig

Axis = Literal["vocab", "model", "q_heads", "kv_heads", "expert", "ffn"]


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor of the released checkpoint."""

    name: str  # module path in the release, which also fixes the place on disk
    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]  # one logical axis per dimension
    is_quantized: bool = False  # int8 with scales, else float32
    is_row_parallel: bool = False  # contracts over a sharded axis: several scale groups
    fan_in: int | None = None  # random init draws with std fan_in**-0.5; None: ones

    @property
    def num_params(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LayerParams:
    """One decoder layer: four norms, attention, router and experts."""

    pre_attention_norm: Any  # [D]
    query: Any  # [D, H * C]
    key: Any  # [D, K * C]
    value: Any  # [D, K * C]
    attention_out: Any  # [H * C, D]
    post_attention_norm: Any  # [D]
    pre_moe_norm: Any  # [D]
    router: Any  # [D, E]
    experts_gate: Any  # [E, D, F], through GELU
    experts_up: Any  # [E, D, F]
    experts_down: Any  # [E, F, D]
    post_moe_norm: Any  # [D]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Params:
    """The whole model. The embedding is also the output head."""

    embedding: Any  # [V, D]
    layers: tuple[LayerParams, ...]
    final_norm: Any  # [D]


def layer_specs(config: ModelConfig, layer: int) -> LayerParams:
    """The specs of one layer. Released names: `linear` is the gate, `linear_v` the up and `linear_1` the down projection."""
    d, f, e = config.emb_size, config.ffn_size, config.num_experts
    q, kv = config.num_q_heads * config.key_size, config.num_kv_heads * config.key_size
    at = f"transformer/decoder_layer_{layer}/"

    def norm(name: str) -> ParamSpec:
        return ParamSpec(at + name, (d,), ("model",))

    def matrix(name: str, shape: tuple[int, ...], axes: tuple[Axis | None, ...], *, row_parallel: bool = False) -> ParamSpec:
        return ParamSpec(at + name, shape, axes, is_quantized=True, is_row_parallel=row_parallel, fan_in=shape[-2])

    return LayerParams(
        pre_attention_norm=norm("rms_norm"),
        query=matrix("multi_head_attention/query", (d, q), ("model", "q_heads")),
        key=matrix("multi_head_attention/key", (d, kv), ("model", "kv_heads")),
        value=matrix("multi_head_attention/value", (d, kv), ("model", "kv_heads")),
        attention_out=matrix("multi_head_attention/linear", (q, d), ("q_heads", "model"), row_parallel=True),
        post_attention_norm=norm("rms_norm_1"),
        pre_moe_norm=norm("rms_norm_2"),
        router=ParamSpec(at + "router", (d, e), ("model", None), fan_in=d),
        experts_gate=matrix("moe/linear", (e, d, f), ("expert", "model", "ffn")),
        experts_up=matrix("moe/linear_v", (e, d, f), ("expert", "model", "ffn")),
        experts_down=matrix("moe/linear_1", (e, f, d), ("expert", "ffn", "model"), row_parallel=True),
        post_moe_norm=norm("rms_norm_3"),
    )


@cache
def param_specs(config: ModelConfig) -> Params:
    """`Params` with a `ParamSpec` at every leaf."""
    d = config.emb_size
    return Params(
        embedding=ParamSpec("language_model/in_out_embed", (config.vocab_size, d), ("vocab", "model"), fan_in=d),
        layers=tuple(layer_specs(config, layer) for layer in range(config.num_layers)),
        final_norm=ParamSpec("language_model/rms_norm", (d,), ("model",)),
    )


def map_specs(function: Callable[[ParamSpec], Any], specs: Params) -> Params:
    """`Params` with `function(spec)` at every leaf, in the order of `specs`."""
    return jax.tree.map(function, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def each_spec(specs: Params) -> Iterator[ParamSpec]:
    """All specs, embedding first, final norm last."""
    yield specs.embedding
    for layer in specs.layers:
        for field in fields(layer):
            yield getattr(layer, field.name)
    yield specs.final_norm


def random_params(config: ModelConfig, *, seed: int, dtype: str) -> Params:
    """Unquantised random weights on the default device, for tests and benchmarks of shapes that nobody trained."""
    random = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> jax.Array:
        if spec.fan_in is None:
            return jnp.asarray(1 + 0.1 * random.standard_normal(spec.shape), jnp.float32)
        values = random.standard_normal(spec.shape, np.float32) * spec.fan_in**-0.5
        return jnp.asarray(values, dtype_of(spec, dtype))

    return map_specs(draw, param_specs(config))


def dtype_of(spec: ParamSpec, dtype: str) -> jnp.dtype:
    """Matrices are kept in the compute dtype; norms and the router always in float32."""
    return jnp.dtype(dtype) if spec.is_quantized or "vocab" in spec.axes else jnp.dtype(jnp.float32)
