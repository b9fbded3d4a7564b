"""FairQueue: who among those that never ran is next.

Tenants get equal parts of the engine, but one after the other instead of all at once (the fair sojourn protocol of Friedman and Henderson,
SIGMETRICS 2003): next is the tenant whose requests would all be done first if each got its part of every step. So a small burst is through
almost as soon as alone, and a large one hardly later than under equal sharing. `docs/decisions/0007-one-tenant-after-the-other.md` has the
figures.

A virtual clock says how many tokens equal sharing would have given by now to a tenant that always had work. A tenant's *charge* is the time
on that clock at which its part would have paid for all that was let in, its *finish* that for what waits, too. Neither depends on what
others send. A tenant that comes, or comes back, begins at the clock or at its last finish, whichever is later: a time when it sent nothing
gives no credit, and who was served ahead of its part has had it.

A finish moves away with all that its tenant sends. Therefore who is *late* goes before all others: a tenant whose part would by now have
paid for as many sequences like its next one as can run at once. The clock moves whenever anybody receives a token, and a charge only when
its tenant is served. So everybody's turn comes, however many others come later.

Of a tenant's sequences the one with the highest priority is next, then the oldest. Nobody knows how long a sequence gets, and `max_tokens`
may be far more. It is charged as if it gave as many tokens as others gave lately; what it did not use is refunded when it ends or yields,
and what it takes beyond is charged as it comes.

The scheduler decides when somebody is let in, this file decides who.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.sequence import Sequence

NUM_RECENT = 32  # sequences that ended, about, tell how much the next ones will give
MAX_SETTLED = 256  # tenants remembered who have nothing open; names are free, so there is no end of them


@dataclass(slots=True, kw_only=True, eq=False)
class _Tenant:
    charge: int  # tokens, as times of the clock
    backlog: int = 0  # tokens that wait
    waiting: list[tuple[int, int, Sequence]] = field(default_factory=list[tuple[int, int, Sequence]])  # sorted; the last is the next
    admitted: dict[Sequence, None] = field(default_factory=dict[Sequence, None])  # let in, not ended, by age

    @property
    def finish(self) -> int:
        return self.charge + self.backlog

    @property
    def head(self) -> Sequence:
        return self.waiting[-1][2]

    def charge_excess(self) -> int:
        """Charge what was received beyond what was foreseen; returns the tokens that are charged and not received."""
        num_open = 0
        for sequence in self.admitted:
            num_unused = sequence.num_foreseen_tokens - sequence.num_tokens
            if num_unused < 0:
                self.charge -= num_unused
                sequence.num_foreseen_tokens -= num_unused
            else:
                num_open += num_unused
        return num_open


class FairQueue:
    """Sequences wait in it from `add` to `admit` or `remove`; an admitted one is accounted for until `settle`."""

    def __init__(self, *, num_slots: int, num_cache_tokens: int) -> None:
        self._num_slots = num_slots
        self._num_cache_tokens = num_cache_tokens
        self._tenants: dict[str, _Tenant] = {}
        self._num_waiting = 0
        self._clock = 0  # tokens
        self._num_ended = 0  # counted up to `NUM_RECENT`
        self._mean_output = 0.0  # tokens of those that ended

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Tenant by tenant, each in its order."""
        return (sequence for tenant in self._tenants.values() for _, _, sequence in reversed(tenant.waiting))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        tenant = self._tenants.get(sequence.request.tenant)
        if tenant is None or not tenant.waiting:
            self.advance_clock()
        if tenant is None:
            self._forget_settled()
            tenant = self._tenants[sequence.request.tenant] = _Tenant(charge=self._clock)
        if not tenant.waiting:
            tenant.charge = max(tenant.charge, self._clock)
        sequence.num_foreseen_tokens = self._foresee(sequence)
        self._put_in(tenant, sequence)

    def advance_clock(self) -> None:
        """Take note of what was received since the last call.

        Under equal sharing all together would have received what they really have, and so would still get what they really will. The clock
        stands where the finishes behind it lie that far away, all together.
        """
        num_open = sum(tenant.backlog + tenant.charge_excess() for tenant in self._tenants.values())
        finishes = sorted((tenant.finish for tenant in self._tenants.values()), reverse=True)
        total = 0
        for count, finish in enumerate(finishes, start=1):
            if finish <= self._clock:
                break
            total += finish
            self._clock = max(self._clock, (total - num_open) // count)

    def head(self) -> Sequence | None:
        """The next one, who stays; None if nobody waits."""
        tenant = self._next_tenant()
        return tenant.head if tenant else None

    def exchange(self) -> tuple[list[Sequence], set[Sequence]]:
        """Who is next of the tenant whose turn it is, and whose places they may take.

        These are of tenants that would be done later, be it with one sequence less. A tenant that has no place, though its part would have
        paid for its next sequence, takes one of anybody who has several. Nobody gives so much that it could take it back.
        """
        tenant = self._next_tenant()
        if tenant is None:
            return [], set()
        others = [other for other in self._tenants.values() if other is not tenant]
        heirs = [sequence for _, _, sequence in tenant.waiting[: -self._num_slots - 1 : -1]]
        givers = [other for other in others if other.finish > tenant.finish + tenant.head.num_foreseen_tokens]
        if not givers and not tenant.admitted and tenant.charge + tenant.head.num_foreseen_tokens <= self._clock:
            heirs, givers = heirs[:1], [other for other in others if len(other.admitted) > 1]
        return heirs, {sequence for giver in givers for sequence in self._spare(giver)}

    def admit(self, sequence: Sequence) -> None:
        """Let it in and charge its tenant."""
        tenant = self._take_out(sequence)
        tenant.admitted[sequence] = None
        tenant.charge += _size(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It leaves without having run."""
        self._take_out(sequence)

    def settle(self, sequence: Sequence) -> None:
        """An admitted sequence has ended."""
        self._refund(sequence)
        self._num_ended = min(self._num_ended + 1, NUM_RECENT)
        self._mean_output += (sequence.num_output_tokens - self._mean_output) / self._num_ended

    def take_back(self, sequence: Sequence) -> None:
        """An admitted sequence has yielded, and waits again."""
        tenant = self._refund(sequence)
        sequence.num_yields += 1
        sequence.num_paid_tokens = sequence.num_tokens
        self._put_in(tenant, sequence)

    def _refund(self, sequence: Sequence) -> _Tenant:
        tenant = self._tenants[sequence.request.tenant]
        del tenant.admitted[sequence]
        tenant.charge -= sequence.num_foreseen_tokens - sequence.num_tokens
        return tenant

    def _foresee(self, sequence: Sequence) -> int:
        if not self._num_ended:
            return sequence.max_len
        return min(sequence.max_len, sequence.num_tokens + round(self._mean_output))

    def _next_tenant(self) -> _Tenant | None:
        return min((tenant for tenant in self._tenants.values() if tenant.waiting), key=self._turn, default=None)

    def _turn(self, tenant: _Tenant) -> tuple[bool, int, int]:
        """The late ones first, of these the least charged; then who would be done first; between equals, who waits longer."""
        is_late = tenant.charge + self._lag(tenant.head) <= self._clock
        return not is_late, tenant.charge if is_late else tenant.finish, tenant.head.arrival

    def _lag(self, sequence: Sequence) -> int:
        """What all sequences like this one that can run at once are charged."""
        return min(self._num_slots * sequence.num_foreseen_tokens, self._num_cache_tokens)

    def _spare(self, tenant: _Tenant) -> list[Sequence]:
        """What it has admitted, the youngest first, as far as it is not late without; the last only if its part has not paid for it yet."""
        spare: list[Sequence] = []
        charge = tenant.charge
        for sequence in reversed(tenant.admitted):
            is_paid_last = charge <= self._clock and len(spare) + 1 == len(tenant.admitted)
            charge -= sequence.num_foreseen_tokens - sequence.num_tokens
            if is_paid_last or charge + self._lag(sequence) <= self._clock:
                break
            spare.append(sequence)
        return spare

    def _put_in(self, tenant: _Tenant, sequence: Sequence) -> None:
        insort(tenant.waiting, _entry(sequence))
        tenant.backlog += _size(sequence)
        self._num_waiting += 1

    def _take_out(self, sequence: Sequence) -> _Tenant:
        tenant = self._tenants[sequence.request.tenant]
        del tenant.waiting[bisect_left(tenant.waiting, _entry(sequence))]
        tenant.backlog -= _size(sequence)
        self._num_waiting -= 1
        return tenant

    def _forget_settled(self) -> None:
        """Of tenants with nothing open, drop who would begin at the clock as strangers do, and of the rest all but the most charged."""
        is_open = {name: tenant for name, tenant in self._tenants.items() if tenant.waiting or tenant.admitted}
        ahead = [(name, tenant) for name, tenant in self._tenants.items() if name not in is_open and tenant.charge > self._clock]
        ahead.sort(key=lambda named: named[1].charge)
        self._tenants = is_open | dict(ahead[-MAX_SETTLED:])


def _size(sequence: Sequence) -> int:
    """What it is charged when it is let in: all, or what it had not received when it yielded."""
    return sequence.num_foreseen_tokens - sequence.num_paid_tokens


def _entry(sequence: Sequence) -> tuple[int, int, Sequence]:
    return sequence.request.priority, -sequence.arrival, sequence
