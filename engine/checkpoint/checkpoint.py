"""Opening a model directory, whatever the format of its checkpoint: the one place that tells the formats apart.

`load` turns the result into device arrays, `verify` reads every byte, `convert` writes another one; none of them has to check shapes again.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal

from engine.checkpoint.huggingface import holds_huggingface, open_huggingface
from engine.checkpoint.released import MismatchError, find_released_dir, open_released, released_dirs
from engine.checkpoint.store import holds_store, open_store
from engine.checkpoint.tensors import Checkpoint, HostTensor
from engine.config import ModelConfig, find_model_config
from engine.errors import CheckpointError

Format = Literal["released", "store", "huggingface"]


def open_checkpoint(model_dir: Path, config: ModelConfig, *, report: Callable[[HostTensor], None] | None = None) -> Checkpoint:
    """Read the index of every file and check it against `config`; `report` hears of each tensor that is sound.

    Raises `CheckpointError`, naming the file, what was expected and what was found, for a missing, surplus, damaged or mismatched file.
    """
    match find_format(model_dir):
        case "store":
            return open_store(model_dir, config, report=report)
        case "huggingface":
            return open_huggingface(model_dir, config, report=report)
        case "released":
            return _open_released(model_dir, config, report=report)


def find_format(model_dir: Path) -> Format:
    """What the files of a directory are by their names. Raises `CheckpointError` for no checkpoint or more than one."""
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: expected a directory with a checkpoint, found {'a file' if model_dir.exists() else 'nothing'}")
    found = formats_in(model_dir)
    if len(found) > 1:
        raise CheckpointError(f"{model_dir}: holds files of two checkpoints, {_LOOKS[found[0]]} and {_LOOKS[found[1]]}; remove one of them")
    if not found:
        raise CheckpointError(f"{model_dir}: holds no checkpoint; expected {', '.join(_LOOKS.values())}")
    return found[0]


def formats_in(model_dir: Path) -> list[Format]:
    """All that the files of a directory may be, by their names."""
    found: list[Format] = []
    if holds_store(model_dir):
        found.append("store")
    if released_dirs(model_dir):
        found.append("released")
    if holds_huggingface(model_dir):
        found.append("huggingface")
    return found


_LOOKS: dict[Format, str] = {
    "released": "the release's tensor00000_000 ... in it, in its ckpt-0/ or in its ckpt/",
    "store": "a conversion's manifest.json and weights-*.safetensors",
    "huggingface": "a Hugging Face layout's model*.safetensors or pytorch_model*.bin",
}


def _open_released(model_dir: Path, config: ModelConfig, *, report: Callable[[HostTensor], None] | None) -> Checkpoint:
    try:
        return open_released(find_released_dir(model_dir), config, report=report)
    except MismatchError as error:
        if find_model_config(model_dir) is not None:
            raise
        keys = ", ".join(field.name for field in fields(ModelConfig) if field.default is MISSING)
        raise CheckpointError(
            f"{error}; config.json is missing, so the files were compared with the released 314B model. "
            f"If they are of another one, write a config.json into {model_dir} with {keys}"
        ) from None
