"""Writes one tensor byte for byte as the release would hold it: pickle protocol 4 of NumPy 1.26 and ml_dtypes 0.3.

The opcodes are laid down here rather than by `pickle`, because what NumPy's pickling names and stores depends on the installed version.
Frames follow Python's pickler: an object never straddles a frame, and payloads from 64 KiB on lie outside of frames.
"""

import struct
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

_FRAME_TARGET = 64 * 1024
_FRAME_MIN = 4  # Python's pickler leaves shorter runs unframed
_MODULE = "numpy.core.multiarray"

_DTYPE_CODES = {np.dtype(np.float32): "f4", np.dtype(np.int8): "i1"}
_DTYPE_STATES = {  # byte order, item size, alignment, flags
    np.dtype(np.float32): ("<", -1, -1, 0),
    np.dtype(np.int8): ("|", -1, -1, 0),
    np.dtype(ml_dtypes.bfloat16): ("<", 2, 2, 80),
}


def write_tensor(path: Path, weight: np.ndarray, *, scales: np.ndarray | None = None) -> None:
    """Write a float32 array, or an int8 `weight` [*lead, k, n] with bfloat16 `scales` [*lead, groups, n].

    Raises `ValueError` for other dtypes and `OSError` where the file cannot be written.
    """
    with path.open("wb") as file:
        for part in encode_tensor(weight, scales=scales):
            file.write(part if isinstance(part, bytes) else _bytes_of(part))


def write_tensor_in_blocks(
    path: Path, shape: tuple[int, ...], dtype: type, blocks: Iterable[np.ndarray], *, scales: np.ndarray | None = None
) -> None:
    """The same for a weight of 64 KiB or more that is never in memory as a whole: `blocks` are its numbers in order, in any shape.

    Raises `ValueError` where they are too few, too many or of another dtype, and `OSError`.
    """
    stand_in = np.broadcast_to(np.zeros((), dtype), shape)  # takes no memory
    num_left = stand_in.size
    with path.open("wb") as file:
        for part in encode_tensor(stand_in, scales=scales):
            if part is not stand_in:
                file.write(part if isinstance(part, bytes) else _bytes_of(part))
                continue
            for block in blocks:
                _check_dtype(block, dtype)
                file.write(_bytes_of(block))
                num_left -= block.size
    if num_left:
        raise ValueError(f"expected {stand_in.size:,} numbers of {stand_in.nbytes:,} bytes, found {stand_in.size - num_left:,}")


def encode_tensor(weight: np.ndarray, *, scales: np.ndarray | None = None) -> Iterator[bytes | np.ndarray]:
    """The parts of the file in order: pickle bytes, and large arrays that stand for their own bytes."""
    if scales is None:
        _check_dtype(weight, np.float32)
    else:
        _check_dtype(weight, np.int8)
        _check_dtype(scales, ml_dtypes.bfloat16)
    pickler = _Pickler()
    if scales is None:
        pickler.add_array(weight)
    else:
        pickler.add_quantized(weight, scales)
    return pickler.finish()


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _check_dtype(array: np.ndarray, expected: type) -> None:
    if array.dtype != np.dtype(expected):
        raise ValueError(f"expected {np.dtype(expected)}, found {array.dtype}")


