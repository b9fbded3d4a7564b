"""Writes a checkpoint as the Hugging Face repositories hold it: their names, transposed bfloat16, in safetensors or in torch's `.bin`.

torch is not needed: a `.bin` is a zip archive with a pickle, whose opcodes are laid down here as torch's pickler does (protocol 2).
"""

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from engine.checkpoint.dequantize import real_slice
from engine.checkpoint.tensors import Checkpoint
from engine.config import ModelConfig

STORAGES = {np.dtype(ml_dtypes.bfloat16): "BFloat16Storage", np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage"}

HPCAI = {
    "rms_norm": "pre_attn_norm.scale",
    "rms_norm_1": "post_attn_norm.scale",
    "rms_norm_2": "pre_moe_norm.scale",
    "rms_norm_3": "post_moe_norm.scale",
    "multi_head_attention/query": "attn.q_proj.weight",
    "multi_head_attention/key": "attn.k_proj.weight",
    "multi_head_attention/value": "attn.v_proj.weight",
    "multi_head_attention/linear": "attn.o_proj.weight",
    "router": "moe_block.gate.weight",
}


def layout_of(checkpoint: Checkpoint, layout: str) -> dict[str, np.ndarray]:
    """All tensors in bfloat16 under the names of "hpcai" or "keyfan"."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in checkpoint.tensors.items():
        values = real_slice(tensor, (slice(None),) * len(tensor.spec.shape), ml_dtypes.bfloat16)
        if name.startswith("language_model/"):
            kind = name.removeprefix("language_model/")
            if layout == "hpcai":
                found["model.embed_tokens.weight" if kind == "in_out_embed" else "model.norm.scale"] = values
            else:
                found[f"transformer.{kind}.weight"] = values
            continue
        layer, kind = name.removeprefix("transformer/decoder_layer_").split("/", 1)
        matrices = {kind: values} if values.ndim < 3 else {f"moe/{e}/{kind[4:]}": matrix for e, matrix in enumerate(values)}
        for matrix_kind, matrix in matrices.items():
            if layout == "keyfan":
                place = f"transformer.decoder_layer.{layer}.{matrix_kind.replace('/', '.')}.weight"
            elif matrix_kind in HPCAI:
                place = f"model.layers.{layer}.{HPCAI[matrix_kind]}"
            else:
                place = f"model.layers.{layer}.moe_block.experts.{matrix_kind.removeprefix('moe/').replace('/', '.')}.weight"
            found[place] = np.ascontiguousarray(matrix.T) if matrix.ndim == 2 else matrix
    return found


def config_of(config: ModelConfig, layout: str) -> dict[str, Any]:
    """The `config.json` of such a repository."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "attn_output_multiplier": config.attn_output_multiplier,
        "embedding_multiplier_scale": config.embedding_multiplier_scale,
        "output_multiplier_scale": config.output_multiplier_scale,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": config.rms_norm_eps,
        "num_experts_per_tok": config.num_selected_experts,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "use_cache": True,
    }
    if layout == "hpcai":
        own = {"architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "num_experts": config.num_experts}
        return shared | own | {"max_attn_value": config.attn_logit_cap}
    own = {"architectures": ["GrokForCausalLM"], "model_type": "grok", "num_local_experts": config.num_experts}
    return shared | own | {"hidden_act": "gelu_new", "rope_theta": config.rope_base}


def write_repository(
    model_dir: Path, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], *, kind: str, num_files: int = 1, has_index: bool = True
) -> Path:
    """`arrays` over the files of a repository; `kind` is "safetensors" or "bin"."""
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps(config))
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = list(arrays)
    placed: dict[str, str] = {}
    for number in range(num_files):
        part = names[number::num_files]
        file = f"{stem}.{kind}" if num_files == 1 else f"{stem}-{number + 1:05d}-of-{num_files:05d}.{kind}"
        content = {name: arrays[name] for name in part}
        if kind == "safetensors":
            save_file(content, model_dir / file, metadata={"format": "pt"})
        else:
            write_torch(model_dir / file, content)
        placed |= dict.fromkeys(part, file)
    if num_files > 1 and has_index:
        index = {"metadata": {"total_size": 0}, "weight_map": placed}
        (model_dir / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return model_dir


def write_torch(
    path: Path, arrays: Mapping[str, np.ndarray], *, pickle: bytes | None = None, compression: int = zipfile.ZIP_STORED
) -> None:
    """A file as `torch.save` of a state dict writes it; `pickle` stands for another `data.pkl`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", torch_pickle(arrays) if pickle is None else pickle)
        archive.writestr("archive/byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", b"3\n")


def torch_pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An OrderedDict of tensors, each with a storage of its own, and the `_metadata` that a module's state dict carries."""
    items = b"".join(
        text(name) + tensor(STORAGES[array.dtype], str(key), array.shape, num_items=array.size)
        for key, (name, array) in enumerate(arrays.items())
    )
    metadata = b"}" + text("_metadata") + b"ccollections\nOrderedDict\n)Rsb"
    return b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(" + items + b"u" + metadata + b"."


def tensor(
    storage: str, key: str, shape: tuple[int, ...], *, num_items: int, offset: int = 0, strides: tuple[int, ...] | None = None
) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())`."""
    dense = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    reference = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(key) + text("cpu") + integer(num_items) + b"tQ"
    arguments = reference + integer(offset) + integers(shape) + integers(dense if strides is None else strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89ccollections\nOrderedDict\n)RtR"


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    """BININT1 or BININT."""
    return struct.pack("<cB", b"K", value) if 0 <= value < 256 else struct.pack("<ci", b"J", value)


def integers(values: tuple[int, ...]) -> bytes:
    """A tuple."""
    return b"(" + b"".join(map(integer, values)) + b"t"
