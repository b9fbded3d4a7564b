"""World: one seed's run of client, journal, quarantine, transport and engine processes, from the first start to the last answer.

The real client stands in the middle. In front of it clients come, read, lose patience and leave; behind it engine processes start, compute,
hang and die, and a supervisor starts the next. All that happens is a timer of one `VirtualLoop`; after each, `invariants.py` has its say.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from random import Random

from invariants import EngineChecks
from listener import Listener
from simulated_engine import SimulatedEngine, SlowChannel
from virtual_loop import VirtualLoop
from workload import Fates, Plan, Scenario, Workload, scenario_of

from engine.client import RemoteEngineClient
from engine.config import EngineOptions
from engine.quarantine import MAX_DEATHS
from engine.types import GenerationRequest, SamplingParams

MIN_REQUESTS = 30
MIN_STEPS = 300
MAX_EVENTS = 15_000  # a world that lives longer hangs
MAX_CAUSED = 10  # deaths until it is convicted: two among all, then by halves, then alone
STALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What happened in one world."""

    seed: int
    num_requests: int
    num_steps: int
    num_events: int
    num_aborts: int
    num_preemptions: int
    num_hit_tokens: int
    num_kills: int
    num_quarantines: int
    num_convictions: int
    ended_s: float  # virtual; equal only for equal histories


