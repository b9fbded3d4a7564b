"""GrammarQueue: whose grammar is checked next.

Tenants take turns, those with the fewest checks under way first, so whoever asks for hundreds delays another by no more than the check that
runs. A named tenant has one check under way at a time: the other worker stays for the others. The nameless may be many, and may take
every worker.

A full queue takes the grammar of a tenant that has less in it than another, and sends the last one of the other away.
"""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass

from server.grammar_messages import Answer


class QueueFullError(Exception):
    """There is no place for this grammar, or none any more."""


@dataclass(slots=True, kw_only=True, eq=False)
class GrammarJob:
    """One grammar to check, for everybody who waits for the same one."""

    key: bytes
    text: str
    tenant: str  # who asked first
    outcome: "asyncio.Future[Answer]"
    num_waiting: int = 0  # who still want to know
    num_tries: int = 0

    def fail(self, error: Exception) -> None:
        """Tell whoever waits, unless they know already."""
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # nobody may be there to see it


class GrammarQueue:
    """For one event loop. What `get` gives is under way until `done`."""

    def __init__(self, *, max_len: int) -> None:
        self._max_len = max_len
        self._waiting: dict[str, deque[GrammarJob]] = {}  # by tenant; whose turn was last stands last
        self._under_way: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def put(self, job: GrammarJob) -> None:
        """Let a job wait. Raises `QueueFullError` where there is no place for it."""
        if sum(map(len, self._waiting.values())) >= self._max_len:
            self._make_place_for(job.tenant)
        self._waiting.setdefault(job.tenant, deque()).append(job)
        self._changed.set()

    async def get(self) -> GrammarJob:
        """Wait for a job that may run now."""
        while (job := self._next()) is None:
            self._changed.clear()
            await self._changed.wait()
        return job

    def put_back(self, job: GrammarJob) -> None:
        """Let a job that `get` gave wait again, before its tenant's others."""
        self._waiting.setdefault(job.tenant, deque()).appendleft(job)
        self._changed.set()

    def done(self, job: GrammarJob) -> None:
        """A job that `get` gave is under way no more."""
        self._under_way -= Counter([job.tenant])
        self._changed.set()

    def discard(self, job: GrammarJob) -> bool:
        """Forget a job; whether it was still waiting."""
        jobs = self._waiting.get(job.tenant)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.tenant]
        return True

    def _next(self) -> GrammarJob | None:
        eligible = [tenant for tenant in self._waiting if not (tenant and self._under_way[tenant])]
        if not eligible:
            return None
        tenant = min(eligible, key=lambda name: self._under_way[name])
        jobs = self._waiting.pop(tenant)
        job = jobs.popleft()
        if jobs:
            self._waiting[tenant] = jobs
        self._under_way[tenant] += 1
        return job

    def _make_place_for(self, tenant: str) -> None:
        longest = max(self._waiting, key=lambda name: len(self._waiting[name]))
        if len(self._waiting[longest]) <= len(self._waiting.get(tenant, ())) + 1:
            raise QueueFullError
        job = self._waiting[longest][-1]
        self.discard(job)
        job.fail(QueueFullError())
