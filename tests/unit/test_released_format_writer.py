"""The writer of one released file: the same bytes as the release, whatever NumPy is installed."""

import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.checkpoint.released_format import read_index
from engine.checkpoint.released_writer import encode_tensor, write_tensor, write_tensor_in_blocks

TINY = Path(__file__).parents[1] / "data" / "tiny-a" / "ckpt-0"
BF16 = np.dtype(ml_dtypes.bfloat16)


def unallocated(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


@pytest.mark.parametrize("path", sorted(TINY.iterdir()), ids=lambda path: path.name)
def test_rewriting_a_file_of_tiny_a_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    stored = read_index(path)

    write_tensor(tmp_path / "copy", stored.map_weight(), scales=stored.map_scales())

    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("shape", "scales", "num_bytes"),
    [
        ((131072, 6144), None, 3_221_225_637),
        ((6144,), None, 24_727),
        ((8, 6144, 32768), (8, 1, 32768), 1_611_137_347),
        ((8, 32768, 6144), (8, 8, 6144), 1_611_399_491),
        ((6144, 1024), (1, 1024), 6_293_814),
        ((6144, 6144), (8, 6144), 37_847_359),
        ((6144, 6144), (1, 6144), 37_761_334),
        ((6144, 8), None, 196_770),
    ],
)
def test_the_eight_shapes_of_the_release_give_its_file_sizes(
    shape: tuple[int, ...], scales: tuple[int, ...] | None, num_bytes: int
) -> None:
    if scales is None:
        parts = encode_tensor(unallocated(shape, np.float32))
    else:
        parts = encode_tensor(unallocated(shape, np.int8), scales=unallocated(scales, BF16))

    assert sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts) == num_bytes


def dumps_as_numpy_1(value: object, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Python's own pickler, with the module name and the bfloat16 flags of NumPy 1.26."""
    module = types.ModuleType("numpy.core.multiarray")

    def _reconstruct() -> None: ...

    _reconstruct.__module__, _reconstruct.__qualname__ = module.__name__, "_reconstruct"
    module._reconstruct = _reconstruct  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: object) -> Any:
            if isinstance(value, np.ndarray):
                _, *rest = value.__reduce__()
                return (_reconstruct, *rest)
            if isinstance(value, np.dtype) and value == BF16:
                function, arguments, state = value.__reduce__()  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]
                return function, arguments, (*state[:-1], 80)
            return NotImplemented

    file = io.BytesIO()
    Pickler(file, protocol=4).dump(value)
    return file.getvalue()


# Below, at and above the sizes where length fields widen and where payloads leave their frame.
@pytest.mark.parametrize("columns", [1, 3, 127, 128, 255, 256, 8_000, 16_383, 16_384, 32_500, 32_767, 32_768, 65_535, 65_536, 70_000])
def test_opcodes_and_frames_are_those_of_pythons_pickler(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("QuantizedWeight8bit", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", kind, raising=False)
    quantized: Any = kind()
    quantized.weight = np.full((2, columns), 7, np.int8)
    quantized.scales = np.full((1, columns), 0.5, BF16)
    plain = np.full((1, columns, 1), 0.25, np.float32)

    write_tensor(tmp_path / "quantized", quantized.weight, scales=quantized.scales)
    write_tensor(tmp_path / "plain", plain)

    assert (tmp_path / "quantized").read_bytes() == dumps_as_numpy_1(quantized, monkeypatch)
    assert (tmp_path / "plain").read_bytes() == dumps_as_numpy_1(plain, monkeypatch)


def test_arrays_in_any_memory_order_are_written_in_c_order(tmp_path: Path) -> None:
    array = np.arange(40_000, dtype=np.float32).reshape(200, 200).T

    write_tensor(tmp_path / "tensor", array)

    np.testing.assert_array_equal(read_index(tmp_path / "tensor").map_weight(), array)


@pytest.mark.parametrize("num_rows", [1, 33, 200])
def test_a_weight_written_in_blocks_is_the_same_file(tmp_path: Path, num_rows: int) -> None:
    weight, scales = np.arange(80_000, dtype=np.int8).reshape(2, 200, 200), np.full((2, 1, 200), 0.5, BF16)
    blocks = (weight.reshape(-1, 200)[start : start + num_rows] for start in range(0, 400, num_rows))
    write_tensor(tmp_path / "whole", weight, scales=scales)

    write_tensor_in_blocks(tmp_path / "blocks", weight.shape, np.int8, blocks, scales=scales)

    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("count", [79_999, 80_001])
def test_blocks_that_do_not_add_up_to_the_weight_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 80,000 numbers of 320,000 bytes, found {count:,}"):
        write_tensor_in_blocks(tmp_path / "tensor", (400, 200), np.float32, [np.zeros(count, np.float32)])


@pytest.mark.parametrize(("weight", "scales"), [(np.float64, None), (BF16, None), (np.int8, np.float32), (np.uint8, BF16)])
def test_dtypes_that_the_release_does_not_have_are_not_written(weight: Any, scales: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        encode_tensor(np.ones((2, 2), weight), scales=None if scales is None else np.ones((1, 2), scales))
