"""A directory in the released layout, checked file by file against the configuration before anything is loaded: all or nothing.

The release has no index and no names. File number i holds the i-th tensor in the order of the names sorted as strings, so that layer 10
comes before layer 2. `checkpoint.open_checkpoint` calls this for directories with such files.
"""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from engine.checkpoint.released_format import StoredTensor, read_index
from engine.checkpoint.tensors import Checkpoint, FileArray, HostTensor, StoredArray
from engine.config import ModelConfig, is_tensor_file
from engine.errors import CheckpointError
from engine.model.params import LayerParams, Params, ParamSpec, each_spec, param_specs

CHECKPOINT_DIR_NAMES = ("ckpt-0", "ckpt")


class MismatchError(CheckpointError):
    """Sound files, but not of the model that the configuration describes."""


def tensor_file_name(index: int) -> str:
    """Name of the file that holds tensor `index`; the release has one shard per tensor."""
    return f"tensor{index:05d}_000"


def specs_in_file_order(config: ModelConfig) -> list[ParamSpec]:
    """All specs in the order of the files: by name as strings, as JAX flattens the original's parameters."""
    return sorted(each_spec(param_specs(config)), key=lambda spec: spec.name)


def released_dirs(model_dir: Path) -> list[Path]:
    """The folders with tensor files among `model_dir` itself, its `ckpt-0/` and its `ckpt/`.

    Other names that begin with `tensor` are no reason to take a folder for one; in the folder that is taken they are surplus files.
    """
    candidates = [directory for directory in (model_dir, *(model_dir / name for name in CHECKPOINT_DIR_NAMES)) if directory.is_dir()]
    return [directory for directory in candidates if any(map(is_tensor_file, _tensor_names(directory)))]


def find_released_dir(model_dir: Path) -> Path:
    """The folder of the tensor files. Raises `CheckpointError` where there is more than one of the `released_dirs`, or none."""
    holding = released_dirs(model_dir)
    if len(holding) > 1:
        raise CheckpointError(f"{model_dir}: tensor files in both {holding[0]} and {holding[1]}; name one of them, or remove one")
    if not holding:
        raise CheckpointError(f"{model_dir}: holds no files tensor00000_000 ...")
    return holding[0]


def open_released(directory: Path, config: ModelConfig, *, report: Callable[[HostTensor], None] | None = None) -> Checkpoint:
    """Check the folder of the tensor files. Raises `MismatchError` for files of another model, else `CheckpointError`."""
    _check_file_names(directory, config)
    tensors: dict[str, HostTensor] = {}
    row_groups = config.row_parallel_scale_groups
    for index, spec in enumerate(specs_in_file_order(config)):
        stored = read_index(directory / tensor_file_name(index))
        _check_weight(spec, stored)
        if stored.scales:
            groups = check_scales(stored.path, spec, stored.scales, groups=row_groups if spec.is_row_parallel else 1)
            row_groups = groups if spec.is_row_parallel else row_groups
        tensors[spec.name] = tensor = _host_tensor(spec, stored)
        if report:
            report(tensor)
    return Checkpoint(format="released", directory=directory, tensors=tensors, row_parallel_scale_groups=row_groups or 1)


def check_scales(path: Path, spec: ParamSpec, scales: StoredArray, *, groups: int | None) -> int:
    """The number of scale groups in the file; `groups` is what it must be, or None where the first file decides."""
    *lead, contracting, columns = spec.shape
    found = scales.shape[-2] if len(scales.shape) == len(spec.shape) else 0
    expected = [*lead, found if groups is None else groups, columns]
    if list(scales.shape) != expected or found < 1 or contracting % found:
        wanted = f"a divisor of {contracting:,}" if groups is None else f"{groups}"
        raise MismatchError(
            f"{path}: expected {spec.name} with scales [{', '.join(map(str, [*lead, 'groups', columns]))}], "
            f"groups being {wanted}, found scales {list(scales.shape)}"
        )
    return found


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
            raise MismatchError(f"{directory / tensor_file_name(index)}: is missing; {expects}, found {len(found):,}")
    if len(found) > num_expected:
        surplus = min(name for name in found if not _is_expected(name, num_expected))
        raise MismatchError(f"{directory / surplus}: is a surplus file; {expects}, found {len(found):,}")


def _is_expected(name: str, num_expected: int) -> bool:
    match = re.fullmatch(r"tensor(\d{5,})_000", name, flags=re.ASCII)
    return match is not None and int(match[1]) < num_expected and name == tensor_file_name(int(match[1]))


def _check_weight(spec: ParamSpec, stored: StoredTensor) -> None:
    expected_dtype = "int8" if spec.is_quantized else "float32"
    if (
        stored.weight.dtype != expected_dtype
        or stored.weight.shape != spec.shape
        or (stored.scales is None) == spec.is_quantized
        or (stored.scales is not None and stored.scales.dtype != "bfloat16")
    ):
        scales = " with bfloat16 scales" if spec.is_quantized else ""
        found = f"{stored.weight}" + (f" with scales {stored.scales}" if stored.scales else "")
        raise MismatchError(f"{stored.path}: expected {spec.name} as {expected_dtype} {list(spec.shape)}{scales}, found {found}")


def _host_tensor(spec: ParamSpec, stored: StoredTensor) -> HostTensor:
    def locate(array: StoredArray) -> FileArray:
        return FileArray(path=stored.path, file_size=stored.file_size, stored=array)

    return HostTensor(
        spec=spec,
        form="int8" if stored.scales else "float32",
        weight_source=locate(stored.weight),
        scales_source=locate(stored.scales) if stored.scales else None,
    )
