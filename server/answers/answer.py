"""Answer: what all endpoints that generate share once their request is planned. It runs the sequences, and counts what they used.

A subclass per endpoint makes wire objects of `GenerationChunk`s: the whole answer at the end, or events as pieces come. Streamed and whole
answers are built from the same functions, so that their shapes cannot drift apart. `server/streaming.py` writes the events.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import msgspec

from engine.output import GenerationChunk, TextStream
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, GenerationRequest
from server.errors import ApiError, error_body
from server.generation import Generations, Update
from server.plan import GenerationPlan
from server.schemas.common import PromptTokensDetails, Usage
from server.services import Services
from server.streaming import event

NO_PROBABILITY = -9999.0  # JSON has no infinity
INLINE_LOGPROBS = 500  # tokens with log-probabilities that are handled on the event loop: a thread would cost more
FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Answer(ABC):
    """One answer in the making: its identity, its sequences' texts, and how pieces become wire objects."""

    id_prefix: ClassVar[str]

    def __init__(self, plan: GenerationPlan, requests: Sequence[GenerationRequest], *, services: Services, request_id: str) -> None:
        self.plan = plan
        self.id = f"{self.id_prefix}{request_id}"
        self.created = int(time.time())
        self.model_name = services.model_name
        self.fingerprint = services.fingerprint
        self.requests = requests
        self._services = services
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
        return len(self.requests)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._services.tokenizer

    def run(self) -> Generations:
        """Its generations, to be entered."""
        return Generations(self._services.client, self.requests, texts=self._texts, metrics=self._services.metrics)

    @abstractmethod
    async def body(self) -> bytes:
        """Run everything to its end and give the whole answer as JSON."""

    def opening(self) -> list[bytes]:
        """Events before the first piece."""
        return []

    @abstractmethod
    def events(self, updates: Iterable[Update]) -> list[bytes]:
        """Events that say what is new."""

    def closing(self) -> list[bytes]:
        """Events after the last piece."""
        return [event(b"[DONE]")]

    def failure(self, error: ApiError) -> list[bytes]:
        """Events that end a stream which cannot be finished."""
        return [event(msgspec.json.encode(error_body(error)))]

    def chunks_of(self, updates: Iterable[Update]) -> dict[int, list[GenerationChunk]]:
        """What is new, by sequence."""
        chunks: dict[int, list[GenerationChunk]] = {}
        for update in updates:
            chunks.setdefault(update.sequence, []).append(update.chunk)
            self._num_cached[update.sequence] = update.chunk.num_cached_tokens
        return chunks

    def usage(self) -> Usage:
        """Tokens of all sequences, those of candidates that were not chosen included; each prompt once.

        What was cached of a prompt is what its first candidate found: the others find what that one has just computed.
        """
        first_of_prompt = range(0, len(self.requests), self.plan.num_candidates)
        prompt_tokens = sum(self._texts[sequence].num_prompt_tokens for sequence in first_of_prompt)
        completion_tokens = sum(text.num_completion_tokens for text in self._texts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached[sequence] for sequence in first_of_prompt)),
        )

    async def _collect(self) -> list[list[Update]]:
        updates: list[list[Update]] = [[] for _ in self.requests]
        num_open = len(self.requests)
        async with self.run() as generations:
            while num_open:
                for update in await generations.next_updates():
                    updates[update.sequence].append(update)
                    self._num_cached[update.sequence] = update.chunk.num_cached_tokens
                    num_open -= update.chunk.finish_reason is not None
        return updates


class AnswerOfChoices(Answer):
    """Its whole is one object with `choices`."""

    async def body(self) -> bytes:
        """Run everything to its end and give the whole answer as JSON, made in a thread where it is large."""
        updates = await self._collect()
        num_logprobs = sum(len(update.chunk.logprobs) + len(update.delta.prompt_logprobs) for of_one in updates for update in of_one)
        return await as_json(lambda: self.whole(updates), num_logprobs=num_logprobs)

    @abstractmethod
    def whole(self, updates: list[list[Update]]) -> msgspec.Struct:
        """The answer to everything that arrived, by sequence."""


async def as_json(make: Callable[[], msgspec.Struct], *, num_logprobs: int) -> bytes:
    """What `make` gives, as JSON; both in a thread where it is large.

    The encoder keeps the interpreter to itself while it runs, so a large answer is encoded choice by choice.
    """
    if num_logprobs <= INLINE_LOGPROBS:
        return msgspec.json.encode(make())

    def encode() -> bytes:
        whole: Any = make()
        choices = [msgspec.Raw(msgspec.json.encode(choice)) for choice in whole.choices]
        return msgspec.json.encode(msgspec.structs.replace(whole, choices=choices))

    return await asyncio.to_thread(encode)


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return logprob if logprob > NO_PROBABILITY else NO_PROBABILITY


def says_something(chunk: GenerationChunk) -> bool:
    """False for a chunk whose text is all held back, and that has nothing else."""
    return bool(chunk.text or chunk.logprobs or chunk.finish_reason is not None)
