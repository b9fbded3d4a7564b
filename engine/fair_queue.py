"""FairQueue: who among those that never ran is next.

Tenants share the engine by service, counted in tokens (the virtual token counter of Sheng et al., arXiv:2401.00588): next is the tenant
that has been given least, and of its sequences the one with the highest priority, then the oldest. A sequence is charged the most that
it can use, its prompt and max_tokens, when it is let in; what it did not use is refunded when it leaves. A tenant that had nobody waiting
gets no credit for that time: it starts from where the tenant that was served last stood.

Used by the scheduler only; it decides when somebody is let in, this file decides who.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.sequence import Sequence


@dataclass(slots=True, kw_only=True, eq=False)
class _Tenant:
    service: int = 0  # tokens charged
    num_admitted: int = 0  # let in, not ended
    waiting: list[tuple[int, int, Sequence]] = field(default_factory=list[tuple[int, int, Sequence]])  # sorted; the last is the next


class FairQueue:
    """Sequences wait in it from `add` to `admit` or `remove`; an admitted one is accounted for until `settle`."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._num_waiting = 0
        self._level = 0  # service of the tenant served last, when its turn came

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
            tenant.service = max(tenant.service, self._level)
        insort(tenant.waiting, _entry(sequence))
        self._num_waiting += 1

    def head(self) -> Sequence | None:
        """The next one, who stays; None if nobody waits."""
        waiting = (tenant for tenant in self._tenants.values() if tenant.waiting)
        tenant = min(waiting, key=_turn, default=None)
        return tenant.waiting[-1][2] if tenant else None

    def admit(self, sequence: Sequence) -> None:
        """Let it in and charge its tenant."""
        tenant = self._take_out(sequence)
        self._level = tenant.service
        tenant.service += sequence.max_len
        tenant.num_admitted += 1

    def remove(self, sequence: Sequence) -> None:
        """It leaves without having run."""
        self._take_out(sequence)

    def settle(self, sequence: Sequence) -> None:
        """An admitted sequence has ended."""
        tenant = self._tenants[sequence.request.tenant]
        tenant.service -= max(0, sequence.max_len - sequence.num_tokens)
        tenant.num_admitted -= 1

    def _take_out(self, sequence: Sequence) -> _Tenant:
        tenant = self._tenants[sequence.request.tenant]
        del tenant.waiting[bisect_left(tenant.waiting, _entry(sequence))]
        self._num_waiting -= 1
        return tenant

    def _forget_settled(self) -> None:
        """Drop the tenants who have nothing open and would start from `_level` as strangers do."""
        self._tenants = {
            name: tenant for name, tenant in self._tenants.items() if tenant.waiting or tenant.num_admitted or tenant.service > self._level
        }


def _entry(sequence: Sequence) -> tuple[int, int, Sequence]:
    return sequence.request.priority, -sequence.arrival, sequence


def _turn(tenant: _Tenant) -> tuple[int, int]:
    """Least service first; between equals, who waits longer."""
    _, age, _ = tenant.waiting[-1]
    return tenant.service, -age
