"""Fingerprint: a cheap sign that two machines have the same model.

Of the configuration and of the names and sizes of the checkpoint's files, whose contents may be hundreds of gigabytes: another model,
another form of the weights or half a download shows; two downloads of the same size do not.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from engine.config import ModelConfig, is_tensor_file
from engine.errors import CheckpointError

_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def fingerprint(model: ModelConfig, model_dir: Path) -> str:
    """Raises `CheckpointError` where the directory cannot be read."""
    try:
        paths = [*model_dir.iterdir(), *model_dir.glob("ckpt*/*")]
        files = sorted((path.name, path.stat().st_size) for path in paths if _holds_weights(path.name))
    except OSError as error:
        raise CheckpointError(f"{model_dir} cannot be read: {error.strerror}") from None
    return hashlib.sha256(json.dumps([asdict(model), files], sort_keys=True).encode()).hexdigest()


def _holds_weights(name: str) -> bool:
    return is_tensor_file(name) or name.endswith(_WEIGHT_SUFFIXES)
