"""The heap of the engine process: how it stays as small as what is in it. `engine/__main__.py` calls, at its start and before it serves.

XLA takes the temporary arrays of a program, several MB each, from the C library, on whichever of its threads the program runs. glibc gives
each thread an arena, and keeps in it the more the larger the arrays were that it saw freed, up to 64 MB. So in time every arena keeps the
largest that ever passed through it. Where there is no glibc nothing is done.
"""

import ctypes
import gc
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_NUM_ARENAS = 2
_LARGE_BYTES = 4 << 20  # a decode step of a small model takes less, and so pays no page faults; to a step that takes more they are nothing
_KEPT_BYTES = 2 * _LARGE_BYTES  # at the end of an arena


def share_arenas() -> None:
    """Let all threads that start from here on take their memory from the same few arenas."""
    _set_option(_M_ARENA_MAX, _NUM_ARENAS)


def settle_heap() -> None:
    """Give back what only the start needed and, from here on, every large array as soon as it is freed.

    What is left is taken out of the garbage collector's sight: a pass over it would stall a step.
    """
    gc.collect()
    gc.freeze()
    _set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    _set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _set_option(option: int, value: int) -> None:
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(option, value)
