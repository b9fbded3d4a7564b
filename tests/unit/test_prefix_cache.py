"""The prefix cache against a model that keys blocks by the whole text before their end."""

from collections.abc import Sequence as Seq

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.prefix_cache import PrefixCache
from engine.prompt_scores import BlockScores
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams

BLOCK_SIZE = 2


def sequence_of(tokens: Seq[int], *, salt: str = "", num_top: int | None = None, num_prompt: int | None = None) -> Sequence:
    prompt = tuple(tokens[:num_prompt])
    sampling = SamplingParams(max_tokens=50, prompt_logprobs=num_top)
    request = GenerationRequest(request_id="", prompt_token_ids=prompt, sampling=sampling, cache_salt=salt)
    return Sequence(request=request, arrival=0, token_ids=list(tokens))


def scores_of(targets: Seq[int]) -> BlockScores:
    count = len(targets)
    return BlockScores.of(
        targets=np.array(targets, np.int32),
        chosen=np.arange(count, dtype=np.float32),
        top_ids=np.zeros((count, 3), np.int32),
        top=np.zeros((count, 3), np.float32),
    )


def cache_of(*, num_blocks: int = 20, block_size: int = BLOCK_SIZE) -> tuple[PrefixCache, BlockPool]:
    pool = BlockPool(num_blocks)
    return PrefixCache(pool, block_size=block_size), pool


