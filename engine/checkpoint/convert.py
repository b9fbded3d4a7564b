"""Any checkpoint -> our own format (`store`), in int8, bfloat16 or int4, tensor by tensor.

Every file is written under a temporary name, synced and renamed, and noted with its digest in a journal; the manifest comes last. So a
conversion can be interrupted anywhere: the same arguments take it up again after the last whole file, and until it has ended no load
accepts the directory. Memory holds a few blocks of a tensor at a time, or one matrix, where a column is quantised as a whole.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import ml_dtypes
import numpy as np

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.dequantize import Index, read_slice
from engine.checkpoint.files import open_regular_file, read_small_file
from engine.checkpoint.quantize import quantize, quantize_int4
from engine.checkpoint.safetensors_format import encode_header
from engine.checkpoint.store import (
    COPIED_NAMES,
    FORMAT,
    JOURNAL_NAME,
    MANIFEST_NAME,
    VERSION,
    TensorEntry,
    arrays_of,
    is_weights_file,
    weights_file_name,
)
from engine.checkpoint.tensors import Checkpoint, HostTensor, WeightForm
from engine.config import ModelConfig, model_directories, read_model_config
from engine.errors import CheckpointError
from engine.model.params import ParamSpec

_T = TypeVar("_T")

TargetForm = Literal["int8", "bfloat16", "int4"]

MAX_FILE_BYTES = 4 << 30  # a larger tensor has a file of its own

_BLOCK_VALUES = 8 << 20  # read, turned and written at once
_THREADS = min(4, os.cpu_count() or 1)  # that turn blocks
_SAMPLE_BYTES = 4096
_DIGEST_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to convert to."""

    weights: TargetForm
    group: int = 128  # rows that share a scale, of int4


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertProgress:
    """How far a conversion is. Bytes are those of the files written; the ones found whole from an earlier run are counted, too."""

    done: int
    total: int
    tensors_done: int
    tensors_total: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertTotals:
    """What a finished conversion has written."""

    directory: str
    files: int
    files_kept: int  # whole from an earlier run
    tensors: int
    bytes: int
    source_bytes: int
    has_tokenizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file of weights to be written."""

    name: str
    header: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(entry.num_bytes for entry in self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A finished file, as journal and manifest have it."""

    file: str
    size: int
    sha256: str


def convert(
    source: Path, target: Path, settings: Settings, *, report: Callable[[ConvertProgress], None], max_file_bytes: int = MAX_FILE_BYTES
) -> ConvertTotals:
    """Write `target`, or take up its unfinished conversion of the same source and settings.

    Raises `CheckpointError` for a source that cannot be read, a target that holds anything else, and a full disk; `ConfigError` for a
    source whose config.json cannot be read.
    """
    config = read_model_config(source)
    checkpoint = open_checkpoint(source, config)
    config = _target_config(config, checkpoint, settings)
    entries = target_entries(checkpoint, config, settings)
    identity = _identity(checkpoint, config, settings, max_file_bytes)
    files = _plan_files(entries, identity, max_file_bytes)
    with _exclusive(target):
        return _Conversion(checkpoint, config, files, target, identity, report=report).run(_copied(source, config))


def target_entries(checkpoint: Checkpoint, config: ModelConfig, settings: Settings) -> list[TensorEntry]:
    """What a conversion writes of every tensor. Raises `CheckpointError` for groups that do not divide a matrix."""
    return [_entry(tensor, config, settings) for tensor in checkpoint.tensors.values()]


