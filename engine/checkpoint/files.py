"""Opening files that others made: only regular ones, without waiting on a pipe, with an error that names what is there instead."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from engine.errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular_file(path: Path) -> BinaryIO:
    """Open for reading. A symbolic link is followed and must end at a regular file.

    Raises `CheckpointError` for anything else, before it is opened: opening a pipe would wait and opening a device may act on it.
    """
    try:
        _check_is_regular(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_explain(path, error)}") from None
    file = os.fdopen(descriptor, "rb")
    try:
        _check_is_regular(path, os.fstat(descriptor))
    except CheckpointError:
        file.close()
        raise
    return file


def read_small_file(path: Path, *, max_bytes: int) -> bytes:
    """All of a regular file. Raises `CheckpointError` where it cannot be read or is longer than `max_bytes`."""
    with open_regular_file(path) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise CheckpointError(f"{path}: expected at most {max_bytes:,} bytes")
    return content


def _check_is_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise CheckpointError(f"{path}: expected a regular file, found {found}")


def _explain(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return f"is no file name: {error}"
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"is a symbolic link to {os.readlink(path)}, which does not exist"
    return f"cannot be opened: {error.strerror}"
