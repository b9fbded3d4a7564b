"""BlockScores: what positions of a prompt gave as log-probabilities; those of a full block are kept beside it by the prefix cache.

The entry at position p scores the token at p + 1, so a block's last entry belongs to a token of the next block.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class BlockScores:
    """Positions in a row, with K top entries each, as one array: thousands of blocks keep theirs, and each array costs memory."""

    _rows: NDArray[np.int32]  # [positions, 2 + 2 K]: target, its log-probability, top ids, their log-probabilities; floats as their bits

    @classmethod
    def of(
        cls, *, targets: NDArray[np.int32], chosen: NDArray[np.float32], top_ids: NDArray[np.int32], top: NDArray[np.float32]
    ) -> "BlockScores":
        """`targets` [positions] are the scored tokens, `chosen` [positions] their log-probabilities, `top_ids` and `top` [positions, K]."""
        return cls(np.concatenate([targets[:, None], chosen.view(np.int32)[:, None], top_ids, top.view(np.int32)], axis=1))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: slice) -> "BlockScores":
        """A view of some positions."""
        return BlockScores(self._rows[places])

    @property
    def targets(self) -> NDArray[np.int32]:
        """The scored tokens."""
        return self._rows[:, 0]

    def entry(self, place: int, num_top: int) -> TokenLogprob:
        """What the position at `place` says of the token after it."""
        row = self._rows[place]
        values = row.view(np.float32)
        first_top = 2 + (len(row) - 2) // 2
        top = zip(row[2 : 2 + num_top].tolist(), values[first_top : first_top + num_top].tolist(), strict=True)
        return TokenLogprob(token_id=int(row[0]), logprob=float(values[1]), top=tuple(top))

    def then(self, other: "BlockScores") -> "BlockScores":
        """These positions and those that follow them."""
        return BlockScores(np.concatenate([self._rows, other._rows]))

    def copy(self) -> "BlockScores":
        """The same in memory of its own; a view would keep all of the run alive that it is cut from."""
        return BlockScores(self._rows.copy())


class ScoreCollector:
    """Puts the scores of one prompt, which arrive in runs of any length, together into full blocks."""

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._begun: BlockScores | None = None  # of the block that is not full yet, from its beginning on
        self._end = 0  # position after the last run

    def add(self, first: int, run: BlockScores) -> list[tuple[int, BlockScores]]:
        """Enter the scores of the positions from `first` on; returns (block index, scores) of each block that became full.

        A run that does not continue the last one (the prompt is computed again, or begins behind a prefix hit) counts from the next
        beginning of a block on.
        """
        begun = self._begun if first == self._end else None
        full: list[tuple[int, BlockScores]] = []
        while len(run):
            offset = first % self._block_size
            part, run = run[: self._block_size - offset], run[self._block_size - offset :]
            if offset == 0:
                begun = part.copy()
            elif begun is not None:
                begun = begun.then(part)
            first += len(part)
            if first % self._block_size == 0:
                if begun is not None:
                    full.append((first // self._block_size - 1, begun))
                begun = None
        self._begun, self._end = begun, first
        return full
