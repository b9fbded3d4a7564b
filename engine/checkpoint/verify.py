"""Reads every byte of a checkpoint once, of any format: values that are not finite, and digests where a manifest lies beside the files.

The files are already known to have the right structure (`open_checkpoint`). This takes as long as the disk does, so the progress goes
out by callback after every chunk.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from engine.checkpoint.files import open_regular_file
from engine.checkpoint.manifest import ManifestEntry, read_manifest
from engine.checkpoint.tensors import Checkpoint, StoredArray
from engine.errors import CheckpointError
from engine.types import Progress

_CHUNK_BYTES = 16 << 20  # a multiple of every item size
_MAX_PROBLEMS = 10  # named in the error; a broken disk damages thousands
_FLOATS = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTotals:
    """What a successful verification covered."""

    num_bytes: int
    num_files: int
    num_digests: int  # files whose SHA-256 was compared


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileToRead:
    path: Path
    arrays: tuple[tuple[str, StoredArray], ...] = ()  # what each is called, in file order
    entry: ManifestEntry | None = None


def verify(checkpoint: Checkpoint, *, report: Callable[[Progress], None]) -> VerifyTotals:
    """Read all files of `checkpoint` and all files its manifest names.

    Raises `CheckpointError` at the end, naming the damaged files, so that one pass over a large checkpoint finds all of them.
    """
    files = _files_to_read(checkpoint)
    problems: list[str] = []
    reader = _Reader(report=report, total=_total_bytes(files))
    for file in files:
        try:
            problems += reader.read(file)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError("; ".join(problems[:_MAX_PROBLEMS]) + more)
    return VerifyTotals(
        num_bytes=reader.done,
        num_files=len(files),
        num_digests=sum(file.entry is not None and file.entry.sha256 is not None for file in files),
    )


def _files_to_read(checkpoint: Checkpoint) -> list[_FileToRead]:
    entries = {entry.path: entry for entry in read_manifest(checkpoint.directory)}
    arrays: dict[Path, list[tuple[str, StoredArray]]] = {path: [] for path in checkpoint.file_sizes}
    for tensor in checkpoint.tensors.values():
        for kind, source in (("weight", tensor.weight_source), ("scales", tensor.scales_source)):
            for region in source.regions if source else ():
                arrays[region.path].append((f"{kind} of {tensor.spec.name}", region.stored))
    files = [
        _FileToRead(path=path, arrays=tuple(sorted(named, key=lambda item: item[1].offset)), entry=entries.pop(path, None))
        for path, named in arrays.items()
    ]
    return files + [_FileToRead(path=path, entry=entry) for path, entry in entries.items()]


def _total_bytes(files: list[_FileToRead]) -> int:
    return sum(file.path.stat().st_size for file in files if file.path.is_file())


class _Reader:
    """Reads files one after the other and keeps count."""

    def __init__(self, *, report: Callable[[Progress], None], total: int) -> None:
        self._report = report
        self._total = total
        self.done = 0

    def read(self, file: _FileToRead) -> list[str]:
        """What is wrong with the content of one file."""
        digest = hashlib.sha256() if file.entry and file.entry.sha256 else None
        num_bad = dict.fromkeys((name for name, _ in file.arrays), 0)
        size = 0
        for chunk, name, dtype in self._chunks(file):
            size += len(chunk)
            if digest:
                digest.update(chunk)
            if dtype in _FLOATS:
                num_bad[name] += _count_not_finite(chunk, _FLOATS[dtype])
        problems = [f"{file.path}: {count:,} values of the {name} are not finite" for name, count in num_bad.items() if count]
        if file.entry and file.entry.size is not None and file.entry.size != size:
            problems.append(f"{file.path}: expected {file.entry.size:,} bytes by its manifest, found {size:,}")
        if digest and file.entry and digest.hexdigest() != file.entry.sha256:
            problems.append(f"{file.path}: expected SHA-256 {file.entry.sha256} by its manifest, found {digest.hexdigest()}")
        return problems

    def _chunks(self, file: _FileToRead) -> Iterator[tuple[bytes, str, str]]:
        """Every byte in order, cut so that a chunk belongs to one array or to none."""
        with open_regular_file(file.path) as opened:
            position = 0
            for name, dtype, end in _regions(file.arrays, file_end=opened.seek(0, 2)):
                opened.seek(position)
                while position < end:
                    chunk = _read(opened, min(_CHUNK_BYTES, end - position), path=file.path)
                    position += len(chunk)
                    self.done += len(chunk)
                    yield chunk, name, dtype
                    self._report(Progress(phase="verify", done=self.done, total=self._total, unit="bytes", detail=file.path.name))


def _regions(arrays: tuple[tuple[str, StoredArray], ...], *, file_end: int) -> Iterator[tuple[str, str, int]]:
    """(name, dtype, end) of the stretches of a file: the arrays, and what is before, between and behind them."""
    for name, array in arrays:
        yield "frame", "", array.offset
        yield name, array.dtype, array.offset + array.num_bytes
    yield "frame", "", file_end


def _read(file: BinaryIO, count: int, *, path: Path) -> bytes:
    try:
        chunk = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read at byte {file.tell():,}: {error.strerror}") from None
    if len(chunk) != count:
        raise CheckpointError(f"{path}: became shorter while it was read")
    return chunk


def _count_not_finite(chunk: bytes, dtype: np.dtype) -> int:
    values = np.frombuffer(chunk, dtype)
    return values.size - int(np.count_nonzero(np.isfinite(values)))
