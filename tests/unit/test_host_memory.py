"""A container's limit counts, not the machine it runs on."""

import os
from pathlib import Path

import pytest

from engine.host_memory import host_memory_bytes

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("/", {}, MACHINE),
        ("/", {"": "300000"}, 300_000),
        ("/", {"": "max"}, MACHINE),
        ("/", {"": str(2 * MACHINE)}, MACHINE),
        ("/a/b", {"a/b": "max", "a": "200000"}, 200_000),
        ("/a/b", {"a/b": "100000", "a": "200000"}, 100_000),
        ("/gone", {"": "400000"}, 400_000),
        ("/../above", {"": "500000"}, 500_000),
    ],
)
def test_the_smallest_limit_of_all_groups_around_a_process_counts(
    tmp_path: Path, group: str, limits: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"12:cpu:/elsewhere\n0::{group}\n")
    for folder, limit in limits.items():
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / "memory.max").write_text(limit + "\n")

    assert host_memory_bytes(tmp_path) == expected


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert host_memory_bytes(tmp_path) == MACHINE
