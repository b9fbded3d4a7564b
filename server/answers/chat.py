"""The objects of `POST /v1/chat/completions`: messages, deltas, tool calls, log-probabilities with bytes."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from engine.output import GenerationChunk
from engine.types import FinishReason, GenerationRequest
from server.answers.answer import FINISH_REASONS, AnswerOfChoices, finite
from server.chat_plan import ConversationPlan
from server.generation import Update
from server.schemas.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    Delta,
    FunctionCall,
    TokenLogprobs,
    ToolCallDelta,
    ToolCallMessage,
    TopLogprob,
)
from server.schemas.common import Usage
from server.services import Services
from server.streaming import event
from server.tools import ArgumentsPart, CallPart, Part, TextPart, ToolCallReader


class ChatAnswer(AnswerOfChoices):
    """One `chat.completion`, or its chunks."""

    id_prefix = "chatcmpl-"

    def __init__(self, plan: ConversationPlan, requests: Sequence[GenerationRequest], *, services: Services, request_id: str) -> None:
        super().__init__(plan, requests, services=services, request_id=request_id)
        self._readers = [ToolCallReader.of(plan.conversation, is_text_given_form=plan.grammar is not None) for _ in requests]
        self._turn_ends = {services.model.eos_token, *(services.chat_template.end_of_turn_ids if services.chat_template else ())}

    def whole(self, updates: list[list[Update]]) -> ChatCompletion:
        """The answer to everything that arrived, by sequence."""
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model_name,
            system_fingerprint=self.fingerprint,
            choices=[self._choice(index, of_one) for index, of_one in enumerate(updates)],
            usage=self.usage(),
            prompt_token_ids=self._prompt_ids(),
        )

    def opening(self) -> list[bytes]:
        """Each choice begins with its role."""
        first = Delta(role="assistant", content="", refusal=None)
        return [
            self._event([ChatChunkChoice(index=index, delta=first)], prompt_token_ids=self._prompt_ids() if index == 0 else msgspec.UNSET)
            for index in range(self.num_sequences)
        ]

    def events(self, updates: Iterable[Update]) -> list[bytes]:
        """At most one piece per choice; pieces that would say nothing are left out."""
        arrived = list(updates)
        pieces = [
            self._piece(index, chunks, [update for update in arrived if update.sequence == index])
            for index, chunks in self.chunks_of(arrived).items()
        ]
        return [self._event([piece]) for piece in pieces if _says_something(piece)]

    def closing(self) -> list[bytes]:
        """Where usage was asked for, every chunk has the field, null in all but this last."""
        return [self._event([], usage=self.usage()), *super().closing()] if self.plan.include_usage else super().closing()

    def _choice(self, index: int, updates: list[Update]) -> ChatChoice:
        last = updates[-1].chunk
        text, calls = _message_of(self._parts(index, [update.chunk for update in updates]))
        finish_reason = self._finish_reason(index, last)
        assert finish_reason is not None, "a whole answer has ended"
        return ChatChoice(
            index=index,
            message=ChatMessage(content=text if text or not calls else None, tool_calls=calls or msgspec.UNSET),
            logprobs=self._logprobs(updates),
            finish_reason=finish_reason,
            stop_reason=self._stop_reason(last),
            token_ids=self._token_ids([update.chunk for update in updates]),
        )

    def _piece(self, index: int, chunks: list[GenerationChunk], updates: list[Update]) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=index,
            delta=_delta(self._parts(index, chunks)),
            logprobs=self._logprobs(updates),
            finish_reason=self._finish_reason(index, chunks[-1]),
            stop_reason=self._stop_reason(chunks[-1]),
            token_ids=self._token_ids(chunks),
        )

    def _parts(self, index: int, chunks: list[GenerationChunk]) -> list[Part]:
        reader = self._readers[index]
        parts = reader.push("".join([chunk.text for chunk in chunks]))
        return parts if chunks[-1].finish_reason is None else parts + reader.flush()

    def _finish_reason(self, index: int, last: GenerationChunk) -> str | None:
        """Calls were made where a generation stopped behind one; one that was cut short has its length, or a stop string, to blame."""
        if last.finish_reason is None:
            return None
        reader = self._readers[index]
        has_called = last.finish_reason is FinishReason.STOP and reader.num_calls and not reader.is_in_arguments
        return "tool_calls" if has_called else FINISH_REASONS[last.finish_reason]

    def _stop_reason(self, last: GenerationChunk) -> str | int | None:
        """What the client named as an end; the end of the turn is none."""
        return None if last.stop_reason in self._turn_ends else last.stop_reason

    def _logprobs(self, updates: list[Update]) -> ChatLogprobs | None:
        """None where none were asked for, or a piece of a stream has none."""
        if self.plan.logprobs is None:
            return None
        content = [entry for update in updates for entry in self._entries(update)]
        return ChatLogprobs(content=content) if content or not self.plan.stream else None

    def _entries(self, update: Update) -> Iterator[TokenLogprobs]:
        chunk = update.chunk
        ends_turn = chunk.finish_reason is FinishReason.STOP and chunk.token_ids and chunk.token_ids[-1] in self._turn_ends
        num_shown = len(chunk.logprobs) - bool(ends_turn)
        for named, scored in zip(chunk.logprobs[:num_shown], update.delta.logprobs, strict=False):
            yield TokenLogprobs(
                token=named.token,
                logprob=finite(scored.logprob),
                bytes=self._bytes(scored.token_id),
                top_logprobs=[
                    TopLogprob(token=name, logprob=finite(logprob), bytes=self._bytes(token_id))
                    for (name, _), (token_id, logprob) in zip(named.top, scored.top, strict=True)
                ][: self.plan.logprobs],
            )

    def _bytes(self, token_id: int) -> list[int] | None:
        spelled = self.tokenizer.token_bytes(token_id) if self.tokenizer else b""
        return list(spelled) or None

    def _token_ids(self, chunks: list[GenerationChunk]) -> list[int] | msgspec.UnsetType:
        return [token for chunk in chunks for token in chunk.token_ids] if self.plan.returns_token_ids else msgspec.UNSET

    def _prompt_ids(self) -> list[int] | msgspec.UnsetType:
        return list(self.requests[0].prompt_token_ids) if self.plan.returns_token_ids else msgspec.UNSET

    def _event(
        self, choices: list[ChatChunkChoice], *, usage: Usage | None = None, prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    ) -> bytes:
        chunk = ChatCompletionChunk(
            id=self.id,
            created=self.created,
            model=self.model_name,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=usage if self.plan.include_usage else msgspec.UNSET,
            prompt_token_ids=prompt_token_ids,
        )
        return event(msgspec.json.encode(chunk))


def _message_of(parts: list[Part]) -> tuple[str, list[ToolCallMessage]]:
    """(text, calls) of a whole answer."""
    text = "".join([part.text for part in parts if isinstance(part, TextPart)])
    begun = [part for part in parts if isinstance(part, CallPart)]
    arguments = ["" for _ in begun]
    for part in parts:
        if isinstance(part, ArgumentsPart):
            arguments[part.index] += part.text
    return text, [ToolCallMessage(id=call.id, function=FunctionCall(name=call.name, arguments=arguments[call.index])) for call in begun]


def _delta(parts: list[Part]) -> Delta:
    """What is new of a choice. Clients expect each call at most once in a chunk, so its pieces are joined."""
    text = "".join([part.text for part in parts if isinstance(part, TextPart)])
    calls: dict[int, ToolCallDelta] = {}
    for part in parts:
        match part:
            case CallPart():
                function = FunctionCall(name=part.name, arguments="")
                calls[part.index] = ToolCallDelta(index=part.index, id=part.id, type="function", function=function)
            case ArgumentsPart():
                call = calls.get(part.index) or ToolCallDelta(index=part.index, function=FunctionCall(arguments=""))
                function = msgspec.structs.replace(call.function, arguments=call.function.arguments + part.text)
                calls[part.index] = msgspec.structs.replace(call, function=function)
            case TextPart():
                pass
    return Delta(content=text or msgspec.UNSET, tool_calls=list(calls.values()) or msgspec.UNSET)


def _says_something(piece: ChatChunkChoice) -> bool:
    return bool(
        piece.delta.content or piece.delta.tool_calls or piece.logprobs is not None or piece.finish_reason is not None or piece.token_ids
    )
