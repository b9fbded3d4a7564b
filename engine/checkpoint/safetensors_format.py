"""One safetensors file: where its arrays are, and the header of one to be written.

The format is eight bytes with the length of a JSON header, the header, and the arrays one after the other without a gap (safetensors on
GitHub, "Format"). It is read here rather than by its library so that arrays are memory maps, and written here so that an array need not be
in memory as a whole; a machine with accelerators needs no further package for it. `store` and `huggingface` say which tensor is which.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from engine.checkpoint.files import open_regular_file
from engine.checkpoint.tensors import FileArray, StoredArray, StoredDType
from engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # of the library, too

_CODES: dict[StoredDType, str] = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}
_DTYPES: dict[str, StoredDType] = {code: dtype for dtype, code in _CODES.items()}
_MAX_DIMENSIONS = 8
_ALIGNMENT = 64  # of the first array


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """What the header of one file says."""

    path: Path
    size: int
    arrays: dict[str, FileArray]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read the header and check it; costs two small reads whatever the file's size.

    Raises `CheckpointError`, naming the file, for everything but a whole file whose arrays fill it without gap or overlap.
    """
    with open_regular_file(path) as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path}: found a Git LFS pointer; the weights themselves were not downloaded")
            if len(start) < 8 or length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: is no safetensors file, or truncated: {size:,} bytes, a header of {length:,}")
            header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    entries = _parse(path, header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the metadata in its header are not texts by name")
    arrays = {name: _array(path, name, entry, data_start=8 + length, file_size=size) for name, entry in entries.items()}
    _check_is_filled(path, arrays, data_start=8 + length, file_size=size)
    return SafetensorsFile(path=path, size=size, arrays=arrays, metadata=cast("dict[str, str]", metadata))


def encode_header(arrays: Mapping[str, tuple[StoredDType, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What comes before the arrays, which are to follow in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in arrays.items():
        start, end = end, end + StoredArray(dtype=dtype, shape=shape, offset=0).num_bytes
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        entries = json.loads(header, object_pairs_hook=refuse_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its safetensors header is not an object")
    return cast("dict[str, Any]", entries)


def _array(path: Path, name: str, entry: Any, *, data_start: int, file_size: int) -> FileArray:
    match entry:
        case {"dtype": str() as code, "shape": list() as shape, "data_offsets": [int() as start, int() as end]}:
            pass
        case _:
            raise CheckpointError(f"{path}: the header's entry of {name[:200]!r} lacks dtype, shape or data_offsets")
    if code not in _DTYPES:
        raise CheckpointError(f"{path}: {name[:200]!r} is {code[:20]!r}; known are {', '.join(_DTYPES)}")
    if not 1 <= len(shape) <= _MAX_DIMENSIONS or not all(type(size) is int and size >= 1 for size in shape):
        raise CheckpointError(f"{path}: {name[:200]!r} has the shape {str(shape)[:200]}; expected positive sizes")
    stored = StoredArray(dtype=_DTYPES[code], shape=tuple(shape), offset=data_start + start)
    if start < 0 or end - start != stored.num_bytes:
        raise CheckpointError(f"{path}: {name[:200]!r} is {stored}, which takes {stored.num_bytes:,} bytes, found {end - start:,}")
    if data_start + end > file_size:
        raise CheckpointError(f"{path}: is truncated: {file_size:,} bytes, {name[:200]!r} ends after {data_start + end:,}")
    return FileArray(path=path, file_size=file_size, stored=stored)


def _check_is_filled(path: Path, arrays: dict[str, FileArray], *, data_start: int, file_size: int) -> None:
    end = data_start
    for name, array in sorted(arrays.items(), key=lambda item: item[1].stored.offset):
        if array.stored.offset != end:
            raise CheckpointError(
                f"{path}: {name[:200]!r} begins at byte {array.stored.offset:,}, expected {end:,} behind the array before"
            )
        end += array.num_bytes
    if end != file_size:
        raise CheckpointError(f"{path}: is longer than its content: {file_size:,} bytes, its arrays end after {end:,}")
