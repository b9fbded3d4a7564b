"""What the server and a grammar worker say to each other: texts there, answers back, in frames of a bounded length.

A frame is a length in four bytes, big-endian, and that many bytes. The worker begins with an empty one, when it can take a grammar; then
each text is answered by one `Answer`. Imported by both sides, so it imports nothing heavy.
"""

import struct

import msgspec

HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 64 * 2**20  # above what any limit on the text lets through: a longer one is a fault
MAX_REASON_CHARS = 1000


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one grammar."""

    grammar: str = ""  # in the form that the engine takes
    reason: str | None = None  # why it is not taken
    is_last: bool = False  # the worker ends now: it has grown


def frame(payload: bytes) -> bytes:
    """The payload with its length before it."""
    return HEADER.pack(len(payload)) + payload


def payload_len(header: bytes) -> int:
    """How many bytes follow. Raises `ValueError` for more than a frame may have."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length:,} bytes, the limit is {MAX_FRAME_BYTES:,}")
    return length
