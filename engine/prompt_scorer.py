"""PromptScorer: from a step's result to the log-probabilities of prompt tokens that are news, and to what the prefix cache keeps of them.

Used by `EngineCore` when it enters a step's results.
"""

from typing import Any

import numpy as np

from engine.prefix_cache import PrefixCache
from engine.prompt_scores import BlockScores
from engine.scheduler import ScheduledTokens
from engine.types import TokenLogprob


class PromptScorer:
    """Without state of its own: what is sent already is the sequence's, what is kept is the cache's."""

    def __init__(self, cache: PrefixCache, *, block_size: int):
        self._cache = cache
        self._block_size = block_size

    def news(self, item: ScheduledTokens, scores: Any, offset: int) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of prompt tokens that are known now and not sent yet; `offset` is the item's first row in `scores`.

        The token at position p gives the score of the prompt token at p + 1. Positions before the item are those of a prefix hit. What is
        computed here is kept for later hits. `scores` is None where all was sent before and is only computed again. Empty for a prompt
        that nobody wants scored.
        """
        sequence = item.sequence
        num_top = sequence.request.sampling.prompt_logprobs
        if num_top is None:
            return ()
        last = min(item.start + item.num_tokens, sequence.num_prompt_tokens - 1)
        news: list[TokenLogprob] = []
        first_block = sequence.num_scored_tokens // self._block_size
        for position in range(sequence.num_scored_tokens, min(item.start, last)):
            block, place = divmod(position, self._block_size)
            news.append(sequence.cached_scores[block - first_block].entry(place, num_top))
        if item.start < last and scores is not None:
            rows = slice(offset, offset + last - item.start)
            targets = np.array(sequence.token_ids[item.start + 1 : last + 1], np.int32)
            run = BlockScores.of(targets=targets, chosen=scores.chosen[rows], top_ids=scores.top_ids[rows], top=scores.top[rows])
            news += [run.entry(place, num_top) for place in range(max(sequence.num_scored_tokens - item.start, 0), len(run))]
            self._keep(item, run)
        sequence.num_scored_tokens = max(sequence.num_scored_tokens, last)
        return tuple(news)

    def _keep(self, item: ScheduledTokens, run: BlockScores) -> None:
        sequence = item.sequence
        assert sequence.score_collector is not None, "a scored prompt has a collector"
        for block, scores in sequence.score_collector.add(item.start, run):
            self._cache.keep_scores(sequence.block_keys[block], scores)
