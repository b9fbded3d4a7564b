"""What is left of an entry when its writer is killed does not stay."""

import zlib

from engine.compile_cache import drop_damaged_entries

ENTRY = zlib.compress(bytes(range(256)) * 40_000)


def test_a_half_written_entry_is_removed_and_a_whole_one_stays(tmp_path):
    for name, content in {"whole": ENTRY, "half": ENTRY[: len(ENTRY) // 2], "empty": b"", "wrong": ENTRY[:20] + b"\xff" * 50}.items():
        (tmp_path / f"{name}-cache").write_bytes(content)

    drop_damaged_entries(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["whole-cache"]


def test_what_is_no_entry_or_compressed_otherwise_is_left_alone(tmp_path):
    (tmp_path / "notes").write_bytes(ENTRY[:10])
    (tmp_path / "other-cache").write_bytes(b"\x28\xb5\x2f\xfd half of something")

    drop_damaged_entries(tmp_path)

    assert len(list(tmp_path.iterdir())) == 2
