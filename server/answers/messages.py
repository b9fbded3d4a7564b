"""Anthropic's `Message`, whole or as the events that build it; both of the same content blocks."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from engine.output import GenerationChunk
from engine.types import FinishReason, GenerationRequest
from server.answers.answer import Answer
from server.anthropic_errors import anthropic_error_body
from server.errors import ApiError
from server.generation import Update
from server.messages_input import MessagePlan
from server.schemas.messages import ContentBlock, Message, MessageUsage, TextBlock, ToolUseBlock
from server.services import Services
from server.streaming import event
from server.tools import ArgumentsPart, CallPart, Part, TextPart, ToolCallReader

_object = TypeAdapter(dict[str, Any])


class MessageAnswer(Answer):
    """One message. At any time at most one block is open; its pieces are joined when it is over."""

    id_prefix = "msg_"

    def __init__(self, plan: MessagePlan, requests: Sequence[GenerationRequest], *, services: Services, request_id: str) -> None:
        super().__init__(plan, requests, services=services, request_id=request_id)
        self._plan = plan
        self._request_id = request_id
        self._reader = ToolCallReader.of(plan.conversation, "toolu_")
        self._blocks: list[ContentBlock] = []
        self._open: ContentBlock | None = None
        self._pieces: list[str] = []  # of the open block: its text, or the JSON of its input
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    async def body(self) -> bytes:
        """Run everything to its end and give the whole answer as JSON."""
        (updates,) = await self._collect()
        for update in updates:
            self._take(update.chunk)
        return msgspec.json.encode(self._message())

    def opening(self) -> list[bytes]:
        """The message without any content; how much of the prompt was cached is told at the end."""
        return [_event("message_start", message=self._message()), _event("ping")]

    def events(self, updates: Iterable[Update]) -> list[bytes]:
        """What is new in the blocks."""
        arrived = list(updates)
        self.chunks_of(arrived)
        return [new for update in arrived for new in self._take(update.chunk)]

    def closing(self) -> list[bytes]:
        """Why it ended, and what it used."""
        ended = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return [_event("message_delta", delta=ended, usage=self._message_usage()), _event("message_stop")]

    def failure(self, error: ApiError) -> list[bytes]:
        """An error, in the shape that it has as an answer."""
        body = anthropic_error_body(status=error.status, message=error.message, request_id=self._request_id)
        return [event(msgspec.json.encode(body), name="error")]

    def _take(self, chunk: GenerationChunk) -> list[bytes]:
        events = self._grow(self._reader.push(chunk.text))
        if chunk.finish_reason is not None:
            events += self._grow(self._reader.flush()) + self._close()
            self._stop_reason = self._why(chunk)
            self._stop_sequence = chunk.stop_reason if isinstance(chunk.stop_reason, str) else None
        return events

    def _grow(self, parts: Iterable[Part]) -> list[bytes]:
        events: list[bytes] = []
        for part in parts:
            match part:
                case TextPart(text=text):
                    if not isinstance(self._open, TextBlock):
                        events += self._close() + self._begin(TextBlock(text=""))
                    events.append(self._delta("text_delta", text=text))
                    self._pieces.append(text)
                case CallPart():
                    events += self._close() + self._begin(ToolUseBlock(id=part.id, name=part.name, input={}))
                case ArgumentsPart(text=text):
                    events.append(self._delta("input_json_delta", partial_json=text))
                    self._pieces.append(text)
        return events

    def _begin(self, block: ContentBlock) -> list[bytes]:
        self._open = block
        return [_event("content_block_start", index=len(self._blocks), content_block=block)]

    def _delta(self, kind: str, **fields: str) -> bytes:
        return _event("content_block_delta", index=len(self._blocks), delta={"type": kind, **fields})

    def _close(self) -> list[bytes]:
        """End the open block, if any."""
        match self._open:
            case None:
                return []
            case TextBlock():
                block = msgspec.structs.replace(self._open, text="".join(self._pieces))
            case ToolUseBlock():
                block = msgspec.structs.replace(self._open, input=_input_of("".join(self._pieces)))
        stopped = _event("content_block_stop", index=len(self._blocks))
        self._blocks.append(block)
        self._open = None
        self._pieces = []
        return [stopped]

    def _why(self, last: GenerationChunk) -> str:
        if last.finish_reason is FinishReason.LENGTH:
            is_all = self.usage().completion_tokens >= self._plan.max_message_tokens
            return "max_tokens" if is_all else "model_context_window_exceeded"
        if isinstance(last.stop_reason, str):
            return "stop_sequence"
        return "tool_use" if self._reader.num_calls else "end_turn"

    def _message(self) -> Message:
        return Message(
            id=self.id,
            model=self.model_name,
            content=self._blocks,
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=self._message_usage(),
        )

    def _message_usage(self) -> MessageUsage:
        usage = self.usage()
        num_cached = usage.prompt_tokens_details.cached_tokens
        return MessageUsage(
            input_tokens=usage.prompt_tokens - num_cached, cache_read_input_tokens=num_cached, output_tokens=usage.completion_tokens
        )


def _event(kind: str, **fields: Any) -> bytes:
    return event(msgspec.json.encode({"type": kind, **fields}), name=kind)


def _input_of(arguments: str) -> dict[str, Any]:
    """Arguments as an object; of those that were cut short, what is there."""
    try:
        return _object.validate_json(arguments, experimental_allow_partial="trailing-strings")
    except ValidationError:
        return {}
