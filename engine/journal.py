"""Journal: every generation that has begun and not ended, with all that it takes to go on in another engine process.

An entry is opened when a generation begins, learns from each delta that passes, and is closed by the generation's one end: its last delta,
a refusal, a conviction, its deadline, an abort or the end of the server. When an engine dies nothing fails: entries are *held* here, and
`due` hands them to the next engine together with what they have given so far, those that have given something first, each group in order
of arrival. Greedy and seeded generations go on exactly where they were, because a token depends on the tokens before it, the seed and the
position alone.

Which entries an engine is given after deaths is `engine/quarantine.py`'s decision. Owned by `engine/client.py`, which moves the messages;
neither clock nor I/O in here. What a journal holds is bounded by what `server/admission.py` lets in.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import EngineDiedError, NoEngineError, RequestError
from engine.messages import Submit
from engine.quarantine import Quarantine
from engine.types import FinishReason, GenerationRequest, TokenDelta

CLEARING_TOKENS = 8  # received from one engine, tokens and prompt scores together, they speak for the request
ENGINE_LATENESS_S = 1.0  # after a deadline that the engine should have kept, it is kept here: the engine may be hanging


class Reader(Protocol):
    """Where the deltas of one generation go."""

    def put(self, delta: TokenDelta) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """One open generation."""

    request: GenerationRequest
    reader: Reader
    output_token_ids: list[int] = field(default_factory=list[int])
    num_scored_tokens: int = 0  # prompt log-probabilities received
    num_received_before: int = 0  # of `num_received`, before the last submission
    is_queued: bool = False  # the engine has it and has computed nothing of it

    @property
    def num_received(self) -> int:
        """Tokens and prompt log-probabilities."""
        return len(self.output_token_ids) + self.num_scored_tokens

    @property
    def is_cleared(self) -> bool:
        """The engine it was last submitted to has made enough progress on it."""
        return self.num_received - self.num_received_before >= CLEARING_TOKENS


class Journal:
    """The open entries. Every reader gets exactly one end: a delta with a finish reason, or `fail`; none after `close`."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}  # in order of arrival
        self._held: dict[str, Entry] = {}  # of these, what no engine has
        self._quarantine = Quarantine()
        self.next_expiry_s = math.inf  # call `expire` at this time; never too late, perhaps too early

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_held(self) -> int:
        """Entries that wait here for an engine."""
        return len(self._held)

    @property
    def is_searching(self) -> bool:
        """Requests are being tried for ending the engine, and all others wait."""
        return self._quarantine.is_active

    def open(self, request: GenerationRequest, reader: Reader) -> Entry:
        """Begin a generation; it is held until `due` gives it away."""
        assert request.request_id not in self._entries, f"request id {request.request_id} is in use"
        entry = Entry(request=request, reader=reader)
        self._entries[request.request_id] = self._held[request.request_id] = entry
        if request.deadline_s is not None:
            self.next_expiry_s = min(self.next_expiry_s, request.deadline_s)
        return entry

    def close(self, entry: Entry) -> bool:
        """Forget a generation that nobody reads any more; True where the engine has to be told. One that has ended is fine."""
        if self._entries.get(entry.request.request_id) is not entry:
            return False
        return self._remove(entry)

    def due(self) -> list[Submit]:
        """What the running engine is to be given now; from here on it has these."""
        if not self._held:
            return []
        if self._quarantine.is_active:
            self._clear_suspects()
            due = [self._held[request_id] for request_id in self._quarantine.next_group()]
        else:
            due = []
        if not self._quarantine.is_active:
            due = sorted(self._held.values(), key=lambda entry: not entry.num_received)
        return [self._submit(entry) for entry in due]

    def record(self, deltas: Iterable[TokenDelta]) -> None:
        """Take what a step added and pass it on. Deltas of closed entries were on their way when those were aborted."""
        entries = self._entries
        for delta in deltas:
            entry = entries.get(delta.request_id)
            if entry is None:
                continue
            entry.output_token_ids += delta.token_ids
            if delta.prompt_logprobs:
                entry.num_scored_tokens += len(delta.prompt_logprobs)
            if delta.finish_reason is not None:
                self._remove(entry)
            entry.reader.put(delta)

    def queued(self, request_ids: Iterable[str]) -> None:
        """The engine has these and computes nothing of them, so they cannot end it."""
        self._set_queued(request_ids, is_queued=True)

    def begun(self, request_ids: Iterable[str]) -> None:
        """From now on these can end the engine."""
        self._set_queued(request_ids, is_queued=False)

    def refuse(self, request_id: str, message: str) -> None:
        """The engine does not take this one, be it for the first time or after it ran elsewhere."""
        if (entry := self._entries.get(request_id)) is not None:
            self._remove(entry)
            entry.reader.fail(RequestError(message))

    def engine_died(self) -> None:
        """Hold everything for the next engine. A generation that ended its engine alone fails with `EngineDiedError`."""
        had = [entry for request_id, entry in self._entries.items() if request_id not in self._held and not entry.is_queued]
        self._held = dict(self._entries)
        convicted = self._quarantine.engine_died(
            cleared=[entry.request.request_id for entry in had if entry.is_cleared],
            not_cleared=[entry.request.request_id for entry in had if not entry.is_cleared],
        )
        self.next_expiry_s = min(map(self._expiry_s, self._entries.values()), default=math.inf)
        if convicted is not None:
            entry = self._entries[convicted]
            self._remove(entry)
            entry.reader.fail(
                EngineDiedError("the engine process ended each time it ran this request, the last time with nothing beside it")
            )

    def expire(self, now_s: float) -> list[str]:
        """End what is past its deadline and in no engine that could end it; returns the ids of those that a late engine still has."""
        expired = [entry for entry in self._entries.values() if self._expiry_s(entry) <= now_s]
        to_abort = [entry.request.request_id for entry in expired if self._remove(entry)]
        for entry in expired:
            entry.reader.put(TokenDelta(request_id=entry.request.request_id, finish_reason=FinishReason.DEADLINE))
        self.next_expiry_s = min(map(self._expiry_s, self._entries.values()), default=math.inf)
        return to_abort

    def fail_all(self, reason: str) -> list[str]:
        """End everything with `NoEngineError`; returns the ids that the engine has."""
        failed = list(self._entries.values())
        to_abort = [entry.request.request_id for entry in failed if self._remove(entry)]
        for entry in failed:
            entry.reader.fail(NoEngineError(reason))
        return to_abort

    def _submit(self, entry: Entry) -> Submit:
        del self._held[entry.request.request_id]
        entry.num_received_before = entry.num_received
        entry.is_queued = False
        return Submit(entry.request, tuple(entry.output_token_ids), entry.num_scored_tokens)

    def _set_queued(self, request_ids: Iterable[str], *, is_queued: bool) -> None:
        for request_id in request_ids:
            if (entry := self._entries.get(request_id)) is not None:
                entry.is_queued = is_queued

    def _clear_suspects(self) -> None:
        for request_id in list(self._quarantine.on_trial):
            if self._entries[request_id].is_cleared:
                self._quarantine.clear(request_id)

    def _remove(self, entry: Entry) -> bool:
        """True where an engine has it."""
        request_id = entry.request.request_id
        del self._entries[request_id]
        self._quarantine.forget(request_id)
        return self._held.pop(request_id, None) is None

    def _expiry_s(self, entry: Entry) -> float:
        """When this entry is to be ended here."""
        deadline_s = entry.request.deadline_s
        if deadline_s is None:
            return math.inf
        return deadline_s if entry.request.request_id in self._held else deadline_s + ENGINE_LATENESS_S
