"""The reader of one released file: what it accepts, and that everything else is refused by name with nothing executed."""

import contextlib
import json
import os
import pickle
import pickletools
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint.released_format import read_index
from engine.checkpoint.released_writer import encode_tensor, write_tensor
from engine.errors import CheckpointError

TINY = Path(__file__).parents[1] / "data" / "tiny-a"
BF16 = np.dtype(ml_dtypes.bfloat16)
CANARY = "canary-was-executed"
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
COMMAND = f"touch {CANARY}".encode()
SHORT_COMMAND = b"\x8c" + bytes([len(COMMAND)]) + COMMAND


def quantized() -> tuple[np.ndarray, np.ndarray]:
    weight = np.arange(-12, 12, dtype=np.int8).reshape(4, 6)
    return weight, np.linspace(0.1, 2, 12).reshape(2, 6).astype(BF16)


def plain_bytes(array: np.ndarray, protocol: int = 4) -> bytes:
    return pickle.dumps(array, protocol=protocol)


def without_frame(content: bytes) -> bytes:
    assert content[2] == 0x95
    return content[:2] + content[11:]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where a canary would appear
    return tmp_path / "tensor00007_000"


def refuse(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_index(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(CANARY).exists()


def payloads(content: bytes) -> list[bytes]:
    """All array bytes of a pickle, found by the standard library's own disassembler."""
    found = [argument for opcode, argument, _ in pickletools.genops(content) if "BINBYTES" in opcode.name]
    return [argument for argument in found if isinstance(argument, bytes) and argument != b"b"]


@pytest.mark.parametrize("entry", json.loads((TINY / "manifest.json").read_bytes()), ids=lambda entry: entry["file"])
def test_every_tensor_of_tiny_a_is_found_where_the_disassembler_finds_it(entry: dict) -> None:
    path = TINY / "ckpt-0" / entry["file"]
    expected = [(kind, *entry[kind]) for kind in ("array", "weight", "scales") if kind in entry]

    stored = read_index(path)

    arrays = [stored.weight] + ([stored.scales] if stored.scales else [])
    assert [(array.dtype, list(array.shape)) for array in arrays] == [(dtype, shape) for _, dtype, shape in expected]
    maps = [stored.map_weight(), stored.map_scales()]
    assert [mapped.tobytes() for mapped in maps if mapped is not None] == payloads(path.read_bytes())


def test_values_come_back_as_written_through_read_only_maps(path: Path) -> None:
    weight, scales = quantized()
    write_tensor(path, weight, scales=scales)

    stored = read_index(path)
    mapped, mapped_scales = stored.map_weight(), stored.map_scales()

    assert isinstance(mapped, np.memmap)
    assert mapped_scales is not None
    assert mapped_scales.dtype == BF16
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, weight)
    np.testing.assert_array_equal(mapped_scales, scales)


@pytest.mark.parametrize("count", [1, 255, 256, 65_535, 65_536, 70_000])
def test_every_kind_of_payload_and_frame_is_read(path: Path, count: int) -> None:
    array = np.arange(count, dtype=np.int8)
    path.write_bytes(plain_bytes(array))

    np.testing.assert_array_equal(read_index(path).map_weight(), array)


def test_files_pickled_by_the_installed_numpy_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("QuantizedWeight8bit", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", kind, raising=False)
    original: Any = kind()
    original.weight, original.scales = quantized()
    path.write_bytes(pickle.dumps(original, protocol=4))

    stored = read_index(path)

    np.testing.assert_array_equal(stored.map_weight(), original.weight)
    np.testing.assert_array_equal(stored.map_scales(), original.scales)


def test_framing_memoising_and_protocol_number_do_not_matter(path: Path) -> None:
    array = np.arange(100, dtype=np.float32)
    content = plain_bytes(array)

    for variant in (without_frame(content), pickletools.optimize(content), b"\x80\x05" + content[2:]):
        path.write_bytes(variant)
        np.testing.assert_array_equal(read_index(path).map_weight(), array)


@pytest.mark.parametrize("header", [b"B" + struct.pack("<I", 8), b"\x8e" + struct.pack("<Q", 8)], ids=["BINBYTES", "BINBYTES8"])
def test_longer_length_fields_than_needed_are_read(path: Path, header: bytes) -> None:
    array = np.array([1.5, -2.0], np.float32)
    path.write_bytes(without_frame(plain_bytes(array)).replace(b"C\x08", header))

    np.testing.assert_array_equal(read_index(path).map_weight(), array)


def test_a_payload_over_four_gigabytes_is_skipped_not_read(path: Path) -> None:
    array = np.broadcast_to(np.zeros((), np.float32), (5, 1 << 28))
    with path.open("wb") as file:
        for part in encode_tensor(array):
            if isinstance(part, bytes):
                file.write(part)
            else:
                file.seek(part.nbytes, os.SEEK_CUR)

    stored = read_index(path)

    assert stored.weight.num_bytes == 5 << 30
    assert stored.map_weight()[4, -1] == 0


def test_fresh_bfloat16_arrays_still_go_through_jax_after_loading() -> None:
    import jax.numpy as jnp

    stored = read_index(TINY / "ckpt-0" / "tensor00003_000")
    mapped = stored.map_scales()

    assert jnp.asarray(np.ones(3, BF16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(jnp.asarray(mapped)), mapped)
    np.testing.assert_array_equal(np.asarray(jnp.asarray(stored.map_weight())), stored.map_weight())


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    write_tensor(path, quantized()[0], scales=quantized()[1])
    content = path.read_bytes()

    refuse(path, b"", "is empty")
    for end in range(1, len(content)):
        refuse(path, content[:end], "truncated|expected a pickle")
    for end in range(1, len(content) - 9):
        refuse(path, without_frame(content)[:end], "truncated|expected a pickle")


@pytest.mark.parametrize("end", [1, 100, 200, 5_000, 170_000, 176_336, 176_340, 178_000, 178_487])
def test_a_truncated_tensor_of_tiny_a_is_refused(path: Path, end: int) -> None:
    refuse(path, (TINY / "ckpt-0" / "tensor00003_000").read_bytes()[:end], "truncated|expected a pickle")


@pytest.mark.parametrize("extra", [b"\0", b".", b"\x80\x04N."])
def test_bytes_after_the_end_are_refused(path: Path, extra: bytes) -> None:
    refuse(path, plain_bytes(np.ones(4, np.float32)) + extra, "longer than its content")


HOSTILE = {  # the pickle after its protocol, and the cause that is given
    "GLOBAL": (b"cos\nsystem\n" + SHORT_COMMAND + b"\x85R.", "opcode GLOBAL"),
    "STACK_GLOBAL": (b"\x8c\x02os\x8c\x06system\x93" + SHORT_COMMAND + b"\x85R.", "names 'os.system'"),
    "STACK_GLOBAL of posix": (b"\x8c\x05posix\x8c\x06system\x93" + SHORT_COMMAND + b"\x85R.", "names 'posix.system'"),
    "INST": (b"(" + SHORT_COMMAND + b"ios\nsystem\n.", "opcode INST"),
    "OBJ": (b"(cos\nsystem\n" + SHORT_COMMAND + b"o.", "opcode GLOBAL"),
    "EXT1": (b"\x82\x01.", "opcode EXT1"),
    "EXT2": (b"\x83\x01\x00.", "opcode EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "PERSID": (b"Phello\n.", "opcode PERSID"),
    "BINPERSID": (b"K\x01Q.", "opcode BINPERSID"),
    "NEWOBJ_EX": (b"\x8c\x05numpy\x8c\x07ndarray\x93)}\x92.", "opcode NEWOBJ_EX"),
    "NEXT_BUFFER": (b"\x97.", "opcode NEXT_BUFFER"),
    "BYTEARRAY8": (b"\x96" + bytes(8) + b".", "opcode BYTEARRAY8"),
    "dotted name": (b"\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "names 'numpy.ndarray.tofile'"),
    "other function of an allowed module": (b"\x8c\x15numpy.core.multiarray\x8c\x06scalar\x93.", "names 'numpy.core.multiarray.scalar'"),
    "class name that is no string": (b"K\x01K\x02\x93.", "not a string"),
    "ndarray called": (b"\x8c\x05numpy\x8c\x07ndarray\x93J\xff\xff\xff\x7f\x85\x85R.", "calls ndarray"),
    "ndarray constructed": (b"\x8c\x05numpy\x8c\x07ndarray\x93)\x81.", "calls ndarray"),
    "QuantizedWeight8bit with arguments": (b"\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93K\x01\x85\x81.", "calls QuantizedWeight8bit"),
    "a class as the object": (b"\x8c\x05numpy\x8c\x07ndarray\x93.", "found ndarray"),
    "state set on a class": (b"\x8c\x05numpy\x8c\x07ndarray\x93}b.", "state of ndarray"),
    "REDUCE of a number": (b"K\x01)R.", "calls 1"),
    "REDUCE on an empty stack": (b"R.", "finds no value"),
    "BUILD on an empty stack": (b"b.", "finds no value"),
    "TUPLE without mark": (b"t.", "finds no mark"),
    "mark as the object": (b"(.", "found Mark"),
    "mark remembered": (b"(\x94.", "finds no value"),
    "two objects": (b"NN.", "found 2"),
    "no object": (b".", "found 0"),
    "None": (b"N.", "found None"),
    "dict": (b"}.", "found dict"),
    "memo entry that was never made": (b"h\x63.", "memo entry 99"),
    "item of a number": (b"K\x01\x8c\x01aNs.", "for 1"),
    "odd number of items": (b"}(\x8c\x01au.", "found 1 items"),
    "twice the same item": (b"}(\x8c\x01aN\x8c\x01aNu.", "found 'a'"),
    "item under a dict": (b"}(}Nu.", "found dict"),
    "huge string": (b"\x8d" + struct.pack("<Q", 1 << 62) + b".", "a string of"),
    "long string": (b"X" + struct.pack("<I", 3000) + bytes(3000) + b".", "a string of 3,000 bytes"),
    "string that is not UTF-8": (b"\x8c\x01\xff.", "not UTF-8"),
    "huge integer": (b"\x8a\xff" + bytes(255) + b".", "integer of 255 bytes"),
    "huge frame": (b"\x95" + struct.pack("<Q", 1 << 63) + b"N.", "truncated"),
    "frame in a frame": (b"\x95" + struct.pack("<Q", 11) + b"\x95" + struct.pack("<Q", 0) + b"N.", "begins inside another"),
    "frame that ends in an opcode": (b"\x95" + struct.pack("<Q", 1) + b"K\x01.", "ends inside an opcode"),
    "endless opcodes": (b")" * 5000 + b".", "more than 1000"),
    "unknown opcode": (b"\xfe.", "xfe"),
}


@pytest.mark.parametrize(("body", "cause"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_or_senseless_pickle_is_refused_and_nothing_is_executed(path: Path, body: bytes, cause: str) -> None:
    refuse(path, b"\x80\x04" + body, cause)


def test_the_hostile_pickles_would_really_run_code(path: Path) -> None:
    pickle.loads(b"\x80\x04" + HOSTILE["STACK_GLOBAL"][0])

    assert path.with_name(CANARY).exists()


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip file", b"\x80\x02K\x01.", b"\x93NUMPY\x01\x00", b"\x80", b"plain text"])
def test_a_file_that_is_no_pickle_of_protocol_4_is_refused(path: Path, content: bytes) -> None:
    refuse(path, content, "expected a pickle of protocol 4")


def test_a_git_lfs_pointer_is_recognised(path: Path) -> None:
    refuse(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer")


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.ones((2, 3), ">f4"), "big-endian"),
        (np.ones((3, 2), np.float32).T.copy(order="F"), "Fortran"),
        (np.array([None, "x"], object), "found 'O8'"),
        (np.ones(3, np.float64), "found 'f8'"),
        (np.ones(3, np.uint8), "found 'u1'"),
        (np.ones(3, ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
        (np.zeros(2, [("a", "f4")]), "found 'V4'"),
        (np.ones((0, 3), np.float32), "positive sizes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_array_of_another_kind_is_refused(path: Path, array: np.ndarray, match: str) -> None:
    refuse(path, plain_bytes(array), match)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (b"K\x05", "takes 20 bytes, found 16"),
        (b"J\xff\xff\xff\x7f", "found 16"),
        (b"J\xff\xff\xff\xff", "positive sizes"),
        (b"\x8a\x08" + struct.pack("<q", (1 << 62) + 4), "found 16"),  # times 4 this is 16 in 64-bit arithmetic
        (b"\x88", "positive sizes"),
        (b"N", "positive sizes"),
        (b")", "positive sizes"),
    ],
)
def test_a_shape_that_does_not_match_the_bytes_is_refused(path: Path, size: bytes, match: str) -> None:
    content = without_frame(plain_bytes(np.ones(4, np.float32)))

    refuse(path, content.replace(b"K\x04\x85", size + b"\x85"), match)


def test_a_payload_longer_than_the_file_is_refused(path: Path) -> None:
    content = without_frame(plain_bytes(np.ones(4, np.float32)))

    refuse(path, content.replace(b"C\x10", b"\x8e" + struct.pack("<Q", (1 << 63) + 16)), "truncated")


def test_a_quantised_weight_needs_both_parts(path: Path) -> None:
    weight, scales = quantized()
    write_tensor(path, weight, scales=scales)
    content = without_frame(path.read_bytes())

    refuse(path, content.replace(b"scales", b"scaled"), "weight and scales")


def test_a_weight_that_serves_as_its_own_scales_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("QuantizedWeight8bit", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", kind, raising=False)
    twice: Any = kind()
    twice.weight = twice.scales = np.ones((2, 2), np.int8)

    refuse(path, pickle.dumps(twice, protocol=4), "share their bytes")


def test_a_file_that_changed_size_since_its_index_was_read_is_refused(path: Path) -> None:
    write_tensor(path, np.ones(8, np.float32))
    stored = read_index(path)
    path.write_bytes(path.read_bytes()[:-8])

    with pytest.raises(CheckpointError, match="changed"):
        stored.map_weight()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to-pipe").symlink_to("pipe")
    cases = {
        "pipe": "a named pipe",
        "to-pipe": "a named pipe",
        "folder": "a directory",
        "dangling": "link to nowhere",
        "loop": "cannot be opened",
        "absent": "cannot be opened",
        "nul\0byte": "is no file name",
    }

    for name, problem in cases.items():
        with pytest.raises(CheckpointError, match=problem):
            read_index(tmp_path / name)
    with pytest.raises(CheckpointError, match="character device"):
        read_index(Path("/dev/zero"))


def test_a_symbolic_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    write_tensor(tmp_path / "blob", np.ones(8, np.float32))
    (tmp_path / "first").symlink_to("blob")
    (tmp_path / "second").symlink_to(tmp_path / "first")

    assert read_index(tmp_path / "second").map_weight().sum() == 8


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "tensor00000_000"


def small_files() -> list[bytes]:
    parts = [encode_tensor(quantized()[0], scales=quantized()[1]), encode_tensor(np.ones((2, 3), np.float32))]
    framed = [b"".join(part if isinstance(part, bytes) else part.tobytes() for part in encoded) for encoded in parts]
    return framed + [without_frame(content) for content in framed]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(small_files())))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        removed = draw(st.integers(0, 3))
        content[at : at + removed] = draw(
            st.binary(max_size=3) | st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
        )
    return bytes(content)


@settings(max_examples=300, deadline=None)
@given(content=damaged_files())
def test_damage_anywhere_is_refused_or_leaves_a_sound_index(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    try:
        stored = read_index(scratch)
    except CheckpointError:
        return

    for array in filter(None, (stored.weight, stored.scales)):
        assert 0 < array.offset <= array.offset + array.num_bytes < len(content)
    assert stored.map_weight().shape == stored.weight.shape


def test_flipped_bits_are_refused_or_harmless(scratch: Path) -> None:
    content = small_files()[0]

    for bit in range(0, len(content) * 8, 3):  # two or three of every byte
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        scratch.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            assert read_index(scratch).weight.dtype == "int8"
