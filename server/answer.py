"""From `GenerationChunk`s to the objects of `POST /v1/completions`: choices, legacy log-probabilities, usage, the best of many.

Streamed and whole answers are built from the same functions, so that their shapes cannot drift apart.
"""

import asyncio
import math
import time
from collections.abc import Iterable, Sequence

import msgspec

from engine.output import GenerationChunk, TextLogprob, TextStream
from engine.types import FinishReason, GenerationRequest
from server.generation import Generations, Update
from server.preprocess import CompletionPlan
from server.schemas.common import PromptTokensDetails, Usage
from server.schemas.completions import Completion, CompletionChoice, Logprobs
from server.services import Services

NO_PROBABILITY = -9999.0  # JSON has no infinity
INLINE_LOGPROBS = 500  # tokens with log-probabilities that are handled on the event loop: a thread would cost more


class CompletionAnswer:
    """One answer in the making: its identity, its sequences' texts, and how pieces become wire objects."""

    def __init__(self, plan: CompletionPlan, requests: Sequence[GenerationRequest], *, services: Services, request_id: str) -> None:
        self.plan = plan
        self.id = f"cmpl-{request_id}"
        self._services = services
        self._requests = requests
        self._created = int(time.time())
        self._num_cached = [0] * len(requests)
        self._texts = [
            TextStream(
                request,
                services.tokenizer,
                stop=plan.stop,
                include_stop=plan.include_stop,
                echo=plan.echo,
                tokens_as_ids=plan.tokens_as_ids,
            )
            for request in requests
        ]

    @property
    def num_sequences(self) -> int:
        return len(self._requests)

    def run(self) -> Generations:
        """Its generations, to be entered."""
        return Generations(self._services.client, self._requests, texts=self._texts, metrics=self._services.metrics)

    def pieces(self, updates: Iterable[Update]) -> list[CompletionChoice]:
        """What is new, as at most one piece per choice. Pieces that would say nothing are left out."""
        chunks: dict[int, list[GenerationChunk]] = {}
        for update in updates:
            chunks.setdefault(update.sequence, []).append(update.chunk)
            self._num_cached[update.sequence] = update.chunk.num_cached_tokens
        return [self._choice(index, new) for index, new in chunks.items() if any(map(_says_something, new))]

    def chunk(self, choices: list[CompletionChoice], *, usage: Usage | None = None) -> Completion:
        """One object of a stream. Where usage was asked for, every chunk has the field, null in all but the last."""
        return self._completion(choices, usage if self.plan.include_usage else msgspec.UNSET)

    async def collect(self) -> Completion:
        """Run everything to its end and give the whole answer."""
        updates: list[list[Update]] = [[] for _ in self._requests]
        num_open = len(self._requests)
        async with self.run() as generations:
            while num_open:
                for update in await generations.next_updates():
                    updates[update.sequence].append(update)
                    num_open -= update.chunk.finish_reason is not None
        num_logprobs = sum(len(update.chunk.logprobs) for of_one in updates for update in of_one)
        return self._whole(updates) if num_logprobs <= INLINE_LOGPROBS else await asyncio.to_thread(self._whole, updates)

    def _whole(self, updates: list[list[Update]]) -> Completion:
        """The answer to everything that arrived, by sequence."""
        choices: list[CompletionChoice] = []
        for prompt in range(len(self.plan.prompts)):
            first = prompt * self.plan.num_candidates
            candidates = updates[first : first + self.plan.num_candidates]
            self._num_cached[first] = candidates[0][-1].chunk.num_cached_tokens
            choices += [
                self._choice(prompt * self.plan.num_choices + rank, [update.chunk for update in best])
                for rank, best in enumerate(self._best(candidates))
            ]
        return self._completion(choices, self.usage())

    def usage(self) -> Usage:
        """Tokens of all sequences, those of candidates that were not chosen included; each prompt once.

        What was cached of a prompt is what its first candidate found: the others find what that one has just computed.
        """
        first_of_prompt = range(0, len(self._requests), self.plan.num_candidates)
        prompt_tokens = sum(self._texts[sequence].num_prompt_tokens for sequence in first_of_prompt)
        completion_tokens = sum(text.num_completion_tokens for text in self._texts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached[sequence] for sequence in first_of_prompt)),
        )

    def _best(self, candidates: list[list[Update]]) -> list[list[Update]]:
        """The candidates to answer with: all, or with `best_of` those of highest mean log-probability, best first."""
        if self.plan.num_candidates == self.plan.num_choices:
            return candidates
        return sorted(candidates, key=_mean_logprob, reverse=True)[: self.plan.num_choices]

    def _choice(self, index: int, chunks: list[GenerationChunk]) -> CompletionChoice:
        last = chunks[-1]
        entries = [entry for chunk in chunks for entry in chunk.logprobs] if self.plan.logprobs is not None else None
        return CompletionChoice(
            index=index,
            text="".join([chunk.text for chunk in chunks]),
            logprobs=None if entries is None else _legacy_logprobs(entries),
            finish_reason=None if last.finish_reason is None else _FINISH_REASONS[last.finish_reason],
            stop_reason=last.stop_reason,
        )

    def _completion(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._services.model_name,
            system_fingerprint=self._services.fingerprint,
            choices=choices,
            usage=usage,
        )


_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def _says_something(chunk: GenerationChunk) -> bool:
    return bool(chunk.text or chunk.logprobs or chunk.finish_reason is not None)


def _legacy_logprobs(entries: Iterable[TextLogprob]) -> Logprobs:
    """Four parallel lists; each `top_logprobs` holds the reported token too, even where it is not among the top."""
    answer = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in entries:
        answer.tokens.append(entry.token)
        answer.text_offset.append(entry.text_offset)
        if entry.logprob is None:
            answer.token_logprobs.append(None)
            answer.top_logprobs.append(None)
            continue
        top = {name: _finite(logprob) for name, logprob in entry.top}
        answer.token_logprobs.append(_finite(entry.logprob))
        top.setdefault(entry.token, _finite(entry.logprob))
        answer.top_logprobs.append(top)
    return answer


def _finite(logprob: float) -> float:
    return logprob if logprob > NO_PROBABILITY else NO_PROBABILITY


def _mean_logprob(updates: list[Update]) -> float:
    """Mean over the tokens that count as generated; a candidate without any is the worst."""
    logprobs = [entry.logprob for update in updates for entry in update.delta.logprobs[: len(update.chunk.token_ids)]]
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf
