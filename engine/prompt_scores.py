"""BlockScores: what the positions of one full block of a prompt gave as log-probabilities, kept beside the block by the prefix cache.

The entry at position p scores the token at p + 1, so a block's last entry belongs to a token of the next block.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.types import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScores:
    """P positions in a row, K top entries each."""

    targets: NDArray[np.int32]  # [P] the scored tokens
    chosen: NDArray[np.float32]  # [P] their log-probabilities
    top_ids: NDArray[np.int32]  # [P, K]
    top: NDArray[np.float32]  # [P, K]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, places: slice) -> "BlockScores":
        """A view of some positions."""
        return BlockScores(targets=self.targets[places], chosen=self.chosen[places], top_ids=self.top_ids[places], top=self.top[places])

    def entry(self, offset: int, num_top: int) -> TokenLogprob:
        """What the position at `offset` says of the token after it."""
        top = zip(self.top_ids[offset, :num_top].tolist(), self.top[offset, :num_top].tolist(), strict=True)
        return TokenLogprob(token_id=int(self.targets[offset]), logprob=float(self.chosen[offset]), top=tuple(top))


class ScoreCollector:
    """Puts the scores of one prompt, which arrive in runs of any length, together into full blocks."""

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._parts: list[BlockScores] = []  # of the block that is not full yet
        self._end = 0  # position after the last part

    def add(self, first: int, run: BlockScores) -> list[tuple[int, BlockScores]]:
        """Enter the scores of the positions from `first` on; returns (block index, scores) of each block that became full.

        A run that does not continue the last one (the prompt is computed again, or begins behind a prefix hit) counts from the next
        beginning of a block on.
        """
        if first != self._end:
            self._parts = []
        full: list[tuple[int, BlockScores]] = []
        while len(run):
            offset = first % self._block_size
            part = run[: self._block_size - offset]
            if self._parts or offset == 0:
                self._parts.append(part)
            first += len(part)
            run = run[len(part) :]
            if first % self._block_size == 0:
                if self._parts:
                    full.append((first // self._block_size - 1, _joined(self._parts)))
                self._parts = []
        self._end = first
        return full


def _joined(parts: list[BlockScores]) -> BlockScores:
    """One run of its own memory: a view would keep the whole step's result alive."""
    return BlockScores(
        targets=np.concatenate([part.targets for part in parts]),
        chosen=np.concatenate([part.chosen for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top=np.concatenate([part.top for part in parts]),
    )
