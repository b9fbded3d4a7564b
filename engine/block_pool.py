"""BlockPool: who holds which block of the KV cache, and which block is reused next.

Block 0 is the scratch block: what nobody will read is written there. The others are 1 to `num_blocks`. A block has any number of holders;
one without a holder is free, whether or not the prefix cache still keeps its content. The free list is the eviction order: first the
blocks whose content nobody wants, then the kept ones, longest unused first.

    front | no content worth keeping, given back earliest first | kept, unused for longest first | end

The scheduler takes, shares and gives back; the prefix cache keeps and drops. Nothing here knows tokens or sequences.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

SCRATCH_BLOCK = 0


class BlockPool:
    """The one owner of reference counts and of the free list. `num_free + num_held == num_blocks` always; misuse raises `RuntimeError`."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], object] | None = None  # told of a kept block that is about to be reused
        self._num_holders: dict[int, int] = {}  # of held blocks only
        self._kept: set[int] = set()  # held or free
        self._empty = deque(range(1, num_blocks + 1))  # front of the free list
        self._cached: OrderedDict[int, None] = OrderedDict()  # end of the free list

    @property
    def num_free(self) -> int:
        """Blocks without a holder, kept ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_held(self) -> int:
        return len(self._num_holders)

    @property
    def num_cached(self) -> int:
        """Blocks without a holder whose content is kept."""
        return len(self._cached)

    def is_held(self, block: int) -> bool:
        return block in self._num_holders

    def take(self, count: int) -> list[int]:
        """`count` blocks that nobody else holds, evicting kept content where needed. Ask `num_free` first: too few is misuse."""
        if count > self.num_free:
            raise RuntimeError(f"{count} blocks wanted, {self.num_free} free")
        blocks = [self._empty.popleft() if self._empty else self._evict() for _ in range(count)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each; a block must be held or kept."""
        for block in blocks:
            if block not in self._num_holders:
                if block not in self._cached:
                    raise RuntimeError(f"block {block} was shared but is neither held nor kept")
                del self._cached[block]
            self._num_holders[block] = self._num_holders.get(block, 0) + 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One holder less for each. Blocks come in the order of their sequence: the last is evicted first, as it is of no use alone."""
        for block in reversed(blocks):
            num_holders = self._num_holders.get(block, 0)
            if not num_holders:
                raise RuntimeError(f"block {block} was given back but is not held")
            if num_holders > 1:
                self._num_holders[block] = num_holders - 1
                continue
            del self._num_holders[block]
            if block in self._kept:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def keep(self, block: int) -> None:
        """The content of a held block is worth keeping when nobody holds it any more."""
        if block not in self._num_holders:
            raise RuntimeError(f"block {block} cannot be kept: it is not held")
        self._kept.add(block)

    def drop(self, block: int) -> None:
        """The content of a kept block is worth nothing any more."""
        if block not in self._kept:
            raise RuntimeError(f"block {block} cannot be dropped: it is not kept")
        self._kept.remove(block)
        if block in self._cached:
            del self._cached[block]
            self._empty.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._kept.remove(block)
        if self.on_evict:
            self.on_evict(block)
        return block
