"""How much may be open, of all and of one tenant, and when to say no. Asked before any tokenising; answers at once.

A request counts as what it fans out to: 4 prompts with 8 choices each are 32 sequences, and as many tokens as these may come to hold in the
cache, prompt plus max_tokens of every one. As many sequences are let in as the engine runs at once, and as many tokens as the cache holds,
plus a bounded queue of either; a tenant may have a smaller bound of its own. How many tokens a text is shows when it is tokenised: until
then the permit holds what is certain, then `raise_to` says the rest, which may still be too much. A permit is a context manager: leaving
it, by whatever door, gives back all it holds.

While an engine is replaced, requests are let in as ever, and wait in the engine client's journal: what that can hold is bounded here.
Readiness is another question than being open: it fails during a restart, and first of all at the end, so that load balancers look
elsewhere before anybody is refused.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

from engine.client import EngineClient
from engine.types import EngineInfo
from server.errors import InvalidRequest, QuotaExceeded, Unavailable
from server.limits import Limits


class Load(NamedTuple):
    """What is open, or is to be."""

    num_sequences: int = 0
    num_tokens: int = 0

    def with_change(self, old: "Load", new: "Load") -> "Load":
        """This load once a part of it is no longer `old` but `new`."""
        return Load(self.num_sequences - old.num_sequences + new.num_sequences, self.num_tokens - old.num_tokens + new.num_tokens)


NOTHING = Load()


class Permit:
    """What one request holds."""

    def __init__(self, admission: "Admission", info: EngineInfo, *, tenant: str) -> None:
        self.info = info  # of the engine that let it in
        self.tenant = tenant
        self.load = NOTHING
        self._admission = admission

    def raise_to(self, num_tokens: int) -> None:
        """Hold `num_tokens` instead of what it held so far. Raises like `Admission.permit`, and holds what it held then."""
        self._admission.exchange(self, self.load._replace(num_tokens=num_tokens))


class Admission:
    """Owns the count of what is open and the two steps to the end. Lives on the event loop; not for threads."""

    def __init__(self, client: EngineClient, *, limits: Limits) -> None:
        self._client = client
        self._limits = limits
        self.open = NOTHING
        self._open_of_tenants: dict[str, Load] = {}  # only those that have something open
        self.is_retiring = False
        self.is_draining = False

    @property
    def num_open(self) -> int:
        """Sequences."""
        return self.open.num_sequences

    def retire(self) -> None:
        """Not ready from now on, for good; requests are still taken."""
        self.is_retiring = True

    def drain(self) -> None:
        """Take nothing new from now on; what is open runs to its end."""
        self.is_retiring = self.is_draining = True

    def check_open(self) -> EngineInfo:
        """What the newest engine told about itself. Raises `Unavailable` where no request at all can be taken now."""
        if self.is_draining:
            raise self._not_now("the server is shutting down", "shutting_down")
        if self._client.info is None:
            raise self._not_now("the model is still loading; /readyz shows how far it is", "model_loading")
        return self._client.info

    def check_ready(self) -> None:
        """Raises `Unavailable` where new requests had better go to another server, though they may still be taken here."""
        if self.is_retiring:
            raise self._not_now("the server is shutting down", "shutting_down")
        self.check_open()
        if not self._client.is_ready:
            raise self._not_now("the engine is being restarted", "engine_restarting")

    @contextmanager
    def permit(self, num_sequences: int, *, num_tokens: int = 0, tenant: str = "") -> Generator[Permit, None, None]:
        """Hold room for `num_sequences`, and for `num_tokens` of them as far as these are known.

        Raises `QuotaExceeded` where the tenant has too much open, `Unavailable` where there is no room now, `InvalidRequest` where there
        never is.
        """
        permit = Permit(self, self.check_open(), tenant=tenant)
        self.exchange(permit, Load(num_sequences, num_tokens))
        try:
            yield permit
        finally:
            self._book(permit, NOTHING)

    def exchange(self, permit: Permit, wanted: Load) -> None:
        """Let a permit hold `wanted` instead of what it holds. Raises like `permit`, and changes nothing then."""
        self._check_quota(permit, wanted)
        self._check_room(permit, wanted)
        self._book(permit, wanted)

    def _book(self, permit: Permit, load: Load) -> None:
        of_tenant = self._open_of(permit.tenant).with_change(permit.load, load)
        self.open = self.open.with_change(permit.load, load)
        self._open_of_tenants[permit.tenant] = of_tenant
        if of_tenant == NOTHING:
            del self._open_of_tenants[permit.tenant]
        permit.load = load

    def _open_of(self, tenant: str) -> Load:
        return self._open_of_tenants.get(tenant, NOTHING)

    def _check_quota(self, permit: Permit, wanted: Load) -> None:
        others = self._open_of(permit.tenant).with_change(permit.load, NOTHING)
        caps = (self._limits.max_tenant_sequences, self._limits.max_tenant_tokens)
        for unit, asked, taken, cap in zip(_UNITS, wanted, others, caps, strict=True):
            if cap is None:
                continue
            if asked > cap:
                raise _never(unit, asked=asked, holder="one tenant of this server may hold", cap=cap)
            if taken + asked > cap:
                raise QuotaExceeded(
                    f"{taken:,} {unit} of this tenant are open and {asked:,} more are asked for, {cap:,} may be open at once; "
                    "wait until some are finished",
                    kind=_OPENAI_UNITS[unit],
                    retry_after_s=self._limits.retry_after_s,
                )

    def _check_room(self, permit: Permit, wanted: Load) -> None:
        info, limits = permit.info, self._limits
        others = self.open.with_change(permit.load, NOTHING)
        caps = (info.max_num_seqs + limits.max_queued_sequences, info.num_blocks * info.block_size + limits.max_queued_tokens)
        for unit, asked, taken, cap in zip(_UNITS, wanted, others, caps, strict=True):
            if asked > cap:
                raise _never(unit, asked=asked, holder="this server holds", cap=cap)
            if taken + asked > cap:
                raise self._full(f"{taken:,} of {cap:,} {unit} are open")

    def _full(self, what: str) -> Unavailable:
        """The queue's bound is reached; `what` says which, with its numbers."""
        if self._client.is_ready:
            return self._not_now(f"the server is full: {what}", "server_overloaded")
        return self._not_now(f"the engine is being restarted and nothing more can wait for it: {what}", "engine_restarting")

    def _not_now(self, message: str, code: str) -> Unavailable:
        return Unavailable(message, code=code, retry_after_s=self._limits.retry_after_s)


_UNITS = ("sequences", "tokens")
_OPENAI_UNITS = {"sequences": "requests", "tokens": "tokens"}
_WAYS_OUT = {"sequences": "send fewer prompts or choices", "tokens": "lower max_tokens, or send fewer prompts or choices"}


def _never(unit: str, *, asked: int, holder: str, cap: int) -> InvalidRequest:
    return InvalidRequest(f"the request asks for {asked:,} {unit}, {holder} {cap:,}; {_WAYS_OUT[unit]}")
