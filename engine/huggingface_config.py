"""The `config.json` of Grok-1's Hugging Face layouts, in our own words.

Two repositories hold the release converted for transformers: hpcai-tech/grok-1 (model type `grok-1`) and keyfan/grok-1-hf (`grok`). Their
keys are read here for `config.ModelConfig`; the weights are `checkpoint/huggingface.py`'s. Keys that concern training or the library are
ignored.
"""

from typing import Any

from engine.errors import ConfigError

_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "sequence_len",
    "hidden_size": "emb_size",
    "head_dim": "key_size",
    "num_attention_heads": "num_q_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_hidden_layers": "num_layers",
    "num_experts": "num_experts",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_selected_experts",
    "intermediate_size": "ffn_size",
    "embedding_multiplier_scale": "embedding_multiplier_scale",
    "output_multiplier_scale": "output_multiplier_scale",
    "attn_output_multiplier": "attn_output_multiplier",
    "max_attn_value": "attn_logit_cap",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_base",
    "pad_token_id": "pad_token",
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
}

# What would make it another model than Grok-1, and the values with which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("grok-1", "grok"),
    "hidden_act": ("gelu_new", "gelu_pytorch_tanh", "gelu"),  # the release's is the tanh form, whatever a port calls it
    "tie_word_embeddings": (True,),
    "rope_scaling": (None,),
    "residual_moe": (False,),
    "final_logit_softcapping": (None, 0),
    "router_logit_softcapping": (None, 0),
    "quantization_config": (None,),
}


def is_huggingface(raw: dict[str, Any]) -> bool:
    """Whether the parsed content of a `config.json` is such a one."""
    return "hidden_size" in raw and "num_hidden_layers" in raw


def model_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig`, unchecked. Raises `ConfigError` for what no Grok-1 has."""
    for key, allowed in _NEUTRAL.items():
        if key in raw and raw[key] not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise ConfigError(f"model config: {key} is {raw[key]!r}, which is not Grok-1; expected {expected}")
    if "num_experts" in raw and "num_local_experts" in raw and raw["num_experts"] != raw["num_local_experts"]:
        raise ConfigError(f"model config: num_experts {raw['num_experts']} contradicts num_local_experts {raw['num_local_experts']}")
    found = {field: raw[key] for key, field in _FIELDS.items() if raw.get(key) is not None}
    if "key_size" not in found:
        heads, width = found.get("num_q_heads"), found.get("emb_size")
        if not isinstance(heads, int) or not isinstance(width, int) or heads < 1 or width % heads:
            raise ConfigError(f"model config: num_attention_heads {heads!r} does not divide hidden_size {width!r}; set head_dim")
        found["key_size"] = width // heads
    return found
