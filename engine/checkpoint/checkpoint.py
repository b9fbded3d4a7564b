"""A whole checkpoint in the released layout, checked file by file against the configuration before anything is loaded: all or nothing.

The release has no index and no names. File number i holds the i-th tensor in the order of the names sorted as strings, so that layer 10
comes before layer 2. `load` turns the result into device arrays, `verify` reads every byte; neither has to check shapes again.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np

from engine.checkpoint.released_format import StoredArray, StoredTensor, read_index
from engine.config import ModelConfig, find_model_config, is_tensor_file
from engine.errors import CheckpointError
from engine.model.params import LayerParams, Params, ParamSpec, each_spec, param_specs

CHECKPOINT_DIR_NAMES = ("ckpt-0", "ckpt")


class _MismatchError(CheckpointError):
    """Sound files, but not of the model that the configuration describes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTensor:
    """One checked tensor. `weight` and `scales` map the file anew each time they are asked for, so keep them no longer than needed."""

    spec: ParamSpec
    stored: StoredTensor

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and scales together."""
        return self.stored.weight.num_bytes + (self.stored.scales.num_bytes if self.stored.scales else 0)

    @property
    def weight(self) -> np.ndarray:
        """Read-only map: int8 [*lead, k, n] where the spec is quantised, else float32 of the spec's shape. Raises `CheckpointError`."""
        return self.stored.map_weight()

    @property
    def scales(self) -> np.ndarray | None:
        """Read-only map, bfloat16 [*lead, groups, n], or None for a float32 tensor. Raises `CheckpointError`."""
        return self.stored.map_scales()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Every tensor of a model, by released name, in the order of the files on disk."""

    directory: Path
    tensors: dict[str, HostTensor]
    row_parallel_scale_groups: int

    @property
    def num_params(self) -> int:
        return sum(tensor.spec.num_params for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights and scales."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(tensor.stored.file_size for tensor in self.tensors.values())


def tensor_file_name(index: int) -> str:
    """Name of the file that holds tensor `index`; the release has one shard per tensor."""
    return f"tensor{index:05d}_000"


def specs_in_file_order(config: ModelConfig) -> list[ParamSpec]:
    """All specs in the order of the files: by name as strings, as JAX flattens the original's parameters."""
    return sorted(each_spec(param_specs(config)), key=lambda spec: spec.name)


