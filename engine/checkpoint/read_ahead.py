"""Has the disk busy while weights are copied: what will be asked for next is brought into the page cache, in order and within a bound.

Only hints: a file that cannot be read is the loader's to tell, and a system without them loads as it did, at the pace of its page faults.
`load` says what its devices need of each tensor, and when it is done with one.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from typing import Self

from engine.checkpoint.files import open_regular_file
from engine.checkpoint.tensors import ITEM_BYTES, FileArray, StoredArray
from engine.errors import CheckpointError

HINT_BYTES = 128 << 10  # the most that Linux takes of one hint, unless a device is set up for more
GAP_BYTES = 8 << 10  # two runs this near are read as one: the disk reads pages
RUNS_AT_ONCE = 64  # between two looks at whether the loader keeps up

Box = tuple[slice, ...]  # a slice with start and stop for each dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What will be read of one tensor."""

    name: str
    parts: tuple[tuple[FileArray, Box], ...]

    @property
    def num_bytes(self) -> int:
        return sum(ITEM_BYTES[array.dtype] * prod(cut.stop - cut.start for cut in box) for array, box in self.parts)


class ReadAhead:
    """A thread that goes through `wanted`, at most `limit_bytes` ahead of the loader; it ends with the context."""

    def __init__(self, wanted: Sequence[Wanted], *, limit_bytes: int) -> None:
        self._wanted = wanted
        self._limit_bytes = limit_bytes
        self._news = threading.Condition()
        self._ahead: dict[str, int] = {}  # bytes asked for, of tensors that are not done
        self._done: set[str] = set()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def __enter__(self) -> Self:
        if hasattr(os, "posix_fadvise"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._is_over = True
            self._news.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def is_done(self, name: str) -> None:
        """The loader has read this tensor."""
        with self._news:
            self._done.add(name)
            self._ahead.pop(name, None)
            self._news.notify_all()

    def _run(self) -> None:
        for wanted in self._wanted:
            for array, box in wanted.parts:
                with suppress(CheckpointError, OSError):
                    self._hint(wanted.name, array, box)

    def _hint(self, name: str, array: FileArray, box: Box) -> None:
        with open_regular_file(array.path) as file:
            for runs in _batches(byte_runs(array.stored, box)):
                if not self._is_wanted(name, sum(length for _, length in runs)):
                    return
                for offset, length in runs:
                    os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def _is_wanted(self, name: str, num_bytes: int) -> bool:
        """Wait until the loader is near enough. False where it has been here before, and at the end of the context."""
        with self._news:
            self._news.wait_for(lambda: self._is_over or name in self._done or sum(self._ahead.values()) < self._limit_bytes)
            if self._is_over or name in self._done:
                return False
            self._ahead[name] = self._ahead.get(name, 0) + num_bytes
            return True


def byte_runs(array: StoredArray, box: Box) -> Iterator[tuple[int, int]]:
    """Where in the file `array[box]` lies: (offset, length) in order, none longer than `HINT_BYTES`."""
    begin = end = 0
    for offset, length in _whole_runs(array, box):
        if offset - end > GAP_BYTES:
            yield from _hints(begin, end)
            begin = offset
        end = offset + length
    yield from _hints(begin, end)


def _whole_runs(array: StoredArray, box: Box) -> Iterator[tuple[int, int]]:
    item_bytes = ITEM_BYTES[array.dtype]
    strides = [item_bytes * prod(array.shape[axis + 1 :]) for axis in range(len(array.shape))]
    partial = [axis for axis, size in enumerate(array.shape) if box[axis].stop - box[axis].start < size]
    last = partial[-1] if partial else 0  # everything behind this axis is wanted whole
    start = array.offset + box[last].start * strides[last]
    length = (box[last].stop - box[last].start) * strides[last]
    for index in product(*(range(cut.start, cut.stop) for cut in box[:last])):
        yield start + sum(i * stride for i, stride in zip(index, strides, strict=False)), length


def _hints(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for offset in range(begin, end, HINT_BYTES):
        yield offset, min(HINT_BYTES, end - offset)


def _batches(runs: Iterator[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    while batch := list(islice(runs, RUNS_AT_ONCE)):
        yield batch


def scaled(box: Box, shape: tuple[int, ...], to: tuple[int, ...]) -> Box:
    """The same part of an array of another size: what has halves or repeats of its rows on the devices lies so in its file."""
    return tuple(slice(cut.start * wanted // size, -(-cut.stop * wanted // size)) for cut, size, wanted in zip(box, shape, to, strict=True))
