"""How much memory this process may use: what the machine has, or what the control groups it is in (a container's limit, say) leave of that.

Only version 2 of the control groups is known, and only Linux has them.
"""

import os
from contextlib import suppress
from pathlib import Path


def host_memory_bytes(root: Path = Path("/")) -> int:
    """The smallest of all limits. `root` is where `proc` and `sys` are."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([memory_bytes, *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    """Of the group and all those around it. In a container its own group is usually the mount's root."""
    mount = root / "sys/fs/cgroup"
    group = mount
    with suppress(OSError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        path = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        if ".." not in Path(path).parts:
            group = mount / path
    limits: list[int] = []
    for folder in (group, *group.parents):
        if folder.is_relative_to(mount):
            with suppress(OSError, ValueError):  # "max", or none at the root
                limits.append(int((folder / "memory.max").read_text()))
    return limits
