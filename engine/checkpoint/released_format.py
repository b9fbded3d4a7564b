"""One file of the released checkpoint: where its arrays are, learnt without unpickling it.

Each file is a pickle of one array, or of one `QuantizedWeight8bit` with an int8 weight and bfloat16 scales. Unpickling an untrusted
download may run code, copies gigabytes, and (NumPy 2 with a stored bfloat16) breaks bfloat16 for the whole process. So `read_index`
walks the opcodes itself: a small allow-list of them, on symbolic values, with exactly the classes that the release uses; array bytes are
skipped and only their place is kept. The arrays are then memory maps. `released_writer` is the other direction; `checkpoint` knows which
file is which tensor.
"""

import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.checkpoint.files import open_regular_file
from engine.checkpoint.tensors import FileArray, StoredArray, StoredDType
from engine.errors import CheckpointError

_MAX_OPCODES = 1000  # the longest released file has 178
_MAX_STRING_BYTES = 255
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The content of one file. Nothing is held open or mapped: each of 770 maps would keep a file descriptor."""

    path: Path
    file_size: int
    weight: StoredArray
    scales: StoredArray | None = None

    def map_weight(self) -> np.ndarray:
        """The weight as a read-only `np.memmap`."""
        return self._map(self.weight)

    def map_scales(self) -> np.ndarray | None:
        """The scales as a read-only bfloat16 `np.memmap`, or None for a plain array."""
        return None if self.scales is None else self._map(self.scales)

    def _map(self, array: StoredArray) -> np.ndarray:
        return FileArray(path=self.path, file_size=self.file_size, stored=array).open()


def read_index(path: Path) -> StoredTensor:
    """Read where the arrays of one released file are; costs a few small reads whatever its size.

    Raises `CheckpointError`, naming the file and the byte, for everything but a whole, well-formed file of the released structure.
    """
    with open_regular_file(path) as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            content = _Walker(file, path=path, size=size).run()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    weight, scales = content
    return StoredTensor(path=path, file_size=size, weight=weight, scales=scales)


# The values on the symbolic stack. Plain Python None, bool, int, str, tuple and dict stand for themselves.


@dataclass(frozen=True, slots=True)
class _Class:
    """A global of the allow-list; nothing is imported."""

    name: str


@dataclass(frozen=True, slots=True)
class _Bytes:
    offset: int
    length: int
    first: bytes  # the first byte, b"" where there is none


@dataclass(slots=True, eq=False)
class _DType:
    name: StoredDType
    is_built: bool = False


@dataclass(slots=True, eq=False)
class _Array:
    stored: StoredArray | None = None


@dataclass(slots=True, eq=False)
class _Quantized:
    state: dict[str, Any] | None = None


class _Mark:
    """Where a tuple or a run of dict items begins."""


_MARK = _Mark()
_RECONSTRUCT, _NDARRAY, _DTYPE = _Class("_reconstruct"), _Class("ndarray"), _Class("dtype")
_BFLOAT16, _QUANTIZED = _Class("bfloat16"), _Class("QuantizedWeight8bit")

_CLASSES = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # the same function since NumPy 2
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("ml_dtypes", "bfloat16"): _BFLOAT16,
    ("__main__", "QuantizedWeight8bit"): _QUANTIZED,
}

_DTYPES: dict[Any, StoredDType] = {"f4": "float32", "i1": "int8", _BFLOAT16: "bfloat16"}

# What `dtype.__reduce__` adds: version, byte order, three fields of structured types, item size, alignment. Flags follow and vary.
_DTYPE_STATES: dict[StoredDType, tuple[Any, ...]] = {
    "float32": (3, "<", None, None, None, -1, -1),
    "int8": (3, "|", None, None, None, -1, -1),
    "bfloat16": (3, "<", None, None, None, 2, 2),
}

# Opcodes that differ only in a value or in the width of a little-endian number after them.
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_UNSIGNED_WIDTHS = {b"K": 1, b"M": 2}
_STRING_WIDTHS = {b"\x8c": 1, b"X": 4, b"\x8d": 8}
_BYTES_WIDTHS = {b"C": 1, b"B": 4, b"\x8e": 8}
_TUPLE_SIZES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_GET_WIDTHS = {b"h": 1, b"j": 4}
_PUT_WIDTHS = {b"q": 1, b"r": 4}

_OPCODE_NAMES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}  # for messages


class _Walker:
    """A pickle machine for the released structure. It reads, checks and remembers; it never calls or imports what the file names."""

    def __init__(self, file: BinaryIO, *, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._position = 0
        self._frame_end: int | None = None
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> tuple[StoredArray, StoredArray | None]:
        """Weight and scales of the one object that the file holds."""
        self._read_protocol()
        for _ in range(_MAX_OPCODES):
            if self._position == self._frame_end:
                self._frame_end = None
            opcode = self._take(1)
            if opcode == b".":
                return self._finish()
            self._execute(opcode)
        raise self._error(f"more than {_MAX_OPCODES} pickle opcodes; a released tensor has fewer than 200")

    def _read_protocol(self) -> None:
        if not self._size:
            raise self._error("the file is empty")
        start = self._file.read(20)
        if start.startswith(b"version https://git-"):
            raise self._error("found a Git LFS pointer; the weights themselves were not downloaded")
        if start[:1] != b"\x80" or start[1:2] not in (b"\x04", b"\x05"):
            raise self._error(f"expected a pickle of protocol 4, found a file that starts with {start[:8]!r}")
        self._position = self._file.seek(2)

    def _finish(self) -> tuple[StoredArray, StoredArray | None]:
        if len(self._stack) != 1:
            raise self._error(f"expected one object, found {len(self._stack)}")
        if self._position != self._size:
            raise self._error(f"the file is longer than its content: {self._size:,} bytes, the pickle ends after {self._position:,}")
        match self._stack[0]:
            case _Array(stored=StoredArray() as weight):
                return weight, None
            case _Quantized(state=dict() as state):
                return self._quantized_parts(state)
        raise self._error(f"expected an array or a QuantizedWeight8bit, found {_describe(self._stack[0])}")

    def _quantized_parts(self, state: dict[str, Any]) -> tuple[StoredArray, StoredArray]:
        if state.keys() != {"weight", "scales"}:
            raise self._error(f"expected a QuantizedWeight8bit with weight and scales, found {sorted(state)}")
        parts: list[StoredArray] = []
        for name in ("weight", "scales"):
            array = state[name]
            if not isinstance(array, _Array) or array.stored is None:
                raise self._error(f"expected an array as {name}, found {_describe(array)}")
            parts.append(array.stored)
        weight, scales = parts
        if weight.offset == scales.offset:
            raise self._error("weight and scales share their bytes")
        return weight, scales

    # Reading

    def _take(self, count: int) -> bytes:
        self._advance(count)
        content = self._file.read(count)
        if len(content) != count:
            raise self._error("the file is truncated")
        return content

    def _advance(self, count: int) -> None:
        end = self._position + count
        if end > self._size:
            raise self._error(f"the file is truncated: {self._size:,} bytes, its pickle needs at least {end:,}")
        if self._frame_end is not None and end > self._frame_end:
            raise self._error("a pickle frame ends inside an opcode")
        self._position = end

    def _take_unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _take_string(self, width: int) -> str:
        length = self._take_unsigned(width)
        if length > _MAX_STRING_BYTES:
            raise self._error(f"a string of {length:,} bytes; a released tensor has none over {_MAX_STRING_BYTES}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._error("a string is not UTF-8") from None

    def _skip_bytes(self, width: int) -> _Bytes:
        length = self._take_unsigned(width)
        offset = self._position
        self._advance(length)
        first = self._file.read(1) if length else b""
        self._file.seek(self._position)
        return _Bytes(offset, length, first)

    def _take_long(self) -> int:
        length = self._take_unsigned(1)
        if length > 8:
            raise self._error(f"an integer of {length} bytes")
        return int.from_bytes(self._take(length), "little", signed=True)

    def _open_frame(self) -> None:
        length = self._take_unsigned(8)
        if self._frame_end is not None:
            raise self._error("a pickle frame begins inside another")
        if self._position + length > self._size:
            raise self._error(f"the file is truncated: {self._size:,} bytes, its pickle needs at least {self._position + length:,}")
        self._frame_end = self._position + length

    # Executing

    def _execute(self, opcode: bytes) -> None:
        if opcode in _CONSTANTS:
            self._push(_CONSTANTS[opcode])
        elif opcode in _UNSIGNED_WIDTHS:
            self._push(self._take_unsigned(_UNSIGNED_WIDTHS[opcode]))
        elif opcode in _STRING_WIDTHS:
            self._push(self._take_string(_STRING_WIDTHS[opcode]))
        elif opcode in _BYTES_WIDTHS:
            self._push(self._skip_bytes(_BYTES_WIDTHS[opcode]))
        elif opcode in _TUPLE_SIZES:
            self._push(self._pop_many(_TUPLE_SIZES[opcode]))
        elif opcode in _GET_WIDTHS:
            self._recall(self._take_unsigned(_GET_WIDTHS[opcode]))
        elif opcode in _PUT_WIDTHS:
            self._memo[self._take_unsigned(_PUT_WIDTHS[opcode])] = self._top()
        else:
            self._execute_structural(opcode)

    def _execute_structural(self, opcode: bytes) -> None:
        match opcode:
            case b"\x95":
                self._open_frame()
            case b"\x94":
                self._memo[len(self._memo)] = self._top()
            case b"(":
                self._push(_MARK)
            case b"J":
                self._push(int.from_bytes(self._take(4), "little", signed=True))
            case b"\x8a":
                self._push(self._take_long())
            case b"t":
                self._push(self._pop_to_mark())
            case b"}":
                self._push({})
            case b"s":
                self._set_items(self._pop_many(2))
            case b"u":
                self._set_items(self._pop_to_mark())
            case b"\x93":
                self._push(self._look_up(*self._pop_many(2)))
            case b"\x81" | b"R":
                self._push(self._make(*self._pop_many(2)))
            case b"b":
                self._build(state=self._pop())
            case _:
                raise self._error(f"pickle opcode {_OPCODE_NAMES.get(opcode, repr(opcode))}, which a released tensor never has")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._error("a pickle opcode finds no value")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple(self._pop() for _ in range(count))[::-1]

    def _pop_to_mark(self) -> tuple[Any, ...]:
        values: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                return tuple(reversed(values))
            values.append(value)
        raise self._error("a pickle opcode finds no mark")

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise self._error(f"memo entry {index} does not exist")
        self._push(self._memo[index])

    def _set_items(self, items: tuple[Any, ...]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise self._error(f"expected names and values for a dict, found {len(items)} items for {_describe(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                raise self._error(f"expected a new name in a dict, found {_describe(key)}")
            target[key] = value

    def _look_up(self, module: Any, name: Any) -> _Class:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._error("the name of a class is not a string")
        if (module, name) not in _CLASSES:
            raise self._error(f"names {_describe(f'{module}.{name}')}, which a released tensor never does; nothing was executed")
        return _CLASSES[module, name]

    def _make(self, function: Any, arguments: Any) -> _DType | _Array | _Quantized:
        match function, arguments:
            case _Class("_reconstruct"), (_Class("ndarray"), (0,), _Bytes(length=1, first=b"b")):
                return _Array()
            case _Class("dtype"), (str() | _Class() as code, False | 0, True | 1):
                if code not in _DTYPES:
                    raise self._error(f"expected dtype f4, i1 or bfloat16, found {_describe(code)}")
                return _DType(_DTYPES[code])
            case _Class("QuantizedWeight8bit"), ():
                return _Quantized()
        raise self._error(f"calls {_describe(function)} in a way that a released tensor never does; nothing was executed")

    def _build(self, *, state: Any) -> None:
        match self._top():
            case _DType(is_built=False) as dtype:
                self._check_dtype_state(dtype.name, state)
                dtype.is_built = True
            case _Array(stored=None) as array:
                array.stored = self._stored_array(state)
            case _Quantized(state=None) as quantized if isinstance(state, dict):
                quantized.state = state
            case other:
                raise self._error(f"sets the state of {_describe(other)} in a way that a released tensor never does")

    def _check_dtype_state(self, name: StoredDType, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 8 and state[:2] == (3, ">"):
            raise self._error(f"expected a little-endian array, found big-endian {name}")
        if not isinstance(state, tuple) or len(state) != 8 or state[:7] != _DTYPE_STATES[name] or not isinstance(state[7], int):
            raise self._error(f"the state of dtype {name} is not what NumPy writes")

    def _stored_array(self, state: Any) -> StoredArray:
        match state:
            case (1, tuple() as shape, _DType(is_built=True) as dtype, False | 0, _Bytes() as payload):
                pass
            case (1, tuple(), _DType(), True | 1, _Bytes()):
                raise self._error("expected an array in C order, found Fortran order")
            case _:
                raise self._error("the state of an array is not what NumPy writes")
        if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and size >= 1 for size in shape):
            raise self._error(f"expected a shape of positive sizes, found {_describe(shape)}")
        array = StoredArray(dtype=dtype.name, shape=shape, offset=payload.offset)
        if array.num_bytes != payload.length:
            raise self._error(f"an array of {array} takes {array.num_bytes:,} bytes, found {payload.length:,}")
        return array

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem} (byte {self._position:,})")


def _describe(value: Any) -> str:
    """A short, one-line form of a value from the file."""
    match value:
        case _Class(name):
            text = name
        case str() | int() | None:
            text = repr(value)
        case tuple() if all(isinstance(item, int) for item in value):
            text = str(list(value))
        case _:
            text = type(value).__name__.strip("_")
    return text if len(text) <= 100 else f"{text[:97]}..."
