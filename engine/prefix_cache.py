"""PrefixCache: finds the leading blocks of a sequence that some other sequence has computed already.

A full block is found by its key, a chained hash over everything that its keys and values depend on:

    root = sha256(length of the salt, salt)        key of block i = sha256(key of block i - 1, the block's tokens as int32)

So equal keys mean equal tokens from the first one on, under one salt; tokens and parent are compared all the same. A block that is being
computed for the first time is never found half full, and one that is found is never written again, so there is nothing to copy.

The scheduler looks up on admission and inserts what it schedules; the core adds the log-probabilities that a scored prompt's blocks gave.
Which entry goes when blocks run short is the pool's order: see `engine/block_pool.py`.
"""

from array import array
from dataclasses import dataclass
from hashlib import sha256

from engine.block_pool import BlockPool
from engine.prompt_scores import BlockScores
from engine.sequence import Sequence


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    block: int
    parent: bytes  # key of the block before
    tokens: list[int]
    scores: BlockScores | None = None


class PrefixCache:
    """Entries by key, one block each. The pool tells it which block is reused."""

    def __init__(self, pool: BlockPool, *, block_size: int):
        self.block_size = block_size
        self.num_lookup_tokens = 0  # prompt tokens of the sequences that were let in
        self.num_hit_tokens = 0  # of these, found
        self._pool = pool
        self._entries: dict[bytes, _Entry] = {}
        self._keys: dict[int, bytes] = {}  # by block
        pool.on_evict = self._remove

    def __contains__(self, key: bytes) -> bool:
        """Whether a block with this one of the `block_keys` is known."""
        return key in self._entries

    def lookup(self, sequence: Sequence) -> list[int]:
        """Blocks of the sequence's leading full blocks, as far as they are known. Nobody may take a block before these are shared.

        For a sequence whose prompt is scored, a block counts only if it can give the scores that are still to be sent.
        """
        blocks: list[int] = []
        parent = _root(sequence.request.cache_salt)
        for index in range(len(sequence.token_ids) // self.block_size):
            key = self._key(sequence, index)
            entry = self._entries.get(key)
            tokens = self._tokens(sequence, index)
            if entry is None or entry.tokens != tokens or entry.parent != parent or not self._can_score(entry, sequence, index):
                break
            blocks.append(entry.block)
            parent = key
        return blocks

    def scores(self, sequence: Sequence, num_blocks: int) -> tuple[BlockScores, ...]:
        """Of the `num_blocks` leading blocks just found, those with scores to send, from the one of the first such position on."""
        indices = range(sequence.num_scored_tokens // self.block_size, num_blocks)
        entries = (self._entries[sequence.block_keys[index]] for index in indices if self._unsent(sequence, index))
        return tuple(entry.scores for entry in entries if entry.scores is not None)

    def count(self, sequence: Sequence) -> None:
        """Enter a sequence that was just let in for the first time into the totals."""
        self.num_lookup_tokens += sequence.num_prompt_tokens
        self.num_hit_tokens += sequence.num_cached_tokens

    def insert(self, sequence: Sequence, *, start: int = 0) -> None:
        """Register the full blocks whose tokens are known and computed, from the one with the token at `start` on.

        A block whose key is known already stays a private copy.
        """
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
        for index in range(start // self.block_size, num_full):
            key = self._key(sequence, index)
            if key not in self._entries:
                block = sequence.block_ids[index]
                self._pool.keep(block)
                parent = sequence.block_keys[index - 1] if index else _root(sequence.request.cache_salt)
                self._entries[key] = _Entry(block=block, parent=parent, tokens=self._tokens(sequence, index))
                self._keys[block] = key

    def keep_scores(self, key: bytes, scores: BlockScores) -> None:
        """Keep what a block's positions gave, beside the block; nothing happens if it is gone."""
        if entry := self._entries.get(key):
            entry.scores = scores

    def forget(self, sequence: Sequence) -> None:
        """Drop the entries of all its blocks: their numbers are not to be trusted."""
        for key in sequence.block_keys:
            if entry := self._entries.get(key):
                self._remove(entry.block)
                self._pool.drop(entry.block)

    def _remove(self, block: int) -> None:
        del self._entries[self._keys.pop(block)]

    def _tokens(self, sequence: Sequence, index: int) -> list[int]:
        return sequence.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Computed once per block of a sequence; blocks are asked for in order."""
        keys = sequence.block_keys
        if index == len(keys):
            parent = keys[-1] if keys else _root(sequence.request.cache_salt)
            keys.append(_child(parent, self._tokens(sequence, index)))
        return keys[index]

    def _unsent(self, sequence: Sequence, index: int) -> range:
        """Positions of a block whose scores are still to be sent."""
        if sequence.request.sampling.prompt_logprobs is None:
            return range(0)
        first = index * self.block_size
        return range(max(first, sequence.num_scored_tokens), min(first + self.block_size, sequence.num_prompt_tokens - 1))

    def _can_score(self, entry: _Entry, sequence: Sequence, index: int) -> bool:
        unsent = self._unsent(sequence, index)
        if not unsent or entry.scores is None:
            return not unsent
        first = index * self.block_size
        targets = entry.scores.targets[unsent.start - first : unsent.stop - first]
        return targets.tolist() == sequence.token_ids[unsent.start + 1 : unsent.stop + 1]


def block_keys(token_ids: list[int], *, cache_salt: str, block_size: int) -> list[bytes]:
    """The keys of all full blocks of these tokens."""
    keys = [_root(cache_salt)]
    for end in range(block_size, len(token_ids) + 1, block_size):
        keys.append(_child(keys[-1], token_ids[end - block_size : end]))
    return keys[1:]


def _child(parent: bytes, token_ids: list[int]) -> bytes:
    return sha256(parent + array("i", token_ids).tobytes()).digest()


def _root(salt: str) -> bytes:
    """What stands for the block before the first one."""
    data = salt.encode()
    return sha256(len(data).to_bytes(8, "little") + data).digest()
