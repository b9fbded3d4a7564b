"""The sequences of one client request, running side by side: submitted together, read as they come, all closed on the way out.

One small task per sequence pulls deltas from the engine client and turns them into text; whoever writes the answer takes everything that
has arrived since it last looked. So a slow client gets fewer and larger pieces, and nothing waits for it but its own memory, which is
bounded by the length of its own generations. Used by `server/routes/completions.py` for whole answers and by `server/streaming.py`.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType
from typing import NamedTuple, Self

from engine.client import EngineClient
from engine.output import GenerationChunk, TextStream
from engine.types import FinishReason, GenerationRequest, TokenDelta
from server.errors import DeadlineExceeded, GrammarLimit, InternalError
from server.observability import Metrics, SequenceMeter


class Update(NamedTuple):
    """What one delta added to sequence number `sequence` (prompt-major) of the request."""

    sequence: int
    delta: TokenDelta
    chunk: GenerationChunk


class Generations:
    """An async context manager; leaving it, by whatever door, ends what still runs in the engine.

    `next_updates` raises what a sequence failed with: `EngineDiedError`, `RequestError`, `DeadlineExceeded`, `InternalError`. One failed
    sequence fails the whole request.
    """

    def __init__(
        self, client: EngineClient, requests: Sequence[GenerationRequest], *, texts: Sequence[TextStream], metrics: Metrics
    ) -> None:
        self._client = client
        self._requests = requests
        self._texts = texts
        self._metrics = metrics
        self._arrived: list[Update] = []
        self._failure: Exception | None = None
        self._has_news = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._tasks = [self._group.create_task(self._read(sequence)) for sequence in range(len(self._requests))]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(None, None, None)

    async def next_updates(self, *, patience_s: float | None = None) -> list[Update]:
        """Everything that arrived since the last call, in order of arrival; at least one update, or none when `patience_s` passes first."""
        if not self._has_news.is_set():
            try:
                async with asyncio.timeout(patience_s):
                    await self._has_news.wait()
            except TimeoutError:
                return []
        self._has_news.clear()
        if self._failure is not None:
            raise self._failure
        arrived, self._arrived = self._arrived, []
        return arrived

    async def _read(self, sequence: int) -> None:
        """Pull one sequence to its end; never raises, so that one failure reaches the writer and not the task group."""
        meter = SequenceMeter(self._metrics, self._requests[sequence])
        reason: str = "abort"
        try:
            async with aclosing(self._client.generate(self._requests[sequence])) as deltas:
                async for delta in deltas:
                    meter.saw(delta)
                    if delta.finish_reason is not None and delta.finish_reason in _FAILURES:
                        reason = delta.finish_reason
                        raise _failure_of(reason, self._requests[sequence])
                    chunk = self._texts[sequence].push(delta)
                    self._arrived.append(Update(sequence, delta, chunk))
                    self._has_news.set()
                    if chunk.finish_reason is not None:
                        reason = chunk.finish_reason
                        return
            raise InternalError("the generation ended without a reason")
        except Exception as error:
            self._failure = self._failure or error
            self._has_news.set()
            reason = FinishReason.ERROR if reason == "abort" else reason
        finally:
            meter.ended(reason)


_FAILURES = frozenset({FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.GRAMMAR})


def _failure_of(reason: str, request: GenerationRequest) -> Exception:
    if reason == FinishReason.DEADLINE:
        return DeadlineExceeded("the request's timeout passed before it was finished; raise timeout or ask for less", param="timeout")
    if reason == FinishReason.GRAMMAR:
        took_too_much = "following the grammar or schema took more than this server spends on one token; simplify it"
        sampling = request.sampling
        narrows = sampling.allowed_token_ids or sampling.bad_words or sampling.min_tokens
        other_cause = "no token was left that the grammar or schema and allowed_token_ids, bad_words and min_tokens allow, or "
        return GrammarLimit(other_cause + took_too_much if narrows else took_too_much)
    return InternalError(f"the generation {request.request_id} failed alone; other requests are not affected")
