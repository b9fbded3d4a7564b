"""How many sequences may be open, and when to say no. Asked once per request, before any tokenising; answers at once.

The unit is the sequence: a request for 4 prompts with 8 choices each counts 32. As many are let in as the engine runs at once, plus a
bounded queue. A permit is a context manager: leaving it, by whatever door, gives its sequences back.

While an engine is replaced, requests are let in as ever, and wait in the engine client's journal: what that can hold is bounded here.
Readiness is another question than being open: it fails during a restart, and first of all at the end, so that load balancers look
elsewhere before anybody is refused.
"""

from collections.abc import Generator
from contextlib import contextmanager

from engine.client import EngineClient
from engine.types import EngineInfo
from server.errors import InvalidRequest, Unavailable
from server.limits import Limits


class Admission:
    """Owns the count of open sequences and the two steps to the end. Lives on the event loop; not for threads."""

    def __init__(self, client: EngineClient, *, limits: Limits) -> None:
        self._client = client
        self._limits = limits
        self.num_open = 0
        self.is_retiring = False
        self.is_draining = False

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
    def permit(self, num_sequences: int) -> Generator[None, None, None]:
        """Hold room for `num_sequences`.

        Raises `Unavailable` where there is none now, `InvalidRequest` where there never is.
        """
        capacity = self.check_open().max_num_seqs + self._limits.max_queued_sequences
        if num_sequences > capacity:
            raise InvalidRequest(
                f"the request asks for {num_sequences:,} sequences, this server holds {capacity:,}; send fewer prompts or choices"
            )
        if self.num_open + num_sequences > capacity:
            raise self._full(f"{self.num_open:,} of {capacity:,} sequences are open")
        self.num_open += num_sequences
        try:
            yield
        finally:
            self.num_open -= num_sequences

    def _full(self, what: str) -> Unavailable:
        """The queue's bound is reached; `what` says which, with its numbers."""
        if self._client.is_ready:
            return self._not_now(f"the server is full: {what}", "server_overloaded")
        return self._not_now(f"the engine is being restarted and nothing more can wait for it: {what}", "engine_restarting")

    def _not_now(self, message: str, code: str) -> Unavailable:
        return Unavailable(message, code=code, retry_after_s=self._limits.retry_after_s)
