"""What a checkpoint is once it is open, whatever its format: named tensors whose numbers stay on disk until a slice of them is asked for.

A format (`released`, `store`, `huggingface`) checks a directory and describes it with these types; `load`, `verify` and `convert` know
nothing else. Everything is mapped anew each time and read through the page cache, so an open checkpoint holds no files and no memory.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np

from engine.checkpoint.files import open_regular_file
from engine.errors import CheckpointError
from engine.model.params import ParamSpec

StoredDType = Literal["float32", "bfloat16", "int8", "uint8"]
WeightForm = Literal["float32", "bfloat16", "int8", "int4"]

ITEM_BYTES: dict[StoredDType, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}

# bfloat16 is mapped as its bits and viewed through a dtype that no pickle ever touched.
_BITS = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "int8": np.dtype("i1"), "uint8": np.dtype("u1")}


class HostArray(Protocol):
    """Numbers on disk: indexing with a tuple of integers and slices reads those and no others."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """Where one array lies in its file: C order, little-endian."""

    dtype: StoredDType
    shape: tuple[int, ...]
    offset: int  # of the first byte

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileArray:
    """One array of one file."""

    path: Path
    file_size: int
    stored: StoredArray

    @property
    def dtype(self) -> StoredDType:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes

    @property
    def regions(self) -> tuple["FileArray", ...]:
        return (self,)

    def open(self) -> np.ndarray:
        """A read-only `np.memmap`. Raises `CheckpointError` where the file has changed or cannot be mapped."""
        with open_regular_file(self.path) as file:
            if file.seek(0, 2) != self.file_size:
                raise CheckpointError(f"{self.path}: changed while it was read")
            try:
                mapped = np.memmap(file, dtype=_BITS[self.dtype], mode="r", offset=self.stored.offset, shape=self.shape)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path}: cannot be mapped into memory: {error}") from None
        return mapped.view(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else mapped


class ArraySource(Protocol):
    """An array that can be opened; `FileArray`, or one put together from several."""

    @property
    def dtype(self) -> StoredDType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def regions(self) -> tuple[FileArray, ...]:
        """Where its bytes are."""
        ...

    def open(self) -> HostArray:
        """Raises `CheckpointError`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTensor:
    """One checked tensor. `weight` and `scales` map its files anew each time they are asked for, so keep them no longer than needed."""

    spec: ParamSpec
    form: WeightForm
    weight_source: ArraySource
    scales_source: ArraySource | None = None

    @property
    def path(self) -> Path:
        """The file, or the first of them."""
        return self.regions[0].path

    @property
    def regions(self) -> tuple[FileArray, ...]:
        return self.weight_source.regions + (self.scales_source.regions if self.scales_source else ())

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and scales together."""
        return self.weight_source.num_bytes + (self.scales_source.num_bytes if self.scales_source else 0)

    @property
    def weight(self) -> HostArray:
        """By form: float32, bfloat16 or int8 of the spec's shape, or int4 as uint8 [*lead, k / 2, n]. Raises `CheckpointError`."""
        return self.weight_source.open()

    @property
    def scales(self) -> HostArray | None:
        """bfloat16 [*lead, groups, n] of int8 and int4, else None. Raises `CheckpointError`."""
        return self.scales_source.open() if self.scales_source else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Every tensor of a model, by released name."""

    format: Literal["released", "store", "huggingface"]
    directory: Path
    tensors: dict[str, HostTensor]
    row_parallel_scale_groups: int | None = None  # of int8 matrices

    @property
    def num_params(self) -> int:
        return sum(tensor.spec.num_params for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights and scales."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def file_sizes(self) -> dict[Path, int]:
        """The files with tensors, in the order of the tensors."""
        return {region.path: region.file_size for tensor in self.tensors.values() for region in tensor.regions}

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.file_sizes.values())
