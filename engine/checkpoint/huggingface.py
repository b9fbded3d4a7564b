"""Grok-1 as Hugging Face repositories hold it: hpcai-tech/grok-1 and keyfan/grok-1-hf, in safetensors or in torch's `.bin` files.

Their matrices are dequantised, in bfloat16 (or float32), transposed to `[out, in]`, and each expert has its own. Here they look like the
release: transposed, and the experts of a layer stacked, both only as a view, so that a slice reads what it needs and no more.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.files import read_small_file
from engine.checkpoint.safetensors_format import read_safetensors
from engine.checkpoint.tensors import Checkpoint, FileArray, HostArray, HostTensor, StoredDType
from engine.checkpoint.torch_format import read_torch
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.params import ParamSpec, each_spec, param_specs

_MAX_INDEX_BYTES = 64 << 20
_HEAD = "lm_head.weight"
_EMBEDDINGS = {"model.embed_tokens.weight": "hpcai-tech/grok-1", "transformer.in_out_embed.weight": "keyfan/grok-1-hf"}
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # computed, in checkpoints of older libraries
_COMPARED_ROWS = 64  # of the head with the embedding

_FILE = re.compile(r"(?P<stem>model|pytorch_model)(-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5}))?\.(?P<kind>safetensors|bin)", re.ASCII)
_INDEXES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


@dataclass(frozen=True, slots=True)
class TransposedArray:
    """A matrix `[out, in]` of a file as `[in, out]`."""

    stored: FileArray

    @property
    def dtype(self) -> StoredDType:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes

    @property
    def regions(self) -> tuple[FileArray, ...]:
        return (self.stored,)

    def open(self) -> np.ndarray:
        return self.stored.open().T


@dataclass(frozen=True, slots=True)
class StackedArray:
    """The matrices of a layer's experts, each `[out, in]` in a place of its own, as `[experts, in, out]`."""

    stored: tuple[FileArray, ...]

    @property
    def dtype(self) -> StoredDType:
        return self.stored[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.stored), *self.stored[0].shape[::-1])

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.stored)

    @property
    def regions(self) -> tuple[FileArray, ...]:
        return self.stored

    def open(self) -> HostArray:
        return _Stack([array.open().T for array in self.stored])