class _Conversion:
    """One run over the files; `_written` grows with them and is what the journal holds."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        files: list[_File],
        target: Path,
        identity: str,
        *,
        report: Callable[[ConvertProgress], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._files = files
        self._target = target
        self._identity = identity
        self._report = report
        self._total = sum(file.size for file in files)
        self._num_tensors = sum(len(file.entries) for file in files)
        self._done = 0
        self._num_done = 0
        self._written: dict[str, _Written] = {}

    def run(self, copied: dict[str, bytes]) -> ConvertTotals:
        kept = self._take_up()
        self._write_journal()
        for name, content in copied.items():
            self._written[name] = _Written(file=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
            self._write_whole(name, content)
        needed = sum(file.size for file in self._files if file.name not in self._written)
        if needed > (free := shutil.disk_usage(self._target).free):
            raise CheckpointError(
                f"{self._target}: {needed:,} bytes are still to be written, {free:,} are free there; make room, or choose another disk"
            )
        for file in self._files:
            if file.name not in self._written:
                self._write_file(file)
        self._write_manifest()
        (self._target / JOURNAL_NAME).unlink()
        return ConvertTotals(
            directory=str(self._target),
            files=len(self._files),
            files_kept=kept,
            tensors=self._num_tensors,
            bytes=self._total,
            source_bytes=self._checkpoint.file_bytes,
            has_tokenizer="tokenizer.model" in copied,
        )

    def _take_up(self) -> int:
        """Check what is in the target and keep its finished files. Returns how many."""
        names = sorted(path.name for path in self._target.iterdir())
        if MANIFEST_NAME in names and JOURNAL_NAME not in names:
            raise CheckpointError(f"{self._target}: holds a finished checkpoint; choose another directory")
        if JOURNAL_NAME not in names and names:
            raise CheckpointError(f"{self._target}: is not empty and holds no unfinished conversion; choose another directory")
        journal = _read_journal(self._target / JOURNAL_NAME, self._identity) if names else []
        ours = {JOURNAL_NAME, MANIFEST_NAME, *COPIED_NAMES, *(f"{name}.part" for name in (JOURNAL_NAME, MANIFEST_NAME, *COPIED_NAMES))}
        if foreign := [name for name in names if name not in ours and not is_weights_file(name)]:
            raise CheckpointError(f"{self._target / foreign[0]}: is no file of a conversion; choose another directory, or remove it")
        found = {written.file: written for written in journal}
        for file in self._files:
            if file.name in found and self._is_whole(file, found[file.name]):
                self._written[file.name] = found[file.name]
        for name in names:
            if is_weights_file(name) and name not in self._written:
                (self._target / name).unlink()
        return len(self._written)

    def _is_whole(self, file: _File, written: _Written) -> bool:
        path = self._target / file.name
        if not path.is_file() or not path.stat().st_size == written.size == file.size:
            return False
        digest = hashlib.sha256()
        with open_regular_file(path) as opened:
            while chunk := opened.read(_DIGEST_CHUNK_BYTES):
                digest.update(chunk)
                self._advance(len(chunk), detail=f"checking {file.name}")
        is_whole = digest.hexdigest() == written.sha256
        self._done -= 0 if is_whole else file.size
        self._num_done += len(file.entries) if is_whole else 0
        return is_whole

    def _write_file(self, file: _File) -> None:
        with self._replacing(file.name) as writer:
            writer.write(file.header)
            self._advance(len(file.header), detail=file.name)
            for entry in file.entries:
                tensor = self._checkpoint.tensors[entry.name]
                for part in encode(tensor, entry):
                    writer.write(part)
                    self._advance(part.nbytes, detail=entry.name)
                self._num_done += 1
                self._advance(0, detail=entry.name)
            self._written[file.name] = _Written(file=file.name, size=file.size, sha256=writer.digest)
            # Noted before it has its name: a file under its final name is always in the journal.
            self._write_journal()

    def _write_journal(self) -> None:
        journal = {"format": FORMAT, "conversion": self._identity, "files": [asdict(file) for file in self._written.values()]}
        self._write_whole(JOURNAL_NAME, json.dumps(journal, indent=1).encode())

    def _write_manifest(self) -> None:
        tensors = {file.name: [entry.as_json() for entry in file.entries] for file in self._files}
        files = [
            asdict(written) | ({"tensors": tensors[name]} if name in tensors else {}) for name, written in sorted(self._written.items())
        ]
        manifest = {"format": FORMAT, "version": VERSION, "conversion": self._identity, "config": asdict(self._config), "files": files}
        self._write_whole(MANIFEST_NAME, json.dumps(manifest, indent=1).encode())

    def _write_whole(self, name: str, content: bytes) -> None:
        with self._replacing(name) as writer:
            writer.write(content)

    @contextmanager
    def _replacing(self, name: str) -> Iterator["_Writer"]:
        """A file that has its name once it is whole and on the disk, or is not there."""
        path, part = self._target / name, self._target / f"{name}.part"
        try:
            with part.open("wb") as file:
                writer = _Writer(file)
                yield writer
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_directory(self._target)
        except OSError as error:
            part.unlink(missing_ok=True)
            if isinstance(error, BrokenPipeError):  # of `report`, whose reader has gone
                raise
            raise CheckpointError(
                f"{path}: cannot be written: {error.strerror}; the finished files are kept: make room and run the same again"
            ) from None
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _advance(self, num_bytes: int, *, detail: str) -> None:
        self._done += num_bytes
        self._report(
            ConvertProgress(done=self._done, total=self._total, tensors_done=self._num_done, tensors_total=self._num_tensors, detail=detail)
        )


class _Writer:
    """Writes and digests."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def write(self, part: bytes | np.ndarray) -> None:
        content = part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        self._digest.update(content)
        self._file.write(content)


