"""The responses that clients may come back to: what `GET /v1/responses/{id}` answers and `previous_response_id` goes on from.

Kept in memory alone and only as JSON text, so that what a response costs is what it counts for; a restart forgets them all. Both bounds are
of the server as a whole. Where one is passed, whoever holds the most gives up the response that nobody has asked for the longest: a tenant
that stores a lot pushes out its own. Nobody sees another tenant's; without API keys there is one tenant. Used on the event loop only.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A response and the conversation that it is the end of, each item as JSON."""

    id: str
    body: bytes  # as it was answered
    input: tuple[bytes, ...]  # what it was generated from, oldest first; instructions are not part of it
    output: Mapping[str, bytes]  # what was generated, by id

    @property
    def items(self) -> tuple[bytes, ...]:
        """What a next response goes on from."""
        return (*self.input, *self.output.values())

    @property
    def num_bytes(self) -> int:
        """Items that several responses of one conversation share count for each of them."""
        return len(self.body) + sum(map(len, self.items))


@dataclass(slots=True, kw_only=True)
class _Shelf:
    """One tenant's responses, the one that was asked for last at the end."""

    responses: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict[str, StoredResponse])
    responses_of_items: dict[str, str] = field(default_factory=dict[str, str])  # by id of an output item
    num_bytes: int = 0


class ResponseStore:
    """At most `max_responses`, of at most `max_bytes` together. With either at 0 nothing is kept."""

    def __init__(self, *, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._shelves: dict[str, _Shelf] = {}

    @property
    def num_responses(self) -> int:
        return sum(len(shelf.responses) for shelf in self._shelves.values())

    @property
    def num_bytes(self) -> int:
        return sum(shelf.num_bytes for shelf in self._shelves.values())

    def put(self, response: StoredResponse, *, tenant: str) -> None:
        """Keep a response, for as long as there is room. One that is larger than all the room is not kept."""
        if response.num_bytes > self._max_bytes or not self._max_responses:
            return
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.responses[response.id] = response
        shelf.responses_of_items |= dict.fromkeys(response.output, response.id)
        shelf.num_bytes += response.num_bytes
        while self.num_responses > self._max_responses:
            self._drop_oldest(max(self._shelves, key=lambda name: len(self._shelves[name].responses)))
        while self.num_bytes > self._max_bytes:
            self._drop_oldest(max(self._shelves, key=lambda name: self._shelves[name].num_bytes))

    def get(self, response_id: str, *, tenant: str) -> StoredResponse | None:
        """A response of this tenant's, which is the last to be dropped from now on."""
        shelf = self._shelves.get(tenant)
        if shelf is None or response_id not in shelf.responses:
            return None
        shelf.responses.move_to_end(response_id)
        return shelf.responses[response_id]

    def output_item(self, item_id: str, *, tenant: str) -> bytes | None:
        """An item that one of this tenant's responses gave."""
        shelf = self._shelves.get(tenant)
        if shelf is None or item_id not in shelf.responses_of_items:
            return None
        response = self.get(shelf.responses_of_items[item_id], tenant=tenant)
        return None if response is None else response.output[item_id]

    def delete(self, response_id: str, *, tenant: str) -> bool:
        """Forget a response; False where this tenant has none of that id. Later ones of its conversation stay whole."""
        shelf = self._shelves.get(tenant)
        if shelf is None or response_id not in shelf.responses:
            return False
        self._drop(response_id, tenant=tenant)
        return True

    def _drop_oldest(self, tenant: str) -> None:
        self._drop(next(iter(self._shelves[tenant].responses)), tenant=tenant)

    def _drop(self, response_id: str, *, tenant: str) -> None:
        shelf = self._shelves[tenant]
        response = shelf.responses.pop(response_id)
        for item_id in response.output:
            del shelf.responses_of_items[item_id]
        shelf.num_bytes -= response.num_bytes
        if not shelf.responses:
            del self._shelves[tenant]
