"""FairQueue: who among those that never ran is next.

Tenants share the engine by tokens (the virtual token counter of Sheng et al., arXiv:2401.00588): next is the tenant that was charged least,
and of its sequences the one with the highest priority, then the oldest. A sequence is charged the most it can use, its prompt and
max_tokens, when it is let in; what it did not use is refunded when it leaves. One that yielded and comes back is charged anew: a tenant
that crowds pays for what is computed twice. A tenant gets no credit for a time when it had nobody waiting: it starts level with what the
others have received by then. Not with what they were charged: they hold tokens in advance, and a newcomer that started behind these would
wait until all of them are used or refunded.

The scheduler decides when somebody is let in, this file decides who.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.sequence import Sequence

MAX_SETTLED = 256  # tenants remembered who have nothing open; names are free, so there is no end of them


@dataclass(slots=True, kw_only=True, eq=False)
class _Tenant:
    charge: int = 0  # tokens, less what was refunded
    admitted: set[Sequence] = field(default_factory=set[Sequence])  # let in, not ended
    waiting: list[tuple[int, int, Sequence]] = field(default_factory=list[tuple[int, int, Sequence]])  # sorted; the last is the next

    @property
    def num_received_tokens(self) -> int:
        """Of the tokens charged, those that are not open any more."""
        return self.charge - sum(map(_num_unused_tokens, self.admitted))


class FairQueue:
    """Sequences wait in it from `add` to `admit` or `remove`; an admitted one is accounted for until `settle`."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._num_waiting = 0
        self._last = _Tenant()  # whose turn it was last

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Tenant by tenant, each in its order."""
        return (sequence for tenant in self._tenants.values() for _, _, sequence in reversed(tenant.waiting))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        tenant = self._tenants.get(sequence.request.tenant)
        if tenant is None:
            self._forget_settled()
            tenant = self._tenants[sequence.request.tenant] = _Tenant()
        if not tenant.waiting:
            tenant.charge = max(tenant.charge, self._level())
        insort(tenant.waiting, _entry(sequence))
        self._num_waiting += 1

    def head(self) -> Sequence | None:
        """The next one, who stays; None if nobody waits."""
        waiting = (tenant for tenant in self._tenants.values() if tenant.waiting)
        tenant = min(waiting, key=_turn, default=None)
        return tenant.waiting[-1][2] if tenant else None

    def exchange(self) -> tuple[list[Sequence], set[Sequence]]:
        """Who is next of the tenant whose turn it is, and what the tenant with the most admitted sequences has admitted.

        As many are named as the one can take over from the other without becoming the richer of the two, so that no exchange is reversed.
        """
        if (head := self.head()) is None:
            return [], set()
        tenant = self._tenants[head.request.tenant]
        largest = max((each.admitted for each in self._tenants.values()), key=len)
        count = (len(largest) - len(tenant.admitted)) // 2
        return [sequence for _, _, sequence in tenant.waiting[: -count - 1 : -1]], largest

    def admit(self, sequence: Sequence) -> None:
        """Let it in and charge its tenant."""
        tenant = self._take_out(sequence)
        tenant.charge += sequence.max_len
        tenant.admitted.add(sequence)
        self._last = tenant

    def remove(self, sequence: Sequence) -> None:
        """It leaves without having run."""
        self._take_out(sequence)

    def settle(self, sequence: Sequence) -> None:
        """An admitted sequence has ended, or has yielded."""
        tenant = self._tenants[sequence.request.tenant]
        tenant.charge -= _num_unused_tokens(sequence)
        tenant.admitted.remove(sequence)

    def _level(self) -> int:
        """What the others have received: the least among those who wait."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        return min(tenant.num_received_tokens for tenant in waiting or [self._last])

    def _take_out(self, sequence: Sequence) -> _Tenant:
        tenant = self._tenants[sequence.request.tenant]
        del tenant.waiting[bisect_left(tenant.waiting, _entry(sequence))]
        self._num_waiting -= 1
        return tenant

    def _forget_settled(self) -> None:
        """Of tenants with nothing open, drop who would start from the level as strangers do, and of the rest all but the most charged."""
        level = self._level()
        is_open = {name: tenant for name, tenant in self._tenants.items() if tenant.waiting or tenant.admitted}
        ahead = [(name, tenant) for name, tenant in self._tenants.items() if name not in is_open and tenant.charge > level]
        ahead.sort(key=lambda named: named[1].charge)
        self._tenants = is_open | dict(ahead[-MAX_SETTLED:])


def _num_unused_tokens(sequence: Sequence) -> int:
    """Charged, but not computed so far."""
    return sequence.max_len - sequence.num_tokens


def _entry(sequence: Sequence) -> tuple[int, int, Sequence]:
    return sequence.request.priority, -sequence.arrival, sequence


def _turn(tenant: _Tenant) -> tuple[int, int]:
    """Least charged first; between equals, who waits longer."""
    _, age, _ = tenant.waiting[-1]
    return tenant.charge, -age