class _Pickler:
    """Opcodes, memo and frames of one file."""

    def __init__(self) -> None:
        self._parts: list[bytes | np.ndarray] = [b"\x80\x04"]
        self._frame = bytearray()
        self._memo: dict[Hashable, int] = {}

    def add_quantized(self, weight: np.ndarray, scales: np.ndarray) -> None:
        self._add_class("__main__", "QuantizedWeight8bit")
        self._add(b")\x81")
        self._memoize("object")
        self._add(b"}")
        self._memoize("state")
        self._add(b"(")
        self._add_string("weight")
        self.add_array(weight)
        self._end_long_frame()
        self._add_string("scales")
        self.add_array(scales)
        self._add(b"ub")

    def add_array(self, array: np.ndarray) -> None:
        self._add_class(_MODULE, "_reconstruct")
        self._add_class("numpy", "ndarray")
        self._add_int(0)
        self._add(b"\x85")
        self._memoize()
        self._add_placeholder()
        self._add(b"\x87")
        self._memoize()
        self._add(b"R")
        self._memoize()
        self._add(b"(")
        self._add_int(1)
        self._add_shape(array.shape)
        self._add_dtype(array.dtype)
        self._add(b"\x89")
        self._add_payload(array)
        self._add(b"t")
        self._memoize()
        self._add(b"b")

    def finish(self) -> Iterator[bytes | np.ndarray]:
        self._add(b".")
        self._end_frame()
        return iter(self._parts)

    def _add(self, opcodes: bytes) -> None:
        self._frame += opcodes

    def _memoize(self, key: Hashable | None = None) -> None:
        self._memo[len(self._memo) if key is None else key] = len(self._memo)
        self._add(b"\x94")

    def _recall(self, key: Hashable) -> bool:
        if key not in self._memo:
            return False
        self._add(struct.pack("<cB", b"h", self._memo[key]))
        return True

    def _add_string(self, text: str) -> None:
        if not self._recall(text):
            self._add(struct.pack("<cB", b"\x8c", len(text)) + text.encode())
            self._memoize(text)

    def _add_class(self, module: str, name: str) -> None:
        if not self._recall((module, name)):
            self._add_string(module)
            self._add_string(name)
            self._add(b"\x93")
            self._memoize((module, name))

    def _add_placeholder(self) -> None:
        if not self._recall(b"b"):
            self._add(b"C\x01b")
            self._memoize(b"b")

    def _add_int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self._add(struct.pack("<cB", b"K", value))
        elif 0 <= value < 1 << 16:
            self._add(struct.pack("<cH", b"M", value))
        else:
            self._add(struct.pack("<ci", b"J", value))

    def _add_shape(self, shape: tuple[int, ...]) -> None:
        if not 1 <= len(shape) <= 3:
            raise ValueError(f"expected one to three dimensions, found {len(shape)}")
        for size in shape:
            self._add_int(size)
        self._add({1: b"\x85", 2: b"\x86", 3: b"\x87"}[len(shape)])
        self._memoize()

    def _add_dtype(self, dtype: np.dtype) -> None:
        self._add_class("numpy", "dtype")
        if dtype in _DTYPE_CODES:
            self._add_string(_DTYPE_CODES[dtype])
        else:
            self._add_class("ml_dtypes", "bfloat16")
        self._add(b"\x89\x88\x87")
        self._memoize()
        self._add(b"R")
        self._memoize()
        byte_order, item_bytes, alignment, flags = _DTYPE_STATES[dtype]
        self._add(b"(")
        self._add_int(3)
        self._add_string(byte_order)
        self._add(b"NNN")
        for value in (item_bytes, alignment, flags):
            self._add_int(value)
        self._add(b"t")
        self._memoize()
        self._add(b"b")

    def _add_payload(self, array: np.ndarray) -> None:
        if array.nbytes < 1 << 8:
            header = struct.pack("<cB", b"C", array.nbytes)
        elif array.nbytes < 1 << 32:
            header = struct.pack("<cI", b"B", array.nbytes)
        else:
            header = struct.pack("<cQ", b"\x8e", array.nbytes)
        if array.nbytes < _FRAME_TARGET:
            self._add(header + array.tobytes())
        else:
            self._end_frame()
            self._parts += [header, array]
        self._memoize()

    def _end_long_frame(self) -> None:
        if len(self._frame) >= _FRAME_TARGET:
            self._end_frame()

    def _end_frame(self) -> None:
        header = struct.pack("<cQ", b"\x95", len(self._frame)) if len(self._frame) >= _FRAME_MIN else b""
        self._parts.append(header + bytes(self._frame))
        self._frame.clear()