def compute(cache: PrefixCache, pool: BlockPool, sequence: Sequence) -> list[int]:
    """Admit it, compute all its tokens and give its blocks back; returns the blocks that were found."""
    hit = cache.lookup(sequence)
    pool.share(hit)
    blocks = hit + pool.take(-(-sequence.num_tokens // cache.block_size) - len(hit))
    sequence.block_ids.extend(blocks)
    sequence.num_computed_tokens = sequence.num_tokens
    cache.insert(sequence)
    pool.give_back(blocks)
    return hit


Text = tuple[str, tuple[int, ...]]  # salt, and all tokens up to the end of a block

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=8)


class CacheMachine(RuleBasedStateMachine):
    """Sequences over two tokens come, grow, are scored, fail and go, in a pool that forces evictions."""

    @initialize(num_blocks=st.integers(4, 12))
    def make_cache(self, num_blocks: int) -> None:
        self.cache, self.pool = cache_of(num_blocks=num_blocks)
        self.entries: dict[Text, int] = {}
        self.scores: dict[Text, list[int]] = {}
        self.content: dict[int, Text] = {}  # of blocks that were filled
        self.running: list[Sequence] = []

    @rule(tokens=TOKENS, salt=st.sampled_from(["", "x"]), num_top=st.sampled_from([None, 2]), num_scored=st.integers(0, 8), data=st.data())
    def admit(self, tokens: list[int], salt: str, num_top: int | None, num_scored: int, data: st.DataObject) -> None:
        sequence = sequence_of(tokens, salt=salt, num_top=num_top, num_prompt=data.draw(st.integers(1, len(tokens))))
        sequence.num_scored_tokens = min(num_scored, sequence.num_prompt_tokens - 1)

        hit = self.cache.lookup(sequence)

        assert hit == self.expected_hit(sequence)
        for index, block in enumerate(hit):
            assert self.content[block] == text_of(sequence, index), "a block with other content was found"
        num_missing = -(-sequence.num_tokens // BLOCK_SIZE) - len(hit)
        if num_missing > self.pool.num_free - sum(not self.pool.is_held(block) for block in hit):
            return
        self.pool.share(hit)
        self.check_scores(sequence, hit)
        sequence.block_ids.extend(hit)
        self.take(sequence, num_missing)
        sequence.num_computed_tokens = len(hit) * BLOCK_SIZE
        self.running.append(sequence)

    def expected_hit(self, sequence: Sequence) -> list[int]:
        hit: list[int] = []
        for index in range(sequence.num_tokens // BLOCK_SIZE):
            text = text_of(sequence, index)
            if text not in self.entries:
                break
            for position in unsent(sequence, index):
                if self.scores.get(text, [None] * BLOCK_SIZE)[position % BLOCK_SIZE] != sequence.token_ids[position + 1]:
                    return hit
            hit.append(self.entries[text])
        return hit

    def check_scores(self, sequence: Sequence, hit: list[int]) -> None:
        found = self.cache.scores(sequence, len(hit))
        first = sequence.num_scored_tokens // BLOCK_SIZE
        for index in range(len(hit)):
            for position in unsent(sequence, index):
                assert found[index - first].targets[position % BLOCK_SIZE] == sequence.token_ids[position + 1]

    def take(self, sequence: Sequence, count: int) -> None:
        blocks = self.pool.take(count)
        for block in blocks:
            text = self.content.pop(block, None)
            if text and self.entries.get(text) == block:
                del self.entries[text]
                self.scores.pop(text, None)
        sequence.block_ids.extend(blocks)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1), count=st.integers(1, 5))
    def advance(self, data: st.DataObject, token: int, count: int) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        start = sequence.num_computed_tokens
        if start == sequence.num_tokens:
            if start % BLOCK_SIZE == 0 and not self.pool.num_free:
                return
            self.take(sequence, start % BLOCK_SIZE == 0)
            sequence.token_ids.append(token)
        sequence.num_computed_tokens = min(sequence.num_tokens, start + count)

        self.cache.insert(sequence, start=start)

        for index in range(start // BLOCK_SIZE, sequence.num_computed_tokens // BLOCK_SIZE):
            block, text = sequence.block_ids[index], text_of(sequence, index)
            self.content[block] = text
            self.entries.setdefault(text, block)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def keep_scores(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        num_full = min(sequence.num_computed_tokens, sequence.num_tokens - 1) // BLOCK_SIZE
        for index in range(num_full):
            targets = sequence.token_ids[index * BLOCK_SIZE + 1 : (index + 1) * BLOCK_SIZE + 1]

            self.cache.keep_scores(sequence.block_keys[index], scores_of(targets))

            if text_of(sequence, index) in self.entries:
                self.scores[text_of(sequence, index)] = targets

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_sound=st.booleans())
    def end(self, data: st.DataObject, is_sound: bool) -> None:
        sequence = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.pool.give_back(sequence.block_ids)
        if not is_sound:
            self.cache.forget(sequence)
            for index in range(len(sequence.block_keys)):
                self.entries.pop(text_of(sequence, index), None)
                self.scores.pop(text_of(sequence, index), None)

    @invariant()
    def the_pool_keeps_what_the_model_keeps(self) -> None:
        held = {block for sequence in self.running for block in sequence.block_ids}
        assert self.pool.num_held == len(held)
        assert self.pool.num_cached == sum(block not in held for block in self.entries.values())


def text_of(sequence: Sequence, index: int) -> Text:
    return sequence.request.cache_salt, tuple(sequence.token_ids[: (index + 1) * BLOCK_SIZE])


def unsent(sequence: Sequence, index: int) -> range:
    if sequence.request.sampling.prompt_logprobs is None:
        return range(0)
    first, end = index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE
    return range(max(first, sequence.num_scored_tokens), min(end, sequence.num_prompt_tokens - 1))


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase


def test_a_prompt_that_was_computed_before_is_found_up_to_its_last_full_block() -> None:
    cache, pool = cache_of()

    assert compute(cache, pool, sequence_of([1, 2, 3, 4, 5])) == []
    assert len(compute(cache, pool, sequence_of([1, 2, 3, 4, 5]))) == 2
    assert len(compute(cache, pool, sequence_of([1, 2, 3, 9]))) == 1
    assert compute(cache, pool, sequence_of([9, 2, 3, 4])) == []


def test_the_same_tokens_behind_another_beginning_are_not_found() -> None:
    cache, pool = cache_of()
    compute(cache, pool, sequence_of([1, 2, 3, 4]))

    assert cache.lookup(sequence_of([3, 4, 3, 4])) == []
    assert len(cache.lookup(sequence_of([1, 2, 1, 2]))) == 1


def test_another_salt_finds_nothing() -> None:
    cache, pool = cache_of()
    compute(cache, pool, sequence_of([1, 2, 3, 4], salt="a"))

    assert cache.lookup(sequence_of([1, 2, 3, 4], salt="b")) == []
    assert cache.lookup(sequence_of([1, 2, 3, 4])) == []
    assert len(cache.lookup(sequence_of([1, 2, 3, 4], salt="a"))) == 2


def test_equal_keys_with_other_tokens_or_another_parent_are_no_hit() -> None:
    cache, pool = cache_of()
    known, stranger = sequence_of([1, 2, 3, 4]), sequence_of([1, 2, 3, 5])
    compute(cache, pool, known)

    stranger.block_keys.extend(known.block_keys)

    assert len(cache.lookup(stranger)) == 1
    orphan = sequence_of([9, 9, 3, 4])
    orphan.block_keys.extend(known.block_keys)
    assert cache.lookup(orphan) == []


def test_the_pending_token_is_not_part_of_a_key() -> None:
    cache, pool = cache_of()
    sequence = sequence_of([1, 2, 3])
    sequence.block_ids.extend(pool.take(2))
    sequence.num_pending_tokens, sequence.num_computed_tokens = 1, 4

    cache.insert(sequence)

    assert len(sequence.block_keys) == 1


def test_of_two_that_compute_the_same_the_first_one_is_found_and_the_other_keeps_a_copy_of_its_own() -> None:
    cache, pool = cache_of()
    twins = [sequence_of([1, 2, 3, 4]) for _ in range(2)]
    for twin in twins:
        twin.block_ids.extend(pool.take(2))
        twin.num_computed_tokens = 4
        cache.insert(twin)

    assert cache.lookup(sequence_of([1, 2, 3, 4])) == list(twins[0].block_ids)
    pool.give_back(twins[1].block_ids)
    assert pool.num_cached == 0


def test_an_evicted_block_is_not_found_but_the_chain_before_it_is() -> None:
    cache, pool = cache_of(num_blocks=4)
    compute(cache, pool, sequence_of([1, 2, 3, 4, 5, 6]))

    pool.take(2)

    assert len(cache.lookup(sequence_of([1, 2, 3, 4, 5, 6]))) == 2


def test_keys_are_computed_once_and_only_as_far_as_they_are_looked_up() -> None:
    cache, pool = cache_of()
    compute(cache, pool, sequence_of([1, 2, 3, 4]))
    sequence = sequence_of([1, 2, 9, 9, 9, 9])

    cache.lookup(sequence)
    keys = list(sequence.block_keys)
    cache.lookup(sequence)

    assert len(keys) == 2
    assert all(before is after for before, after in zip(keys, sequence.block_keys, strict=True))


def test_a_scored_prompt_finds_only_blocks_that_give_the_scores_of_its_own_next_tokens() -> None:
    cache, pool = cache_of()
    known = sequence_of([1, 2, 3, 4, 5, 6])
    compute(cache, pool, known)
    scored = sequence_of([1, 2, 3, 4, 5, 6], num_top=0)

    assert cache.lookup(scored) == []

    cache.keep_scores(known.block_keys[0], scores_of([2, 3]))
    cache.keep_scores(known.block_keys[1], scores_of([4, 7]))
    assert len(cache.lookup(scored)) == 1
    assert len(cache.lookup(sequence_of([1, 2, 3, 4, 7, 8], num_top=0))) == 2


def test_scores_that_were_sent_already_need_not_be_found() -> None:
    cache, pool = cache_of()
    known = sequence_of([1, 2, 3, 4, 5, 6])
    compute(cache, pool, known)
    third = scores_of([6, 9])
    cache.keep_scores(known.block_keys[2], third)
    scored = sequence_of([1, 2, 3, 4, 5, 6], num_top=0)
    scored.num_scored_tokens = 4

    hit = cache.lookup(scored)

    assert len(hit) == 3
    assert cache.scores(scored, len(hit)) == (third,)


def test_a_prompt_that_is_not_scored_gets_no_scores() -> None:
    cache, pool = cache_of()
    known = sequence_of([1, 2, 3])
    compute(cache, pool, known)
    cache.keep_scores(known.block_keys[0], scores_of([2, 3]))

    assert cache.scores(sequence_of([1, 2, 3]), len(cache.lookup(sequence_of([1, 2, 3])))) == ()


def test_what_a_failed_sequence_computed_is_forgotten_whoever_holds_it() -> None:
    cache, pool = cache_of(num_blocks=4)
    failed = sequence_of([1, 2, 3, 4])
    compute(cache, pool, failed)
    neighbour = cache.lookup(sequence_of([1, 2, 3, 4]))
    pool.share(neighbour)

    cache.forget(failed)
    pool.give_back(neighbour)

    assert cache.lookup(sequence_of([1, 2, 3, 4])) == []
    assert (pool.num_free, pool.num_cached) == (4, 0)


def test_scores_for_a_block_that_is_gone_are_dropped() -> None:
    cache, pool = cache_of(num_blocks=1)
    known = sequence_of([1, 2])
    compute(cache, pool, known)
    pool.give_back(pool.take(1))

    cache.keep_scores(known.block_keys[0], scores_of([2, 3]))

    assert cache.lookup(known) == []