def find_checkpoint_dir(model_dir: Path) -> Path:
    """The folder of the tensor files: `ckpt-0/` or `ckpt/` inside `model_dir`, or `model_dir` itself.

    Raises `CheckpointError` where none or more than one of them holds tensor files. Other names that begin with `tensor` are no reason to
    take a folder for one; in the folder that is taken they are surplus files.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: expected a directory with a checkpoint, found {'a file' if model_dir.exists() else 'nothing'}")
    candidates = [directory for directory in (model_dir, *(model_dir / name for name in CHECKPOINT_DIR_NAMES)) if directory.is_dir()]
    holding = [directory for directory in candidates if any(map(is_tensor_file, _tensor_names(directory)))]
    if not holding:
        raise CheckpointError(f"{model_dir}: holds no checkpoint; expected files tensor00000_000 ... in it, in its ckpt-0/ or in its ckpt/")
    if len(holding) > 1:
        raise CheckpointError(f"{model_dir}: tensor files in both {holding[0]} and {holding[1]}; name one of them, or remove one")
    return holding[0]


def open_checkpoint(model_dir: Path, config: ModelConfig, *, report: Callable[[HostTensor], None] | None = None) -> Checkpoint:
    """Read the index of every file and check it against `config`; `report` hears of each tensor as soon as it is checked.

    Raises `CheckpointError`, naming the file, what was expected and what was found, for a missing, surplus, damaged or mismatched file.
    """
    try:
        return _open_checked(find_checkpoint_dir(model_dir), config, report=report)
    except _MismatchError as error:
        if find_model_config(model_dir) is not None:
            raise
        keys = ", ".join(field.name for field in fields(ModelConfig) if field.default is MISSING)
        raise CheckpointError(
            f"{error}; config.json is missing, so the files were compared with the released 314B model. "
            f"If they are of another one, write a config.json into {model_dir} with {keys}"
        ) from None


def _open_checked(directory: Path, config: ModelConfig, *, report: Callable[[HostTensor], None] | None) -> Checkpoint:
    _check_file_names(directory, config)
    tensors: dict[str, HostTensor] = {}
    row_groups = config.row_parallel_scale_groups
    for index, spec in enumerate(specs_in_file_order(config)):
        tensor = HostTensor(spec=spec, stored=read_index(directory / tensor_file_name(index)))
        _check_weight(tensor)
        if tensor.stored.scales:
            groups = _check_scales(tensor, tensor.stored.scales, groups=row_groups if spec.is_row_parallel else 1)
            row_groups = groups if spec.is_row_parallel else row_groups
        tensors[spec.name] = tensor
        if report:
            report(tensor)
    return Checkpoint(directory=directory, tensors=tensors, row_parallel_scale_groups=row_groups or 1)


def _tensor_names(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir() if path.name.startswith("tensor")}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from None


def _check_file_names(directory: Path, config: ModelConfig) -> None:
    """Compare names alone, before the specs are built: a configuration may claim any number of layers."""
    found = _tensor_names(directory)
    num_expected = len(fields(Params)) - 1 + len(fields(LayerParams)) * config.num_layers
    expects = f"a model of {config.num_layers:,} layers has {num_expected:,} files tensor00000_000 to {tensor_file_name(num_expected - 1)}"
    for index in range(min(num_expected, len(found) + 1)):
        if tensor_file_name(index) not in found:
            raise _MismatchError(f"{directory / tensor_file_name(index)}: is missing; {expects}, found {len(found):,}")
    if len(found) > num_expected:
        surplus = min(name for name in found if not _is_expected(name, num_expected))
        raise _MismatchError(f"{directory / surplus}: is a surplus file; {expects}, found {len(found):,}")


def _is_expected(name: str, num_expected: int) -> bool:
    match = re.fullmatch(r"tensor(\d{5,})_000", name, flags=re.ASCII)
    return match is not None and int(match[1]) < num_expected and name == tensor_file_name(int(match[1]))


def _check_weight(tensor: HostTensor) -> None:
    spec, stored = tensor.spec, tensor.stored
    expected_dtype = "int8" if spec.is_quantized else "float32"
    if (
        stored.weight.dtype != expected_dtype
        or stored.weight.shape != spec.shape
        or (stored.scales is None) == spec.is_quantized
        or (stored.scales is not None and stored.scales.dtype != "bfloat16")
    ):
        scales = " with bfloat16 scales" if spec.is_quantized else ""
        found = f"{stored.weight}" + (f" with scales {stored.scales}" if stored.scales else "")
        raise _MismatchError(f"{tensor.path}: expected {spec.name} as {expected_dtype} {list(spec.shape)}{scales}, found {found}")


def _check_scales(tensor: HostTensor, scales: StoredArray, *, groups: int | None) -> int:
    """The number of scale groups in the file; `groups` is what it must be, or None where the first file decides."""
    *lead, contracting, columns = tensor.spec.shape
    found = scales.shape[-2] if len(scales.shape) == len(tensor.spec.shape) else 0
    expected = [*lead, found if groups is None else groups, columns]
    if list(scales.shape) != expected or found < 1 or contracting % found:
        wanted = f"a divisor of {contracting:,}" if groups is None else f"{groups}"
        raise _MismatchError(
            f"{tensor.path}: expected {tensor.spec.name} with scales [{', '.join(map(str, [*lead, 'groups', columns]))}], "
            f"groups being {wanted}, found scales {list(scales.shape)}"
        )
    return found
