"""The output items that one generation becomes, and the events that tell of them as it grows.

Text is a message, each tool call an item of its own. At any time at most one item is open: it is added, grows, and is done before the next
begins. `server/answers/responses.py` numbers the events and puts them between those of the response as a whole; a whole answer takes the
items alone.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from server.schemas.responses import FunctionCallItem, MessageItem, OutputItem, OutputText, Status, TokenLogprob
from server.tools import ArgumentsPart, CallPart, Part, TextPart, ToolCallReader


class ItemEvent(NamedTuple):
    """The `type` of an event, and its fields but for the sequence number."""

    type: str
    fields: dict[str, Any]


class PlacedLogprob(NamedTuple):
    """A token's log-probabilities, and where in the generated text its own text begins."""

    text_offset: int
    entry: TokenLogprob


class OutputItems:
    """Made of what `push` is given, piece by piece; after `finish` they are complete, and there is at least one."""

    def __init__(self, reader: ToolCallReader, *, id_suffix: str) -> None:
        """Ids are a prefix for the kind, `id_suffix` and the item's place."""
        self._reader = reader
        self._id_suffix = id_suffix
        self._done: list[OutputItem] = []
        self._open: MessageItem | FunctionCallItem | None = None
        self._pieces: list[str] = []  # of the open item: its text, or its arguments
        self._logprobs: list[TokenLogprob] = []  # of the open message
        self._unplaced: deque[PlacedLogprob] = deque()  # of text that is still held back, or belongs to a call
        self._num_leading_spaces = 0  # characters that the reader drops
        self._is_leading = True
        self._num_shown = 0  # characters of the first message

    @property
    def items(self) -> list[OutputItem]:
        """Those that are done."""
        return self._done

    def push(self, text: str, logprobs: Iterable[PlacedLogprob] = ()) -> list[ItemEvent]:
        """Take more of the generated text, with the log-probabilities that came along."""
        self._unplaced.extend(logprobs)
        self._count_leading_spaces(text)
        return self._take(self._reader.push(text))

    def finish(self, *, is_cut: bool) -> list[ItemEvent]:
        """Take the end. `is_cut` says that the generation was not over: the last item is incomplete then, and so is half a call."""
        events = self._take(self._reader.flush())
        if self._open is None and not self._done:
            events += self._begin_message()
        return events + self._close("incomplete" if is_cut or self._reader.is_in_arguments else "completed")

    def _take(self, parts: Iterable[Part]) -> list[ItemEvent]:
        events: list[ItemEvent] = []
        for part in parts:
            match part:
                case TextPart(text=text):
                    if not isinstance(self._open, MessageItem):
                        events += self._close() + self._begin_message()
                    events.append(self._grow_message(text))
                case CallPart():
                    events += self._close() + self._begin_call(part)
                case ArgumentsPart(text=text):
                    self._pieces.append(text)
                    events.append(self._event("response.function_call_arguments.delta", delta=text))
        return events

    def _begin_message(self) -> list[ItemEvent]:
        self._open = MessageItem(id=self._new_id("msg"), status="in_progress", role="assistant", content=[])
        return [
            self._item_event("added", self._open),
            self._event("response.content_part.added", content_index=0, part=OutputText(text="")),
        ]

    def _grow_message(self, text: str) -> ItemEvent:
        self._pieces.append(text)
        logprobs = self._placed(len(text))
        self._logprobs += logprobs
        return self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _begin_call(self, part: CallPart) -> list[ItemEvent]:
        self._open = FunctionCallItem(id=self._new_id("fc"), status="in_progress", call_id=part.id, name=part.name, arguments="")
        return [self._item_event("added", self._open)]

    def _close(self, status: Status = "completed") -> list[ItemEvent]:
        """End the open item, if any."""
        text = "".join(self._pieces)
        match self._open:
            case None:
                return []
            case MessageItem():
                part = OutputText(text=text, logprobs=self._logprobs)
                item = msgspec.structs.replace(self._open, status=status, content=[part])
                events = [
                    self._event("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs),
                    self._event("response.content_part.done", content_index=0, part=part),
                ]
            case FunctionCallItem():
                item = msgspec.structs.replace(self._open, status=status, arguments=text)
                events = [self._event("response.function_call_arguments.done", name=item.name, arguments=text)]
        events.append(self._item_event("done", item))
        self._done.append(item)
        self._open = None
        self._pieces, self._logprobs = [], []
        return events

    def _placed(self, num_chars: int) -> list[TokenLogprob]:
        """The log-probabilities of the tokens that begin in the next characters of the first message; a later one has none."""
        if self._done:
            return []
        self._num_shown += num_chars
        placed: list[TokenLogprob] = []
        while self._unplaced and self._unplaced[0].text_offset < self._num_leading_spaces + self._num_shown:
            placed.append(self._unplaced.popleft().entry)
        return placed

    def _count_leading_spaces(self, text: str) -> None:
        if self._is_leading:
            rest = text.lstrip()
            self._num_leading_spaces += len(text) - len(rest)
            self._is_leading = not rest

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id_suffix}_{len(self._done)}"

    def _event(self, kind: str, **fields: Any) -> ItemEvent:
        assert self._open is not None, "events are of the open item"
        return ItemEvent(kind, {"item_id": self._open.id, "output_index": len(self._done)} | fields)

    def _item_event(self, what: str, item: OutputItem) -> ItemEvent:
        return ItemEvent(f"response.output_item.{what}", {"output_index": len(self._done), "item": item})