@dataclass(frozen=True, slots=True)
class _Stack:
    """Maps, stacked where they are indexed."""

    matrices: list[np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.matrices), *self.matrices[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.matrices[0].dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = (slice(None),) if index is Ellipsis else index
        return np.stack([matrix[tuple(rest)] for matrix in self.matrices[first]])


def holds_huggingface(model_dir: Path) -> bool:
    """Whether a directory has files by the names of such a repository."""
    return any(_FILE.fullmatch(path.name) or path.name in _INDEXES.values() for path in model_dir.iterdir())


def open_huggingface(model_dir: Path, config: ModelConfig, *, report: Callable[[HostTensor], None] | None = None) -> Checkpoint:
    """Check every file's list of tensors against the index, where there is one, and against `config`. Raises `CheckpointError`."""
    arrays = _read_arrays(model_dir)
    embedding = next((name for name in _EMBEDDINGS if name in arrays), None)
    if embedding is None:
        raise CheckpointError(f"{model_dir}: holds neither {' nor '.join(_EMBEDDINGS)}, so it is no layout of Grok-1 that is known here")
    name_of = _hpcai_names if embedding.startswith("model.") else _keyfan_names
    _check_layers(model_dir, arrays, config)
    _check_head(arrays.get(_HEAD), arrays[embedding])
    unused = set(arrays) - {_HEAD}
    tensors: dict[str, HostTensor] = {}
    for spec in sorted(each_spec(param_specs(config)), key=lambda spec: spec.name):
        names = name_of(spec)
        if missing := [name for name in names if name not in arrays]:
            raise CheckpointError(f"{model_dir}: {missing[0]} is in none of its files")
        unused.difference_update(names)
        tensors[spec.name] = tensor = _tensor(spec, tuple(arrays[name] for name in names), names)
        if report:
            report(tensor)
    if surplus := sorted(name for name in unused if not _IGNORED.fullmatch(name)):
        raise CheckpointError(f"{arrays[surplus[0]].path}: {surplus[0][:200]!r} is no tensor of this model")
    return Checkpoint(format="huggingface", directory=model_dir, tensors=tensors)


def _read_arrays(model_dir: Path) -> dict[str, FileArray]:
    """All tensors by name; safetensors where a repository has both kinds of files."""
    names = {path.name for path in model_dir.iterdir()}
    files = [match for name in sorted(names) if (match := _FILE.fullmatch(name))]
    kinds = {match["kind"] for match in files} | {kind for kind, index in _INDEXES.items() if index in names}
    kind = "safetensors" if "safetensors" in kinds else "bin"
    index = model_dir / _INDEXES[kind]
    placed = _read_index(index) if index.name in names else None
    wanted = (
        sorted(set(placed.values())) if placed is not None else _complete(model_dir, [match for match in files if match["kind"] == kind])
    )
    arrays: dict[str, FileArray] = {}
    for file in wanted:
        path = model_dir / file
        found = read_safetensors(path).arrays if kind == "safetensors" else read_torch(path)
        for name in found:
            if name in arrays:
                raise CheckpointError(f"{path}: holds {name[:200]!r}, and so does {arrays[name].path.name}; two checkpoints were mixed")
            if placed is not None and placed.get(name) != file:
                where = f"has it in {placed[name]}" if name in placed else "does not know it"
                raise CheckpointError(
                    f"{path}: holds {name[:200]!r}, but {index.name} {where}; files were swapped or two checkpoints mixed"
                )
        arrays |= found
    if placed is not None and (missing := sorted(placed.keys() - arrays.keys())):
        raise CheckpointError(f"{model_dir / placed[missing[0]]}: lacks {missing[0][:200]!r}, which {index.name} has there")
    return arrays


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensor name."""
    try:
        raw = json.loads(read_small_file(path, max_bytes=_MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from None
    match raw:
        case {"weight_map": dict() as placed} if placed and all(
            isinstance(name, str) and isinstance(file, str) for name, file in placed.items()
        ):
            pass
        case _:
            raise CheckpointError(f"{path}: is damaged: expected a weight_map from names to files")
    for file in placed.values():
        if not _FILE.fullmatch(file):
            raise CheckpointError(f"{path}: names {file[:200]!r}, which is no file of this layout")
    return placed


def _complete(model_dir: Path, files: list[re.Match[str]]) -> list[str]:
    """The names of all files, without an index to say which there are. Raises `CheckpointError` where a number is missing."""
    counts = {match["count"] for match in files}
    if len(counts) != 1:
        raise CheckpointError(f"{model_dir}: {files[0][0]} and {files[-1][0]} are of two checkpoints; remove one of them")
    (count,) = counts
    if count is not None:
        present = {int(match["number"]) for match in files}
        if missing := sorted(set(range(1, int(count) + 1)) - present):
            raise CheckpointError(f"{model_dir}: file {missing[0]:05d} of {count} is missing")
    return [match[0] for match in files]


def _check_layers(model_dir: Path, arrays: Mapping[str, FileArray], config: ModelConfig) -> None:
    """Compare numbers alone, before the specs are built: a configuration may claim any number of layers."""
    layers = {
        int(match[1]) for name in arrays if (match := re.match(r"(?:model\.layers|transformer\.decoder_layer)\.([0-9]{1,9})\.", name))
    }
    if len(layers) != config.num_layers or layers != set(range(config.num_layers)):
        raise CheckpointError(f"{model_dir}: holds {len(layers):,} layers, config.json has {config.num_layers:,}")


def _check_head(head: FileArray | None, embedding: FileArray) -> None:
    """The release's head is its embedding; a repository may hold it twice. Some rows of it tell."""
    if head is None or head == embedding:
        return
    if head.shape == embedding.shape:
        step = max(1, head.shape[0] // _COMPARED_ROWS)
        if np.array_equal(head.open()[::step], embedding.open()[::step]):
            return
    raise CheckpointError(f"{head.path}: {_HEAD} is not the embedding; Grok-1's head and embedding are one tensor")


def _tensor(spec: ParamSpec, arrays: tuple[FileArray, ...], names: tuple[str, ...]) -> HostTensor:
    is_matrix = "vocab" not in spec.axes and len(spec.shape) > 1
    expected = spec.shape[-2:][::-1] if is_matrix else spec.shape
    for name, array in zip(names, arrays, strict=True):
        if array.shape != expected or array.dtype not in ("bfloat16", "float32") or array.dtype != arrays[0].dtype:
            wanted = f"bfloat16 or float32 {list(expected)}"
            raise CheckpointError(f"{array.path}: expected {name} as {wanted}, found {array.stored}")
    source = StackedArray(arrays) if "expert" in spec.axes else TransposedArray(arrays[0]) if is_matrix else arrays[0]
    return HostTensor(spec=spec, form="bfloat16" if source.dtype == "bfloat16" else "float32", weight_source=source)


_HPCAI = {
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


def _hpcai_names(spec: ParamSpec) -> tuple[str, ...]:
    """Names in hpcai-tech/grok-1, one for each expert where there are several."""
    layer, kind = _split(spec)
    if layer is None:
        return ("model.embed_tokens.weight" if kind == "in_out_embed" else "model.norm.scale",)
    if "expert" in spec.axes:
        matrix = kind.removeprefix("moe/")
        return tuple(f"model.layers.{layer}.moe_block.experts.{expert}.{matrix}.weight" for expert in range(spec.shape[0]))
    return (f"model.layers.{layer}.{_HPCAI[kind]}",)


def _keyfan_names(spec: ParamSpec) -> tuple[str, ...]:
    """Names in keyfan/grok-1-hf, which are the release's with dots."""
    layer, kind = _split(spec)
    if layer is None:
        return (f"transformer.{kind}.weight",)
    if "expert" in spec.axes:
        matrix = kind.removeprefix("moe/")
        return tuple(f"transformer.decoder_layer.{layer}.moe.{expert}.{matrix}.weight" for expert in range(spec.shape[0]))
    return (f"transformer.decoder_layer.{layer}.{kind.replace('/', '.')}.weight",)


def _split(spec: ParamSpec) -> tuple[int | None, str]:
    """Number of the layer and what it is there, of a released name."""
    match = re.fullmatch(r"transformer/decoder_layer_([0-9]+)/(.+)", spec.name)
    return (int(match[1]), match[2]) if match else (None, spec.name.removeprefix("language_model/"))
