"""World: one seed's run of client, journal, quarantine, transport and engine processes, from the first start to the last answer.

The real client stands in the middle. In front of it clients come, read, lose patience and leave; behind it engine processes start, compute,
hang and die, and a supervisor starts the next. All that happens is a timer of one `VirtualLoop`; after each, `invariants.py` has its say.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields
from random import Random

from invariants import EngineChecks, ListenerChecks
from simulated_engine import SimulatedEngine, SlowChannel
from virtual_loop import VirtualLoop
from workload import Fates, Plan, Scenario, Workload, scenario_of

from engine.client import RemoteEngineClient
from engine.config import EngineOptions
from engine.errors import EngineDiedError, RequestError
from engine.journal import CLEARING_TOKENS, ENGINE_LATENESS_S
from engine.quarantine import MAX_DEATHS
from engine.types import GenerationRequest, SamplingParams, TokenDelta

MIN_REQUESTS = 30
MIN_STEPS = 300
MAX_EVENTS = 15_000  # a world that lives longer hangs
STALL_TIMEOUT_S = 10.0
LATENESS_S = ENGINE_LATENESS_S + 0.1  # after its deadline a request has ended, whatever the engine does


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


class Listener:
    """One client's request, from the question to its one end."""

    def __init__(self, plan: Plan, world: "World") -> None:
        self.plan = plan
        self.checks = ListenerChecks(plan.request)
        self.outcome: str | None = None
        self.num_deaths = 0  # of engines in a row that had made little progress on it
        self.num_received_in_life = 0
        self._world = world

    @property
    def may_be_suspect(self) -> bool:
        """Another death that it has no part in might get it convicted."""
        return self.num_deaths >= MAX_DEATHS and self.num_received_in_life < CLEARING_TOKENS

    def engine_died(self) -> None:
        """Count it, as one too many rather than one too few: what a slow reader has not read yet is not known here."""
        is_cleared = self.num_received_in_life >= CLEARING_TOKENS and not self.plan.reading_s
        self.num_deaths = 0 if is_cleared else self.num_deaths + 1
        self.num_received_in_life = 0

    async def listen(self) -> None:
        try:
            self._end(await self._read_to_the_end())
        except Exception as error:
            self._world.loop.fail(error)

    async def _read_to_the_end(self) -> str:
        try:
            return await self._read()
        except asyncio.CancelledError:
            return "aborted"
        except EngineDiedError:
            return "died"
        except RequestError:
            return "refused"

    async def _read(self) -> str:
        num_deltas = 0
        async with aclosing(self._world.client.generate(self.plan.request)) as deltas:
            async for delta in deltas:
                self._take(delta)
                num_deltas += 1
                if num_deltas == self.plan.abort_after_deltas and not self.checks.has_ended:
                    return "aborted"
                if self.plan.reading_s:
                    await asyncio.sleep(self.plan.reading_s)
        assert self.checks.has_ended, "the stream ended without a last delta"
        return "finished"

    def _take(self, delta: TokenDelta) -> None:
        self.checks.take(delta, now_s=self._world.loop.now_s)
        self.num_received_in_life += len(delta.token_ids) + len(delta.prompt_logprobs)

    def _end(self, outcome: str) -> None:
        assert self.outcome is None, f"ended twice: {self.outcome}, then {outcome}"
        plan = self.plan
        self.outcome = outcome
        self._world.ended(self)
        if outcome == "died":
            assert self._world.is_stopping or plan.kills_at is not None, "an innocent request was convicted"
        assert outcome != "refused" or plan.is_refused, "a request was refused that fits"
        assert outcome != "finished" or not plan.is_refused or plan.request.deadline_s, "a request was served that can never fit"
        if plan.request.deadline_s is not None and not plan.reading_s:
            assert self._world.loop.now_s <= plan.request.deadline_s + LATENESS_S, "ended long after its deadline"


class World:
    """`run` lives through everything and returns what happened; any broken invariant raises on the way."""

    def __init__(self, seed: int, *, log: list[str] | None = None) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.loop = VirtualLoop()
        self.scenario: Scenario = scenario_of(self.rng)
        self.is_stopping = False
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
                on_death=lambda who: self._kill(f"{who} kills it"),
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
                self._kill("is killed")
        self._plan_kill()

    def _kill(self, cause: str) -> None:
        assert self._engine is not None
        self._kill_engine(self._engine, cause)

    def _kill_engine(self, engine: SimulatedEngine, cause: str) -> None:
        if engine.is_dead:
            return
        self.note(f"engine {cause}")
        engine.die()
        self._num_kills += 1
        self.loop.call_later(self.rng.choice((0.0, self._delay())), self._close, engine)

    def _close(self, engine: SimulatedEngine) -> None:
        """The server sees the end of a dead engine. Part of what was on its way may arrive before."""
        ours = engine.channel._peer
        if ours is None:
            return
        ours.deliver(self.rng.randrange(ours.num_arrived + 1))
        self.loop.call_soon(self._close_now, engine.channel)

    def _close_now(self, channel: SlowChannel) -> None:
        """Whoever could has read what arrived."""
        for listener in self._open.values():
            listener.engine_died()
        was_searching, has_suspects = self.client.is_searching, any(each.num_deaths >= MAX_DEATHS for each in self._open.values())
        channel.close()
        assert was_searching or has_suspects or not self.client.is_searching, "a quarantine without anyone who saw two deaths in a row"
        self._num_quarantines += self.client.is_searching and not was_searching

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
