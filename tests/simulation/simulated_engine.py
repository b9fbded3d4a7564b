"""SimulatedEngine: one engine process of the simulated world. Core, scheduler, pool, prefix cache, batcher and loop are the real ones.

The model is scripted, a turn takes virtual time, and what a turn has to say leaves when that time is over: a kill in between falls into
the middle of a step. Frames travel through `SlowChannel`, which is the loopback with delays. The checks of what must hold at any moment
are in `invariants.py`.
"""

import asyncio
from collections.abc import Callable
from random import Random

from invariants import EngineChecks
from scripted_runner import Launched, ScriptedRunner, info_of
from virtual_loop import VirtualLoop
from workload import Fates, Scenario

from engine.batch import Batch
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.engine_loop import SIGN_OF_LIFE_S, EngineLoop
from engine.messages import Abort, Begun, Configure, FromEngine, FromServer, Ready, Report, Submit, decode_from_server, encode
from engine.transport import LoopbackChannel
from engine.types import Progress

MAX_TURN = 2.0  # the longest turn, in average steps


class EngineKilled(Exception):
    """A request ended the engine that computed it."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id


class SlowChannel(LoopbackChannel):
    """A loopback whose frames arrive by themselves, in order, each after a delay."""

    loop: VirtualLoop
    delay: Callable[[], float]
    _last_arrival_s = 0.0

    def send(self, payload: bytes) -> None:
        super().send(payload)
        if (peer := self._peer) is not None:
            self._last_arrival_s = max(self._last_arrival_s, self.loop.now_s + self.delay())
            self.loop.call_at(self._last_arrival_s, peer.deliver, 1)


class KillableRunner(ScriptedRunner):
    """The scripted runner, and requests that end the process."""

    def __init__(self, config: EngineConfig, kills_at: dict[str, int]) -> None:
        super().__init__(config)
        self._kills_at = kills_at

    def launch(self, batch: Batch) -> Launched:
        if self._kills_at:
            for item in batch.items:
                request_id = item.sequence.request.request_id
                if item.start + item.num_tokens >= self._kills_at.get(request_id, 1 << 30):
                    raise EngineKilled(request_id)
        return super().launch(batch)


class SimulatedEngine:
    """Lives from its connection to `die`."""

    def __init__(
        self,
        scenario: Scenario,
        channel: SlowChannel,
        *,
        loop: VirtualLoop,
        rng: Random,
        fates: Fates,
        on_death: Callable[[str], None],
    ) -> None:
        self.is_dead = False
        self.is_hanging = False
        self.killed_by: str | None = None  # a request
        self.channel = channel
        self.checks: EngineChecks | None = None  # once it is ready
        self.num_steps = 0
        self._scenario = scenario
        self._loop = loop
        self._rng = rng
        self._fates = fates
        self._on_death = on_death
        self._inbox: list[FromServer] = []
        self._outbox: list[FromEngine] = []
        self._is_turning = False
        self._engine_loop: EngineLoop | None = None
        self._next_turn: asyncio.TimerHandle | None = None  # of an idle engine

    def frame_received(self, payload: bytes) -> None:
        message = decode_from_server(payload)
        if isinstance(message, Configure):
            self._loop.call_later(self._rng.random() * self._scenario.restart_s, self._report)
            return
        self._inbox.append(message)
        if self._engine_loop is not None and not self._is_turning:
            self._begin_turn()

    def channel_closed(self) -> None:
        self.is_dead = True

    def die(self) -> None:
        """The process is gone; what it has sent may still arrive, what it was about to send does not."""
        self.is_dead = True

    def hang(self) -> None:
        """The process lives and does nothing any more."""
        self.is_hanging = True

    def _report(self) -> None:
        if self.is_dead or self.is_hanging:
            return
        self.channel.send(encode(Report(Progress(phase="compile", done=1, total=2, unit="programs"))))
        self._loop.call_later(self._rng.random() * self._scenario.restart_s, self._become_ready)

    def _become_ready(self) -> None:
        if self.is_dead or self.is_hanging:
            return
        assert not self._inbox, "the server sends before the engine is ready"
        config = self._scenario.config
        self.runner = KillableRunner(config, self._fates.kills_at)
        self.core = EngineCore(config, self.runner, info_of(config), clock=self._loop.time)
        self._engine_loop = EngineLoop(self.core, send=self._say, clock=self._loop.time)
        patience_s = self._scenario.latency_s + MAX_TURN * self._scenario.step_s
        self.checks = EngineChecks(self.core, self.runner, gone_s=self._fates.gone_s, patience_s=patience_s)
        self.channel.send(encode(Ready(self.core.info)))
        self._begin_turn()

    def _begin_turn(self) -> None:
        """As `run_engine` does: take what arrived, step, and say it when the time of the step is over."""
        if self.is_dead or self.is_hanging:
            return
        assert self._engine_loop is not None
        assert self.checks is not None
        self._is_turning = True
        if self._next_turn is not None:
            self._next_turn.cancel()
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            self._engine_loop.take(message)
            match message:
                case Submit():
                    self.checks.submitted(message)
                    self._mark(message.request.request_id)
                case Abort():
                    self.checks.aborted(message)
        self.checks.before_turn()
        num_batches = len(self.runner.batches)
        try:
            self._engine_loop.turn()
        except EngineKilled as killed:
            self._on_death(killed.request_id)
            return
        self.checks.after_turn(self._outbox)
        is_idle = len(self.runner.batches) == num_batches
        self.num_steps += not is_idle
        self._loop.call_later(self._rng.random() * MAX_TURN * self._scenario.step_s * (0.1 if is_idle else 1.0), self._end_turn)

    def _say(self, message: FromEngine) -> None:
        """What a step begins with leaves before the step, the rest when its time is over."""
        if isinstance(message, Begun):
            self.channel.send(encode(message))
        else:
            self._outbox.append(message)

    def _mark(self, request_id: str) -> None:
        """No request of today needs the host between two tokens; the core is ready for those that will."""
        sequence = self.core._sequences.get(request_id)
        if sequence is not None and request_id in self._fates.needs_host:
            sequence.needs_host = True

    def _end_turn(self) -> None:
        if self.is_dead or self.is_hanging:
            return
        for message in self._outbox:
            self.channel.send(encode(message))
        self._outbox.clear()
        self._is_turning = False
        if self._inbox or self.core.has_work:
            self._begin_turn()
        else:
            self._next_turn = self._loop.call_later(SIGN_OF_LIFE_S, self._begin_turn)