class World:
    """`run` lives through everything and returns what happened; any broken invariant raises on the way."""

    def __init__(self, seed: int, *, log: list[str] | None = None) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.loop = VirtualLoop()
        self.scenario: Scenario = scenario_of(self.rng)
        self.is_stopping = False
        self.engine_gone_s = 0.0
        self._log = log
        self._workload = Workload(self.scenario, self.rng)
        self._engine: SimulatedEngine | None = None
        self._engines: list[SimulatedEngine] = []
        self._open: dict[str, Listener] = {}
        self._fates = Fates()
        self._tasks: list[asyncio.Task[None]] = []
        self._has_arrived = False  # everyone who will
        self._num_requests = self._num_aborts = self._num_kills = self._num_quarantines = self._num_convictions = self._num_events = 0

    def run(self) -> Outcome:
        with self.loop.running():
            self.client = RemoteEngineClient(clock=self.loop.time)
            self._tasks.append(self.loop.create_task(self._supervise()))
            try:
                self._run_until(lambda: self.client.is_ready)
                self._arrive()
                self._plan_kill()
                self._run_until(lambda: self._has_arrived and not self._open)
                if not self.is_stopping:
                    self._check_afterwards()
            finally:
                self._end()
        return self._outcome()

    def note(self, line: str) -> None:
        if self._log is not None:
            self._log.append(f"{self.loop.now_s:9.4f} {line}")

    def ended(self, listener: Listener) -> None:
        del self._open[listener.plan.request.request_id]
        self._fates.gone_s[listener.plan.request.request_id] = self.loop.now_s
        self._num_aborts += listener.outcome == "aborted"
        self._num_convictions += listener.outcome == "died" and not self.is_stopping
        self.note(f"{listener.plan.request.request_id} {listener.outcome} after {listener.checks.num_tokens} tokens")

    def _run_until(self, is_reached: Callable[[], bool]) -> None:
        while not is_reached():
            self.loop.advance()
            self._num_events += 1
            assert self._num_events < MAX_EVENTS, f"still open after {MAX_EVENTS} events: {list(self._open)}"
            assert self.client.num_open <= len(self._open), "the journal keeps what has ended"

    def _end(self) -> None:
        """Let nothing of this world run later, be it that it failed."""
        self.loop.drop()
        self._log = None
        for task in self._tasks:
            task.cancel()
        with suppress(Exception):
            self.loop.advance()

    def _check_afterwards(self) -> None:
        """After all that, a question is answered as ever, and nobody holds anything."""
        self._fates.kills_at.clear()
        self._has_arrived = True
        self._start(Plan(request=self._workload.canary()))
        self._run_until(lambda: not self._open)
        self._run_until(lambda: self.client.is_ready and self._engine is not None and not self._engine.core.has_work)
        assert self.client.num_open == 0
        assert self._engine is not None
        assert isinstance(self._engine.checks, EngineChecks)
        self._engine.checks.check_idle()

    def _arrive(self) -> None:
        if len(self._open) < self.scenario.max_open:
            for plan in self._workload.next_plans(self.loop.now_s):
                self._start(plan)
        num_steps = sum(engine.num_steps for engine in self._engines)
        if self._num_requests >= MIN_REQUESTS and num_steps >= MIN_STEPS:
            self._has_arrived = True
            if self.scenario.is_stopped_early:
                self._stop()
        else:
            self.loop.call_later(self.rng.expovariate(1 / self.scenario.arrival_gap_s), self._arrive)

    def _start(self, plan: Plan) -> None:
        request = plan.request
        self._num_requests += 1
        if plan.kills_at is not None:
            self._fates.kills_at[request.request_id] = plan.kills_at
        if plan.needs_host:
            self._fates.needs_host.add(request.request_id)
        listener = self._open[request.request_id] = Listener(plan, self)
        task = self.loop.create_task(listener.listen())
        self._tasks.append(task)
        if plan.abort_after_s is not None:
            self.loop.call_later(plan.abort_after_s, task.cancel)
        self.note(f"{request.request_id} arrives: {', '.join([*_settings(request.sampling), *_settings(request), *_settings(plan)])}")

    def _stop(self) -> None:
        """The server ends in the middle of its work."""
        self.is_stopping = True
        self.client.fail_open("the server stops")
        self.client.disconnect()

    async def _supervise(self) -> None:
        """Start one engine after the other, as `server/supervisor.py` does."""
        while not self.is_stopping:
            ours, theirs = SlowChannel.pair()
            for end in (ours, theirs):
                end.loop, end.delay = self.loop, self._delay
            engine = SimulatedEngine(
                self.scenario,
                theirs,
                loop=self.loop,
                rng=self.rng,
                fates=self._fates,
                on_death=self._kill_by,
            )
            ours.handler, theirs.handler = self.client, engine
            self._engine = engine
            self._engines.append(engine)
            self.client.connect(ours, OPTIONS)
            await self.client.wait_disconnected()
            self.note("engine is gone")
            await asyncio.sleep(self.rng.random() * self.scenario.restart_s)

    def _delay(self) -> float:
        return self.rng.random() * self.scenario.latency_s

    def _plan_kill(self) -> None:
        if self.scenario.kill_gap_s is not None:
            self.loop.call_later(self.rng.expovariate(1 / self.scenario.kill_gap_s), self._kill_at_random)

    def _kill_at_random(self) -> None:
        """The engine ends for a reason that is nobody's fault, unless that could get an innocent convicted."""
        if self._engine is not None and not self._engine.is_dead and not any(each.may_be_suspect for each in self._open.values()):
            if self.rng.random() < 0.2:
                self._engine.hang()
                self.loop.call_later(STALL_TIMEOUT_S, self._kill_engine, self._engine, "hangs")
            else:
                self._kill_engine(self._engine, "is killed")
        self._plan_kill()

    def _kill_by(self, request_id: str) -> None:
        assert self._engine is not None
        self._engine.killed_by = request_id
        self._kill_engine(self._engine, f"is killed by {request_id}")

    def _kill_engine(self, engine: SimulatedEngine, cause: str) -> None:
        if engine.is_dead:
            return
        self.note(f"engine {cause}")
        engine.die()
        self._num_kills += 1
        self.loop.call_later(self.rng.choice((0.0, self._delay())), self._close, engine)

    def _close(self, engine: SimulatedEngine) -> None:
        """The server sees the end of a dead engine, after all that it had sent: that lies in the kernel."""
        ours = engine.channel._peer
        if ours is None:
            return
        ours.deliver()
        self.loop.call_soon(self._close_now, engine)

    def _close_now(self, engine: SimulatedEngine) -> None:
        """Whoever could has read what arrived."""
        for request_id, listener in self._open.items():
            listener.engine_died(is_cause=request_id == engine.killed_by)
        was_searching, has_suspects = self.client.is_searching, any(each.num_deaths >= MAX_DEATHS for each in self._open.values())
        self.engine_gone_s = self.loop.now_s
        engine.channel.close()
        assert was_searching or has_suspects or not self.client.is_searching, "a quarantine without anyone who saw two deaths in a row"
        for request_id, num_deaths in self.client._journal._quarantine._num_deaths.items():
            seen = self._open.get(request_id)
            assert seen is None or num_deaths <= seen.num_deaths, "a request is blamed for more deaths in a row than it saw"
        self._num_quarantines += self.client.is_searching and not was_searching
        culprit = self._open.get(engine.killed_by or "")
        if culprit is not None and not culprit.plan.reading_s:
            is_known = self.client.is_searching or engine.killed_by not in self.client._journal._entries
            assert culprit.num_caused < MAX_DEATHS or is_known, "two deaths in a row, and nobody is a suspect"
            assert culprit.num_caused <= MAX_CAUSED, "a request goes on ending engines"

    def _outcome(self) -> Outcome:
        cores = [engine.core for engine in self._engines if engine.checks is not None]
        return Outcome(
            seed=self.seed,
            num_requests=self._num_requests,
            num_steps=sum(engine.num_steps for engine in self._engines),
            num_events=self._num_events,
            num_aborts=self._num_aborts,
            num_preemptions=sum(core.scheduler.num_preemptions for core in cores),
            num_hit_tokens=sum(core.cache.num_hit_tokens for core in cores),
            num_kills=self._num_kills,
            num_quarantines=self._num_quarantines,
            num_convictions=self._num_convictions,
            ended_s=self.loop.now_s,
        )


def _settings(value: Plan | GenerationRequest | SamplingParams) -> list[str]:
    """The fields that are not as usual, without what is printed for itself."""
    pairs = [(each.name, getattr(value, each.name), each.default) for each in fields(value)]
    return [f"{name}={found}" for name, found, usual in pairs if found != usual and name not in ("request", "request_id", "sampling")]


def _options() -> EngineOptions:
    """What a real engine would be told to build; the simulated ones know it from the scenario."""
    config = scenario_of(Random(0)).config
    return EngineOptions(model=config.model, model_dir="", scheduler=config.scheduler)


OPTIONS = _options()


def simulate(seed: int, *, log: list[str] | None = None) -> Outcome:
    """Live through one seed. Raises what went wrong."""
    return World(seed, log=log).run()
