"""The directory of compiled programs that jax keeps between starts: what a killed process left half written there is removed.

jax writes an entry in place and never writes over one, so a damaged entry would be read in vain, and its program compiled, at every start.
`engine/build.py` switches the cache on, and calls this after a start that had to compile something.

It knows entries that zlib compressed, as jax does with the packages that this project depends on. Where zstandard is installed, and from
Python 3.14 on, jax uses that, and entries that end too early stay.
"""

import zlib
from pathlib import Path

_ZLIB = 0x78  # first byte of what zlib compressed
_PIECE_BYTES = 1 << 20


def drop_damaged_entries(directory: Path) -> None:
    """Remove entries that end too early. One that another process is just writing may go, too: it is then written at a later start."""
    for path in directory.glob("*-cache"):
        try:
            if not _is_whole(path.read_bytes()):
                path.unlink(missing_ok=True)
        except OSError:  # somebody else's file, or gone already
            continue


def _is_whole(content: bytes) -> bool:
    if not content or content[0] != _ZLIB:
        return bool(content)
    decompressor = zlib.decompressobj()
    rest = content
    try:
        while rest:
            decompressor.decompress(rest, _PIECE_BYTES)
            rest = decompressor.unconsumed_tail
    except zlib.error:
        return False
    return decompressor.eof
