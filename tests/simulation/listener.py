"""Listener: one client of the simulated world and its request, from the question to its one end."""

import asyncio
from contextlib import aclosing
from typing import Protocol

from invariants import ListenerChecks
from virtual_loop import VirtualLoop
from workload import Plan

from engine.client import RemoteEngineClient
from engine.errors import EngineDiedError, RequestError
from engine.journal import CLEARING_TOKENS, ENGINE_LATENESS_S
from engine.quarantine import MAX_DEATHS
from engine.types import TokenDelta

LATENESS_S = ENGINE_LATENESS_S + 0.1  # after its deadline a request has ended, whatever the engine does


class Surroundings(Protocol):
    """What a listener knows of its world."""

    client: RemoteEngineClient
    loop: VirtualLoop
    is_stopping: bool
    engine_gone_s: float  # when the last one went

    def ended(self, listener: "Listener") -> None: ...


class Listener:
    """One client's request, from the question to its one end."""

    def __init__(self, plan: Plan, world: Surroundings) -> None:
        self.plan = plan
        self.checks = ListenerChecks(plan.request)
        self.outcome: str | None = None
        self.num_deaths = 0  # of engines in a row that had made little progress on it
        self.num_caused = 0  # of these, deaths that computing it has caused
        self.num_received_in_life = 0
        self._world = world

    @property
    def may_be_suspect(self) -> bool:
        """Another death that it has no part in might get it convicted."""
        return self.num_deaths >= MAX_DEATHS and self.num_received_in_life < CLEARING_TOKENS

    def engine_died(self, *, is_cause: bool) -> None:
        """Count it, as one too many rather than one too few: what a slow reader has not read yet is not known here."""
        is_cleared = self.num_received_in_life >= CLEARING_TOKENS and not self.plan.reading_s
        self.num_deaths = 0 if is_cleared else self.num_deaths + 1
        self.num_caused = 0 if is_cleared else self.num_caused + is_cause
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
            latest_s = plan.request.deadline_s + LATENESS_S
            if not self._world.client.is_ready and not self._world.is_stopping:  # a stop ends all at its own moment
                latest_s = min(latest_s, max(plan.request.deadline_s, self._world.engine_gone_s) + 1e-9)
            assert self._world.loop.now_s <= latest_s, "ended long after its deadline"
