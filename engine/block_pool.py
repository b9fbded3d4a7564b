"""BlockPool: who may write which block of the KV cache.

Block 0 is the scratch block: padded rows write there and nobody reads it. The others are 1 to `num_blocks`. The free list is a queue, so a
block that was given back stays untouched as long as possible.
"""

from collections import deque
from collections.abc import Iterable

SCRATCH_BLOCK = 0


class BlockPool:
    """The one owner of the free list. `num_free + num_held == num_blocks` always."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free = deque(range(1, num_blocks + 1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def take(self, count: int) -> list[int]:
        """`count` blocks that nobody else holds. Ask `num_free` first: too few is a bug of the caller and raises `RuntimeError`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.popleft() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def give_back(self, blocks: Iterable[int]) -> None:
        """Return held blocks. A block that is not held is a bug of the caller and raises `RuntimeError`."""
        for block in blocks:
            if block not in self._held:
                raise RuntimeError(f"block {block} was given back but is not held")
            self._held.remove(block)
            self._free.append(block)