def encode(tensor: HostTensor, entry: TensorEntry) -> Iterator[np.ndarray]:
    """The blocks of a tensor's weight in the order of the file, then its scales.

    Raises `CheckpointError` for values that are not finite, where they are quantised.
    """
    weight, scales = tensor.weight, tensor.scales
    shape = entry.arrays["weight"][1]
    if (
        tensor.form == entry.form
        and shape == weight.shape
        and ("scales" not in entry.arrays or entry.arrays["scales"][1] == _shape(scales))
    ):
        for index in blocks(shape, 1):
            yield np.asarray(weight[index])
        if scales is not None:
            yield np.asarray(scales[...])
        return
    rows_at_once = _rows_at_once(tensor.spec, entry)
    kept: list[np.ndarray] = []

    def encode_block(index: Index) -> tuple[np.ndarray, np.ndarray | None]:
        return _quantized(tensor.spec, entry, read_slice(tensor.form, weight, scales, index, np.float32))

    is_small = rows_at_once * shape[-1] <= _BLOCK_VALUES
    for values, part in _ahead(encode_block, blocks(tensor.spec.shape, rows_at_once), num_threads=_THREADS if is_small else 1):
        kept += [] if part is None else [part]
        yield values
    yield from kept


def _ahead(function: Callable[[Index], _T], items: Iterable[Index], *, num_threads: int) -> Iterator[_T]:
    """Results in order, a few of them computed ahead."""
    with ThreadPoolExecutor(num_threads) as threads:
        pending: deque[Future[_T]] = deque()
        for item in items:
            if len(pending) == num_threads:
                yield pending.popleft().result()
            pending.append(threads.submit(function, item))
        while pending:
            yield pending.popleft().result()


