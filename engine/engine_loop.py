"""EngineLoop: what one turn of the engine process does with the messages that are there: take them, step, tell the news.

Neither waits nor knows threads, processes or jax; `engine/__main__.py` drives it, as tests and simulations do.
"""

import time
from collections.abc import Callable
from typing import Protocol

from engine.errors import RequestError, TransportError
from engine.messages import Abort, Begun, Configure, Deltas, Follow, FromEngine, FromServer, Prepare, Queued, Refused, Submit
from engine.types import EngineInfo, EngineStats, GenerationRequest, TokenDelta

SIGN_OF_LIFE_S = 0.5  # at most this long, and a step, without a message


class Core(Protocol):
    """What the loop drives; `engine/core.py` has the real one."""

    info: EngineInfo
    on_begin: Callable[[list[str]], object] | None

    def submit(self, request: GenerationRequest, *, output_token_ids: tuple[int, ...] = (), num_scored_tokens: int = 0) -> bool:
        """True if it only waits, until `on_begin` is told of it. Raises `RequestError` for a request that can never run."""
        ...

    def abort(self, request_id: str) -> None: ...

    @property
    def has_work(self) -> bool: ...

    def step(self) -> list[TokenDelta]: ...

    def stats(self) -> EngineStats: ...


class EngineLoop:
    """Messages in, steps, messages out."""

    def __init__(self, core: Core, *, send: Callable[[FromEngine], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._send = send
        self._clock = clock
        self._last_stats: EngineStats | None = None
        self._last_sent_s = clock()
        self._new: list[str] = []  # submitted, only waiting, and not told so yet
        self._queued: set[str] = set()  # told
        core.on_begin = self._begin

    def take(self, message: FromServer) -> None:
        """Let one message change what the next turn does."""
        match message:
            case Submit(request=request, output_token_ids=output, num_scored_tokens=num_scored):
                try:
                    if self._core.submit(request, output_token_ids=output, num_scored_tokens=num_scored):
                        self._new.append(request.request_id)
                except RequestError as error:
                    self._send(Refused(request.request_id, str(error)))
            case Abort(request_id=request_id):
                self._core.abort(request_id)
                self._forget([request_id])
            case Configure() | Prepare() | Follow():
                raise TransportError("the server configured an engine that is already running")

    def turn(self) -> None:
        """One step where there is work; then the news, if there is any."""
        deltas = self._core.step() if self._core.has_work else []
        stats = self._core.stats()
        if deltas or self._is_worth_telling(stats):
            self._send(Deltas(deltas, stats))
            self._last_stats, self._last_sent_s = stats, self._clock()
        if self._new or self._queued:
            self._forget([delta.request_id for delta in deltas if delta.finish_reason is not None])
        if self._new:
            self._send(Queued(self._new))
            self._queued.update(self._new)
            self._new = []

    def _begin(self, request_ids: list[str]) -> None:
        """Whoever was told that these only wait is told before they are computed that they do not any more."""
        begun = [request_id for request_id in request_ids if request_id in self._queued]
        if begun:
            self._send(Begun(begun))
        self._forget(request_ids)

    def _forget(self, request_ids: list[str]) -> None:
        self._queued.difference_update(request_ids)
        self._new = [request_id for request_id in self._new if request_id not in request_ids]

    def _is_worth_telling(self, stats: EngineStats) -> bool:
        """Without deltas: the last gauges before a pause, and a sign of life."""
        is_last_before_pause = stats != self._last_stats and not self._core.has_work
        return is_last_before_pause or self._clock() - self._last_sent_s >= SIGN_OF_LIFE_S
