"""One torch `.bin` file: where its tensors are, learnt without torch and without unpickling it.

Since torch 1.6 such a file is a zip archive: `data.pkl`, a pickle of names and tensors that refer to storages by key, and `data/KEY`, the
storages' bytes, stored as they are. The pickle's opcodes are walked on symbolic values, with an allow-list of opcodes and classes; nothing
that it names is imported or called. The bytes are memory-mapped where they lie in the archive. `huggingface` says which tensor is which.
"""

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.checkpoint.files import open_regular_file
from engine.checkpoint.tensors import ITEM_BYTES, FileArray, StoredArray, StoredDType
from engine.errors import CheckpointError

_MAX_PICKLE_BYTES = 64 << 20
_MAX_DIMENSIONS = 8
_LOCAL_HEADER_BYTES = 30

_STORAGES: dict[str, StoredDType] = {
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
}


def read_torch(path: Path) -> dict[str, FileArray]:
    """The tensors of one file by name; costs reading its pickle and the archive's list.

    Raises `CheckpointError`, naming the file, for everything but an archive as torch writes it, with dense tensors in C order.
    """
    with open_regular_file(path) as file:
        try:
            size = file.seek(0, 2)
            members = _Archive(file, path=path, size=size)
            content = members.read_small("data.pkl")
            if "byteorder" in members and members.read_small("byteorder") != b"little":
                raise CheckpointError(f"{path}: expected little-endian tensors")
            tensors = _Walker(content, path=path).run()
            return {name: _locate(path, name, tensor, members, size) for name, tensor in tensors.items()}
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class _Class:
    """A global of the allow-list; nothing is imported."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """The bytes that tensors lie in."""

    dtype: StoredDType
    key: str
    num_items: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int  # in items
    shape: tuple[int, ...]


class _Mark:
    """Where a tuple or a run of dict items begins."""


_MARK = _Mark()

_CLASSES = {
    "collections OrderedDict": _Class("OrderedDict"),
    "torch._utils _rebuild_tensor_v2": _Class("_rebuild_tensor_v2"),
    "torch._utils _rebuild_parameter": _Class("_rebuild_parameter"),
    **{f"torch {name}": _Class(name) for name in _STORAGES},
}


class _Archive:
    """The members of a zip file, below whatever folder torch named it by."""

    def __init__(self, file: BinaryIO, *, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error) as error:
            start = file.seek(0) or file.read(8)
            if start == b"version ":
                raise CheckpointError(f"{path}: found a Git LFS pointer; the weights themselves were not downloaded") from None
            raise CheckpointError(f"{path}: is no torch file of version 1.6 or later, or truncated: {error}") from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            name = member.filename.partition("/")[2]
            if name in self._members:
                raise CheckpointError(f"{path}: holds {member.filename[:200]!r} twice")
            self._members[name] = member

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read_small(self, name: str) -> bytes:
        """All bytes of a member."""
        offset, size = self.locate(name)
        if size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self._path}: its {name} has {size:,} bytes; expected at most {_MAX_PICKLE_BYTES:,}")
        self._file.seek(offset)
        return self._file.read(size)

    def locate(self, name: str) -> tuple[int, int]:
        """Where a member's bytes begin, and how many there are."""
        if name not in self._members:
            raise CheckpointError(f"{self._path}: lacks {name[:200]!r}; a torch file holds data.pkl and data/0 ...")
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise CheckpointError(
                f"{self._path}: {name[:200]!r} is compressed or encrypted, so it cannot be mapped; unpack and save it again"
            )
        self._file.seek(member.header_offset)
        header = self._file.read(_LOCAL_HEADER_BYTES)
        if len(header) != _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self._path}: the archive's entry of {name[:200]!r} is damaged")
        offset = (
            member.header_offset + _LOCAL_HEADER_BYTES + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        if offset + member.file_size > self._size:
            raise CheckpointError(
                f"{self._path}: is truncated: {self._size:,} bytes, {name[:200]!r} ends after {offset + member.file_size:,}"
            )
        return offset, member.file_size


def _locate(path: Path, name: str, tensor: _Tensor, members: _Archive, file_size: int) -> FileArray:
    offset, num_bytes = members.locate(f"data/{tensor.storage.key}")
    item = ITEM_BYTES[tensor.storage.dtype]
    if num_bytes != tensor.storage.num_items * item:
        raise CheckpointError(
            f"{path}: the storage of {name[:200]!r} has {num_bytes:,} bytes, expected {tensor.storage.num_items:,} items of {item}"
        )
    stored = StoredArray(dtype=tensor.storage.dtype, shape=tensor.shape, offset=offset + tensor.offset * item)
    if tensor.offset + math.prod(tensor.shape) > tensor.storage.num_items:
        raise CheckpointError(f"{path}: {name[:200]!r} is {stored}, which reaches beyond its storage")
    return FileArray(path=path, file_size=file_size, stored=stored)


class _Walker:
    """A pickle machine for dicts of tensors. It reads, checks and remembers; it never calls or imports what the pickle names."""

    def __init__(self, content: bytes, *, path: Path) -> None:
        self._content = content
        self._path = path
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> dict[str, _Tensor]:
        try:
            for opcode, argument, position in pickletools.genops(self._content):
                self._position = position or 0
                self._execute(opcode.name, argument)
        except (ValueError, OverflowError) as error:
            raise self._error(f"is no pickle: {error}") from None
        if len(self._stack) != 1 or not isinstance(self._stack[0], dict):
            raise self._error("expected one dict of tensors")
        for name, tensor in self._stack[0].items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise self._error(f"expected tensors by name, found {_describe(tensor)} as {_describe(name)}")
        return self._stack[0]

    def _execute(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                self._stack.append(argument)
            case "MARK":
                self._stack.append(_MARK)
            case "EMPTY_TUPLE":
                self._stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._stack.append(self._pop_many(int(opcode[-1])))
            case "TUPLE":
                self._stack.append(self._pop_to_mark())
            case "EMPTY_DICT":
                self._stack.append({})
            case "SETITEM":
                self._set_items(self._pop_many(2))
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise self._error(f"memo entry {argument} does not exist")
                self._stack.append(self._memo[argument])
            case "GLOBAL":
                self._stack.append(self._look_up(argument))
            case "STACK_GLOBAL":
                module, name = self._pop_many(2)
                self._stack.append(self._look_up(f"{module} {name}"))
            case "BINPERSID":
                self._stack.append(self._storage(self._pop()))
            case "REDUCE":
                self._stack.append(self._make(*self._pop_many(2)))
            case "BUILD":
                self._pop()  # what torch remembers of a state dict beside its tensors
                if not isinstance(self._top(), dict):
                    raise self._error(f"sets the state of {_describe(self._top())}")
            case _:
                raise self._error(f"pickle opcode {opcode}, which a file of tensors never has; nothing was executed")

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

    def _set_items(self, items: tuple[Any, ...]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise self._error(f"expected names and values for a dict, found {len(items)} items for {_describe(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                raise self._error(f"expected a new name in a dict, found {_describe(key)}")
            target[key] = value

    def _look_up(self, name: str) -> _Class:
        if name in _CLASSES:
            return _CLASSES[name]
        if name.startswith("torch ") and name.endswith("Storage"):
            raise self._error(f"holds tensors of {name[6:]}; known are {', '.join(_STORAGES)}")
        raise self._error(f"names {_describe(name.replace(' ', '.'))}, which a file of tensors never does; nothing was executed")

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", _Class(name), str() as key, str(), int() as num_items) if name in _STORAGES:
                return _Storage(_STORAGES[name], key, num_items)
        raise self._error(f"expected a reference to a storage, found {_describe(reference)}")

    def _make(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Class("OrderedDict"), ():
                return {}
            case _Class("_rebuild_parameter"), (_Tensor() as tensor, bool(), dict()):
                return tensor
            case _Class("_rebuild_tensor_v2"), (_Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, *_):
                return self._tensor(storage, offset, shape, strides)
        raise self._error(f"calls {_describe(function)} in a way that a file of tensors never does; nothing was executed")

    def _tensor(self, storage: _Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> _Tensor:
        if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and size >= 1 for size in shape) or offset < 0:
            raise self._error(f"expected a shape of positive sizes, found {_describe(shape)} at {offset}")
        dense = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        if strides != dense:
            raise self._error(f"expected a tensor in C order, found shape {_describe(shape)} with strides {_describe(strides)}")
        return _Tensor(storage, offset, shape)

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: its data.pkl {problem} (byte {self._position:,})")


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