def blocks(shape: tuple[int, ...], rows_at_once: int) -> Iterator[Index]:
    """Slices of an array in C order, each of whole columns and a multiple of `rows_at_once` rows of one matrix."""
    if len(shape) == 1:
        yield (slice(0, shape[0]),)
        return
    *lead, k, n = shape
    num_rows = max(rows_at_once, _BLOCK_VALUES // n // rows_at_once * rows_at_once)
    for place in np.ndindex(*lead):
        for start in range(0, k, num_rows):
            yield (*(slice(i, i + 1) for i in place), slice(start, min(start + num_rows, k)), slice(0, n))


def _quantized(spec: ParamSpec, entry: TensorEntry, real: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """A block in the target form, with its scales."""
    if entry.form in ("float32", "bfloat16"):
        return real.astype(ml_dtypes.bfloat16 if entry.form == "bfloat16" else np.float32), None
    rows_per_group = spec.shape[-2] // entry.arrays["scales"][1][-2]
    try:
        return quantize(real, real.shape[-2] // rows_per_group) if entry.form == "int8" else quantize_int4(real, rows_per_group)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.name}: {error}") from None


def _rows_at_once(spec: ParamSpec, entry: TensorEntry) -> int:
    """Rows that share scales."""
    return spec.shape[-2] // entry.arrays["scales"][1][-2] if "scales" in entry.arrays else 1


def _entry(tensor: HostTensor, config: ModelConfig, settings: Settings) -> TensorEntry:
    """The form in which a tensor is to be stored. Norms and router stay float32; the embedding does, too, where the rest is as released."""
    spec = tensor.spec
    form: WeightForm = settings.weights
    if not spec.is_quantized:
        form = "bfloat16" if "vocab" in spec.axes and settings.weights != "int8" else "float32"
    return TensorEntry(name=spec.name, form=form, arrays=arrays_of(spec, form, _num_groups(spec, form, config, settings)))


def _num_groups(spec: ParamSpec, form: WeightForm, config: ModelConfig, settings: Settings) -> int | None:
    if form == "int8":
        return (config.row_parallel_scale_groups or 1) if spec.is_row_parallel else 1
    if form == "int4":
        if spec.shape[-2] % settings.group:
            raise CheckpointError(
                f"{spec.name}: int4 groups of {settings.group} do not divide its {spec.shape[-2]:,} rows; use --weights int8"
            )
        return spec.shape[-2] // settings.group
    return None


def _target_config(config: ModelConfig, checkpoint: Checkpoint, settings: Settings) -> ModelConfig:
    """With the number of scale groups that the files have, where they are int8."""
    groups = checkpoint.row_parallel_scale_groups or config.row_parallel_scale_groups
    return replace(config, row_parallel_scale_groups=groups or (1 if settings.weights == "int8" else None))


def _plan_files(entries: list[TensorEntry], identity: str, max_file_bytes: int) -> list[_File]:
    """As many tensors in each file as fit, in the order of the source."""
    runs: list[list[TensorEntry]] = []
    size = 0
    for entry in entries:
        num_bytes = entry.num_bytes
        if not runs or size + num_bytes > max_file_bytes:
            runs.append([])
            size = 0
        runs[-1].append(entry)
        size += num_bytes
    return [_plan_file(weights_file_name(number), tuple(run), identity) for number, run in enumerate(runs, start=1)]


def _plan_file(name: str, entries: tuple[TensorEntry, ...], identity: str) -> _File:
    arrays = {f"{entry.name}.{key}": array for entry in entries for key, array in entry.arrays.items()}
    return _File(name=name, header=encode_header(arrays, {"conversion": identity, "file": name}), entries=entries)


def _identity(checkpoint: Checkpoint, config: ModelConfig, settings: Settings, max_file_bytes: int) -> str:
    """What tells conversions apart: the settings, and of the source the names, forms and a few samples of every array."""
    digest = hashlib.sha256(json.dumps([VERSION, asdict(config), asdict(settings), max_file_bytes]).encode())
    for name, tensor in checkpoint.tensors.items():
        digest.update(f"{name} {tensor.form}".encode())
        for region in tensor.regions:
            digest.update(str((region.dtype, region.shape)).encode())
            with open_regular_file(region.path) as file:
                for share in (0, 0.5, 1):
                    file.seek(region.stored.offset + int(share * max(0, region.num_bytes - _SAMPLE_BYTES)))
                    digest.update(file.read(min(_SAMPLE_BYTES, region.num_bytes)))
    return digest.hexdigest()[:32]


def _copied(source: Path, config: ModelConfig) -> dict[str, bytes]:
    """The files beside the weights: the configuration under our own names, and the tokenizer where there is one."""
    found = {"config.json": json.dumps(asdict(config), indent=1).encode()}
    tokenizer = next((path for path in (folder / "tokenizer.model" for folder in model_directories(source)) if path.is_file()), None)
    return found if tokenizer is None else found | {"tokenizer.model": read_small_file(tokenizer, max_bytes=1 << 30)}


def _read_journal(path: Path, identity: str) -> list[_Written]:
    try:
        match json.loads(read_small_file(path, max_bytes=64 << 20)):
            case {"conversion": str() as found, "files": list() as files}:
                if found != identity:
                    raise CheckpointError(
                        f"{path.parent}: holds an unfinished conversion of another source or with other settings; choose another directory"
                    )
                return [_Written(file=str(file["file"]), size=int(file["size"]), sha256=str(file["sha256"])) for file in files]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CheckpointError(f"{path}: is damaged, so the conversion cannot be taken up; empty {path.parent} and begin again")


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Makes the directory, and keeps a second conversion out of it for the time being."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be made: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{target}: another conversion is writing there; wait for it") from None
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shape(array: Any) -> tuple[int, ...] | None:
    return None if array is None else array.shape
