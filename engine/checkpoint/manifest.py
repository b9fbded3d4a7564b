"""The `manifest.json` beside the tensor files: sizes and SHA-256 digests to verify them by. The release has none, a conversion always.

Either what `store` writes, with a list under `files`, or the list alone, of entries `{"file": NAME, "sha256": HEX, "size": BYTES, ...}`,
both optional and others ignored, or one object from file name to such an entry or to the digest itself. Names are relative and never lead
out of the manifest's folder.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engine.checkpoint.files import read_small_file
from engine.checkpoint.released import CHECKPOINT_DIR_NAMES
from engine.errors import CheckpointError

_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """What a manifest says of one file."""

    path: Path
    sha256: str | None = None  # lower-case hexadecimal
    size: int | None = None


def read_manifest(checkpoint_dir: Path) -> tuple[ManifestEntry, ...]:
    """The entries with a digest or a size, empty where there is no manifest in the tensor folder or in the model directory above.

    Raises `CheckpointError` for one that cannot be understood, or that names a path outside its folder.
    """
    has_own_folder = checkpoint_dir.absolute().name in CHECKPOINT_DIR_NAMES
    for folder in (checkpoint_dir, checkpoint_dir.absolute().parent) if has_own_folder else (checkpoint_dir,):
        path = folder / "manifest.json"
        if path.exists() or path.is_symlink():
            try:
                raw = json.loads(read_small_file(path, max_bytes=_MAX_BYTES))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: is not valid JSON: {error}") from None
            return _parse(path, raw, checkpoint_dir=checkpoint_dir)
    return ()


def _parse(path: Path, raw: object, *, checkpoint_dir: Path) -> tuple[ManifestEntry, ...]:
    if isinstance(raw, dict) and isinstance(raw.get("files"), list):
        raw = raw["files"]
    if isinstance(raw, list):
        named = [(item.get("file") if isinstance(item, dict) else None, item) for item in raw]
    elif isinstance(raw, dict):
        named = list(raw.items())
    else:
        raise CheckpointError(f"{path}: expected a list of entries or an object by file name")
    entries = [_parse_entry(path, name, item, checkpoint_dir=checkpoint_dir) for name, item in named]
    return tuple(entry for entry in entries if entry.sha256 is not None or entry.size is not None)


def _parse_entry(path: Path, name: object, item: Any, *, checkpoint_dir: Path) -> ManifestEntry:
    if isinstance(item, str):
        item = {"sha256": item}
    if not isinstance(name, str) or not isinstance(item, dict):
        raise CheckpointError(f"{path}: expected every entry to name a file, found {name!r}")
    digest, size = item.get("sha256"), item.get("size")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-fA-F]{64}", digest)):
        raise CheckpointError(f"{path}: the sha256 of {name!r} is not 64 hexadecimal digits")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise CheckpointError(f"{path}: the size of {name!r} is not a number of bytes: {size!r}")
    return ManifestEntry(path=_locate(path, name, checkpoint_dir=checkpoint_dir), sha256=digest and digest.lower(), size=size)


def _locate(manifest: Path, name: str, *, checkpoint_dir: Path) -> Path:
    """Names count from the manifest's folder; bare tensor names may stand for files in the tensor folder below it."""
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name:
        raise CheckpointError(f"{manifest}: names {name!r}, which is not a path inside its folder")
    if len(pure.parts) == 1 and name.startswith("tensor") and not name.startswith("tensor."):
        return checkpoint_dir / name
    path = manifest.parent / pure
    return checkpoint_dir / pure.name if path.parent.absolute() == checkpoint_dir.absolute() else path
