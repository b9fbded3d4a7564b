"""Quarantine: finds the requests that end the engine, by trying suspects in halves. Bookkeeping alone: no clock, no I/O, no messages.

A request is *cleared* in the life of one engine process once the engine has made some progress on it (what counts is the journal's
decision) or once it has ended. Only requests that an engine had begun and had not cleared can have ended it; those that only waited there
had no part in it. So, at each death:

    1. A cleared request starts again at no deaths; one that was not cleared has one death more.
    2. Requests with two deaths in a row are suspects. Until none is left, nothing else is given to an engine.
    3. The suspects are tried in halves, a group at a time. When all of a group are cleared or over, the next group joins them.
    4. A death splits the group on trial, as far as it was begun and not cleared; its first half is tried next, who waited after both.
    5. A suspect that was all that its engine ever had, and died with it, is convicted. One that died beside cleared ones is tried again,
       which is alone: every trial after a death is the first of its engine.

A machine that ends engines at random convicts nobody as long as it lets them clear a group in between, and every trial ends in a clearing,
a split or a conviction, so the number of lives is bounded. Owned by `engine/journal.py`.
"""

from collections import deque
from collections.abc import Collection, Iterable

MAX_DEATHS = 2  # in a row; from here on a request is a suspect


class Quarantine:
    """Knows requests by id, from their first death on until they are over."""

    def __init__(self) -> None:
        self._num_deaths: dict[str, int] = {}  # in a row; those without any are not here
        self._groups: deque[list[str]] = deque()  # suspects that wait for their trial; the first group is next
        self._on_trial: list[str] = []  # suspects that the running engine has and has not cleared
        self._is_alone = False  # the one on trial is all that its engine ever had
        self._is_fresh_engine = True

    @property
    def is_active(self) -> bool:
        """There are suspects: an engine is given what `next_group` says, and nothing else."""
        return bool(self._on_trial or self._groups)

    @property
    def on_trial(self) -> Collection[str]:
        """Whom to watch for progress."""
        return self._on_trial

    def next_group(self) -> list[str]:
        """The suspects to give to the running engine now; none while others are on trial."""
        if self._on_trial or not self._groups:
            return []
        self._on_trial = self._groups.popleft()
        self._is_alone = self._is_fresh_engine and len(self._on_trial) == 1
        self._is_fresh_engine = False
        return list(self._on_trial)

    def clear(self, request_id: str) -> None:
        """The engine has made progress on this suspect, which is none any more."""
        self._on_trial.remove(request_id)
        del self._num_deaths[request_id]

    def forget(self, request_id: str) -> None:
        """This request is over, in whatever way. Unknown ones are fine."""
        if self._num_deaths.pop(request_id, None) is None:
            return
        self._on_trial = [other for other in self._on_trial if other != request_id]
        self._groups = deque(kept for group in self._groups if (kept := [other for other in group if other != request_id]))

    def engine_died(self, *, cleared: Iterable[str], not_cleared: Collection[str]) -> str | None:
        """Draw the conclusions from a death; returns the request that is convicted, and forgotten, if one is.

        The two arguments are what the engine had begun and had not ended; each in the order in which halves are to be made.
        """
        self._is_fresh_engine = True
        for request_id in cleared:
            self._num_deaths.pop(request_id, None)
        for request_id in not_cleared:
            self._num_deaths[request_id] = self._num_deaths.get(request_id, 0) + 1
        begun = set(not_cleared)
        on_trial = [request_id for request_id in self._on_trial if request_id in self._num_deaths]
        suspects = [request_id for request_id in on_trial if request_id in begun]
        waited = [request_id for request_id in on_trial if request_id not in begun]
        self._on_trial = []
        if suspects and self._is_alone:
            self.forget(suspects[0])
            return suspects[0]
        if not on_trial and not self._groups:
            suspects = [request_id for request_id in not_cleared if self._num_deaths[request_id] >= MAX_DEATHS]
        self._groups.extendleft(reversed([*_halves(suspects), *([waited] if waited else [])]))
        return None


def _halves(group: list[str]) -> list[list[str]]:
    """At most two groups, none of them empty."""
    middle = (len(group) + 1) // 2
    return [half for half in (group[:middle], group[middle:]) if half]
