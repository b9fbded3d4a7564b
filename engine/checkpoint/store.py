"""Our own format, which `convert` writes: a few safetensors files of bounded size and a manifest that was written last.

    manifest.json                format version, configuration, form of the weights; size, SHA-256 and tensors of every file
    weights-00001.safetensors    `NAME.weight` and `NAME.scales`, names as in the release; the header says which conversion and file it is
    config.json, tokenizer.model
    conversion.json              only while a conversion is unfinished: what is done of it

A directory without its manifest is unfinished and refused. Swapped files, and files of two conversions in one directory, show in their
headers, so that opening need not read the weights; `verify` compares their digests.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engine.checkpoint.files import read_small_file
from engine.checkpoint.released import check_scales
from engine.checkpoint.safetensors_format import SafetensorsFile, read_safetensors
from engine.checkpoint.tensors import Checkpoint, HostTensor, StoredArray, StoredDType, WeightForm
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.params import LayerParams, Params, ParamSpec, each_spec, param_specs

FORMAT = "grok-server"
VERSION = 1
MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "conversion.json"
COPIED_NAMES = ("config.json", "tokenizer.model")

INT4_GROUPS = (64, 128)  # rows that share a scale

_MAX_MANIFEST_BYTES = 64 << 20
_MAX_COPIED_BYTES = 256 << 20
_REMEDY = "copy all files of one conversion here again, or convert again"

Arrays = dict[str, tuple[StoredDType, tuple[int, ...]]]  # type and shape, by name


def weights_file_name(number: int) -> str:
    """Files are counted from one."""
    return f"weights-{number:05d}.safetensors"


def is_weights_file(name: str) -> bool:
    """Whether a name is a conversion's, of a finished file or of one being written."""
    return re.fullmatch(r"weights-[0-9]{5}\.safetensors(\.part)?", name, flags=re.ASCII) is not None


