"""`python full_disk.py SRC DISK AFTER`: a conversion on a disk that fills up under it, and once more with the room back.

Runs as root of a mount namespace of its own (`unshare --user --map-root-user --mount`), so nobody else sees the disk. Prints one JSON
object: how the first run ended, what it left, whether that loads, and the digests of the second's files beside those of a run that nobody
disturbed. Ends with status 77 where such a disk cannot be had.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.convert import ConvertProgress, ConvertTotals, Settings, convert
from engine.config import read_model_config
from engine.errors import CheckpointError

NO_DISK = 77
DISK_BYTES = 4 << 20
SETTINGS = Settings(weights="int4", group=64)
FILE_BYTES = 60_000


def main() -> int:
    source, disk, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        return NO_DISK
    target, filler = disk / "out", disk / "filler"

    def fill(progress: ConvertProgress) -> None:
        if progress.tensors_done >= after and not filler.exists():
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    return

    try:
        convert(source, target, SETTINGS, report=fill, max_file_bytes=FILE_BYTES)
        first = "finished"
    except CheckpointError as error:
        first = str(error)
    left = sorted(path.name for path in target.iterdir())
    loads = _loads(target)
    filler.unlink()
    totals = _convert(source, target)
    _convert(source, disk / "undisturbed")
    digests = [_digests(target), _digests(disk / "undisturbed")]
    print(json.dumps({"first": first, "left": left, "loads": loads, "kept": totals.files_kept, "digests": digests}))
    return 0


def _convert(source: Path, target: Path) -> ConvertTotals:
    return convert(source, target, SETTINGS, report=lambda _: None, max_file_bytes=FILE_BYTES)


def _loads(target: Path) -> str | None:
    """None, or why not."""
    try:
        open_checkpoint(target, read_model_config(target))
    except CheckpointError as error:
        return str(error)
    return None


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


if __name__ == "__main__":
    sys.exit(main())