def holds_store(model_dir: Path) -> bool:
    """Whether a directory is a conversion's, whole or not."""
    try:
        names = {path.name for path in model_dir.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{model_dir}: cannot be listed: {error.strerror}") from None
    return JOURNAL_NAME in names or any(map(is_weights_file, names)) or (MANIFEST_NAME in names and _is_own(model_dir / MANIFEST_NAME))


def arrays_of(spec: ParamSpec, form: WeightForm, groups: int | None) -> Arrays:
    """What is stored of one tensor. `groups` are the scale groups of int8 and int4."""
    if form in ("float32", "bfloat16"):
        return {"weight": (form, spec.shape)}
    *lead, k, n = spec.shape
    assert groups is not None
    weight: tuple[StoredDType, tuple[int, ...]] = ("int8", spec.shape) if form == "int8" else ("uint8", (*lead, k // 2, n))
    return {"weight": weight, "scales": ("bfloat16", (*lead, groups, n))}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file, as the manifest has it."""

    name: str
    form: WeightForm
    arrays: Arrays

    @property
    def num_bytes(self) -> int:
        return sum(StoredArray(dtype=dtype, shape=shape, offset=0).num_bytes for dtype, shape in self.arrays.values())

    def as_json(self) -> dict[str, Any]:
        arrays = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in self.arrays.items()}
        return {"name": self.name, "form": self.form, **arrays}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """One file of weights, as the manifest has it."""

    name: str
    size: int
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreManifest:
    """What of a manifest has to be known to open the files; digests of weights are read by `manifest.read_manifest`."""

    conversion: str  # which one wrote it: a digest of source and settings
    config: Mapping[str, Any]
    files: tuple[WeightsFile, ...]
    copied: Mapping[str, str]  # SHA-256 of the other files, by name


def open_store(model_dir: Path, config: ModelConfig, *, report: Callable[[HostTensor], None] | None = None) -> Checkpoint:
    """Check every file's header against the manifest, and the manifest against `config`. Raises `CheckpointError`."""
    path = model_dir / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(f"{model_dir}: holds no {MANIFEST_NAME}: a conversion was interrupted; run it again with the same arguments")
    manifest = read_store_manifest(path)
    _check_config(path, manifest, config)
    _check_copied(model_dir, manifest)
    _check_names(model_dir, manifest, config)
    specs = {spec.name: spec for spec in each_spec(param_specs(config))}
    tensors: dict[str, HostTensor] = {}
    row_groups = config.row_parallel_scale_groups
    for file in manifest.files:
        opened = _open_file(model_dir, file, conversion=manifest.conversion)
        for entry in file.tensors:
            if entry.name not in specs or entry.name in tensors:
                raise CheckpointError(f"{path}: names {entry.name[:200]!r}, which is {'twice in it' if entry.name in specs else 'unknown'}")
            tensors[entry.name] = tensor = _tensor(specs[entry.name], entry, opened)
            if tensor.form == "int8":
                row_groups = _check_int8_groups(tensor, row_groups)
            if report:
                report(tensor)
    if missing := sorted(specs.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: {missing[0]} is missing, of {len(specs):,} tensors found {len(tensors):,}")
    is_int8 = any(tensor.form == "int8" for tensor in tensors.values())
    return Checkpoint(
        format="store", directory=model_dir, tensors=tensors, row_parallel_scale_groups=(row_groups or 1) if is_int8 else None
    )


def read_store_manifest(path: Path) -> StoreManifest:
    """Raises `CheckpointError`, naming what is wrong with the manifest."""
    try:
        raw = json.loads(read_small_file(path, max_bytes=_MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}; {_REMEDY}") from None
    match raw:
        case {"format": "grok-server", "version": int() as version} if version != VERSION:
            raise CheckpointError(
                f"{path}: is of format version {version}, this program reads version {VERSION}; convert again, or upgrade"
            )
        case {
            "format": "grok-server",
            "version": int(),
            "conversion": str() as conversion,
            "config": dict() as config,
            "files": list() as files,
        }:
            parsed = [_parse_file(path, file) for file in files]
            copied = {file.name: str(raw["sha256"]) for file, raw in zip(parsed, files, strict=True) if not file.tensors}
            return StoreManifest(conversion=conversion, config=config, files=tuple(file for file in parsed if file.tensors), copied=copied)
        case _:
            raise CheckpointError(f"{path}: is damaged: expected format, version, conversion, config and files; {_REMEDY}")


def _is_own(path: Path) -> bool:
    try:
        raw = json.loads(read_small_file(path, max_bytes=_MAX_MANIFEST_BYTES))
    except (CheckpointError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def _parse_file(path: Path, raw: Any) -> WeightsFile:
    match raw:
        case {"file": str() as name, "size": int() as size, "sha256": str()} if not isinstance(size, bool):
            pass
        case _:
            raise CheckpointError(
                f"{path}: is damaged: expected every file with its name, size and sha256, found {str(raw)[:200]}; {_REMEDY}"
            )
    if name not in COPIED_NAMES and (not is_weights_file(name) or name.endswith(".part")):
        raise CheckpointError(f"{path}: names {name[:200]!r}, which is no file of a conversion; {_REMEDY}")
    tensors = raw.get("tensors", [])
    if not isinstance(tensors, list) or bool(tensors) != is_weights_file(name):
        raise CheckpointError(f"{path}: is damaged: {name} is listed without its tensors, or with some that it cannot have; {_REMEDY}")
    return WeightsFile(name=name, size=size, tensors=tuple(_parse_tensor(path, tensor) for tensor in tensors))


def _parse_tensor(path: Path, raw: Any) -> TensorEntry:
    match raw:
        case {"name": str() as name, "form": ("float32" | "bfloat16" | "int8" | "int4") as form, "weight": dict() as weight}:
            arrays = {"weight": weight} | ({"scales": raw["scales"]} if "scales" in raw else {})
        case _:
            raise CheckpointError(f"{path}: is damaged: expected a tensor with name, form and weight, found {str(raw)[:200]}; {_REMEDY}")
    found: Arrays = {}
    for key, array in arrays.items():
        match array:
            case {"dtype": ("float32" | "bfloat16" | "int8" | "uint8") as dtype, "shape": list() as shape}:
                found[key] = (dtype, tuple(shape))
            case _:
                raise CheckpointError(f"{path}: is damaged: the {key} of {name[:200]!r} have no dtype or shape; {_REMEDY}")
    return TensorEntry(name=name, form=form, arrays=found)


def _check_config(path: Path, manifest: StoreManifest, config: ModelConfig) -> None:
    given = asdict(config)
    for key in sorted(given.keys() | manifest.config.keys()):
        if given.get(key) != manifest.config.get(key):
            found, wanted = given.get(key), manifest.config.get(key)
            raise CheckpointError(f"{path}: was written for {key} {wanted}, config.json has {found}; put the converted config.json back")


def _check_copied(model_dir: Path, manifest: StoreManifest) -> None:
    """The small files are read anyway. One that is not there is missed by who needs it: a tokenizer may also be given by a flag."""
    for name, digest in manifest.copied.items():
        path = model_dir / name
        if os.path.lexists(path) and hashlib.sha256(read_small_file(path, max_bytes=_MAX_COPIED_BYTES)).hexdigest() != digest.lower():
            raise CheckpointError(f"{path}: is not the file that the conversion put here, by its digest in {MANIFEST_NAME}; {_REMEDY}")


def _check_names(model_dir: Path, manifest: StoreManifest, config: ModelConfig) -> None:
    """Compare names and numbers alone, before the specs are built: a configuration may claim any number of layers."""
    num_expected = len(fields(Params)) - 1 + len(fields(LayerParams)) * config.num_layers
    num_found = sum(len(file.tensors) for file in manifest.files)
    if num_found != num_expected:
        raise CheckpointError(
            f"{model_dir / MANIFEST_NAME}: names {num_found:,} tensors, a model of {config.num_layers:,} layers has {num_expected:,}"
        )
    names = {file.name for file in manifest.files}
    if surplus := sorted(path.name for path in model_dir.iterdir() if is_weights_file(path.name) and path.name not in names):
        raise CheckpointError(f"{model_dir / surplus[0]}: is a surplus file; {MANIFEST_NAME} does not name it")


def _open_file(model_dir: Path, file: WeightsFile, *, conversion: str) -> SafetensorsFile:
    path = model_dir / file.name
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: is missing, {MANIFEST_NAME} names it; {_REMEDY}")
    opened = read_safetensors(path)
    if opened.metadata.get("conversion") != conversion:
        raise CheckpointError(f"{opened.path}: is of another conversion than {MANIFEST_NAME}; two checkpoints were mixed; {_REMEDY}")
    if opened.metadata.get("file") != file.name:
        raise CheckpointError(
            f"{opened.path}: was written as {opened.metadata.get('file', 'another file')[:100]!r}; files were swapped; {_REMEDY}"
        )
    if opened.size != file.size:
        raise CheckpointError(f"{opened.path}: expected {file.size:,} bytes by its manifest, found {opened.size:,}; {_REMEDY}")
    expected: Arrays = {f"{entry.name}.{key}": array for entry in file.tensors for key, array in entry.arrays.items()}
    found: Arrays = {name: (array.dtype, array.shape) for name, array in opened.arrays.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted, there = _describe(expected.get(name)), _describe(found.get(name))
            raise CheckpointError(f"{opened.path}: expected {name[:200]} as {wanted} by {MANIFEST_NAME}, found {there}; {_REMEDY}")
    return opened


def _describe(array: tuple[StoredDType, tuple[int, ...]] | None) -> str:
    return "nothing" if array is None else f"{array[0]} {list(array[1])}"


def _tensor(spec: ParamSpec, entry: TensorEntry, opened: SafetensorsFile) -> HostTensor:
    if spec.is_quantized or entry.form in ("float32", "bfloat16"):
        groups = _num_groups(spec, entry)
        if entry.arrays == arrays_of(spec, entry.form, groups):
            arrays = {key: opened.arrays[f"{entry.name}.{key}"] for key in entry.arrays}
            return HostTensor(spec=spec, form=entry.form, weight_source=arrays["weight"], scales_source=arrays.get("scales"))
    found = ", ".join(f"{key} {_describe(array)}" for key, array in entry.arrays.items())
    raise CheckpointError(f"{opened.path}: expected {spec.name} of {list(spec.shape)} as {entry.form}, found {found}")


def _num_groups(spec: ParamSpec, entry: TensorEntry) -> int | None:
    """The scale groups that the manifest claims, or a number that nothing has where it cannot be."""
    if "scales" not in entry.arrays:
        return None if entry.form in ("float32", "bfloat16") else 0
    shape = entry.arrays["scales"][1]
    groups = shape[-2] if len(shape) == len(spec.shape) else 0
    is_possible = type(groups) is int and groups > 0 and spec.shape[-2] % groups == 0
    rows = spec.shape[-2] // groups if is_possible else 0
    return groups if is_possible and (entry.form == "int8" or rows % 2 == 0) else 0


def _check_int8_groups(tensor: HostTensor, row_groups: int | None) -> int | None:
    assert tensor.scales_source is not None
    scales = tensor.scales_source.regions[0].stored
    found = check_scales(tensor.path, tensor.spec, scales, groups=row_groups if tensor.spec.is_row_parallel else 1)
    return found if tensor.spec.is_row_parallel else row_groups
