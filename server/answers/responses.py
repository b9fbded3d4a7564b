"""The `Response` of `POST /v1/responses`, and the stream of events that it grows in; both of the same items."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from engine.types import FinishReason, GenerationRequest
from server.answers.answer import Answer, finite
from server.answers.response_items import ItemEvent, OutputItems, PlacedLogprob
from server.errors import ApiError
from server.generation import Update
from server.response_store import StoredResponse
from server.responses_input import ResponsePlan
from server.schemas.responses import (
    CachedTokens,
    IncompleteDetails,
    MessageItem,
    OutputItem,
    Response,
    ResponseError,
    ResponseTool,
    ResponseUsage,
    Status,
    TokenLogprob,
    TopLogprob,
)
from server.services import Services
from server.streaming import event
from server.tools import ToolCallReader


class ResponseAnswer(Answer):
    """One response. When it is over, and is to be kept, it goes to the store before anybody hears of its end."""

    id_prefix = "resp_"

    def __init__(self, plan: ResponsePlan, requests: Sequence[GenerationRequest], *, services: Services, request_id: str) -> None:
        super().__init__(plan, requests, services=services, request_id=request_id)
        self._plan = plan
        self._store = services.responses
        self._output = OutputItems(ToolCallReader.of(plan.conversation), id_suffix=request_id)
        self._is_cut = False
        self._num_events = 0

    async def body(self) -> bytes:
        """Run everything to its end and give the whole answer as JSON."""
        (updates,) = await self._collect()
        for update in updates:
            self._events_of(update)
        response = self._ended()
        content = await asyncio.to_thread(msgspec.json.encode, response) if self.plan.logprobs else msgspec.json.encode(response)
        self._keep(content)
        return content

    def opening(self) -> list[bytes]:
        """The response without any output, twice, as OpenAI has it."""
        begun = self._response("in_progress")
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def events(self, updates: Iterable[Update]) -> list[bytes]:
        """What is new in the items."""
        arrived = list(updates)
        self.chunks_of(arrived)
        return [self._event(kind, **fields) for update in arrived for kind, fields in self._events_of(update)]

    def closing(self) -> list[bytes]:
        """The whole response. There is no `[DONE]` in this protocol."""
        response = self._ended()
        content = msgspec.json.encode(response)
        self._keep(content)
        return [self._event(f"response.{response.status}", response=msgspec.Raw(content))]

    def failure(self, error: ApiError) -> list[bytes]:
        """The error by itself, and the response that ends in it."""
        reason = ResponseError(code="invalid_prompt" if error.status < 500 else "server_error", message=error.message)
        failed = self._response("failed", error=reason, output=self._output.items)
        return [
            self._event("error", code=error.code, message=error.message, param=error.param),
            self._event("response.failed", response=failed),
        ]

    def _events_of(self, update: Update) -> list[ItemEvent]:
        events = self._output.push(update.chunk.text, self._logprobs(update))
        if update.chunk.finish_reason is not None:
            self._is_cut = update.chunk.finish_reason is FinishReason.LENGTH
            events += self._output.finish(is_cut=self._is_cut)
        return events

    def _ended(self) -> Response:
        return self._response(
            "incomplete" if self._is_cut else "completed",
            completed_at=None if self._is_cut else int(time.time()),
            incomplete_details=IncompleteDetails() if self._is_cut else None,
            output=self._output.items,
            usage=self._response_usage(),
        )

    def _response(self, status: Status, *, output: Sequence[OutputItem] = (), **ended: Any) -> Response:
        body = self._plan.request
        return Response(
            id=self.id,
            created_at=self.created,
            status=status,
            model=self.model_name,
            output=list(output),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata,
            parallel_tool_calls=body.parallel_tool_calls,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            reasoning={"effort": None, "summary": None},
            safety_identifier=body.safety_identifier,
            store=body.store,
            temperature=body.temperature,
            text=_text_config(self._plan),
            tool_choice=_tool_choice(self._plan),
            tools=[_tool(tool) for tool in body.tools],
            top_logprobs=body.top_logprobs or 0,
            top_p=body.top_p,
            truncation=body.truncation,
            user=body.user,
            **ended,
        )

    def _response_usage(self) -> ResponseUsage:
        usage = self.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=CachedTokens(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )

    def _keep(self, content: bytes) -> None:
        if not self._plan.request.store:
            return
        previous = self._plan.previous
        response = StoredResponse(
            id=self.id,
            body=content,
            input=(*previous, *map(msgspec.json.encode, self._plan.items[len(previous) :])),
            output={item.id: msgspec.json.encode(_without_logprobs(item)) for item in self._output.items},
        )
        self._store.put(response, tenant=self._plan.owner)

    def _logprobs(self, update: Update) -> Iterator[PlacedLogprob]:
        if self.plan.logprobs is None:
            return
        for named, scored in zip(update.chunk.logprobs, update.delta.logprobs, strict=False):
            top = list(zip(named.top, scored.top, strict=True))[: self.plan.logprobs]
            entry = TokenLogprob(
                token=named.token,
                bytes=list(named.bytes),
                logprob=finite(scored.logprob),
                top_logprobs=[
                    TopLogprob(token=name, bytes=self._bytes(token_id), logprob=finite(logprob)) for (name, _), (token_id, logprob) in top
                ],
            )
            yield PlacedLogprob(named.text_offset, entry)

    def _bytes(self, token_id: int) -> list[int]:
        return list(self.tokenizer.token_bytes(token_id)) if self.tokenizer else []

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = msgspec.json.encode({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return event(content, name=kind)


def _text_config(plan: ResponsePlan) -> dict[str, Any]:
    chosen = plan.request.text.format
    if chosen is None or chosen.type != "json_schema":
        return {"format": {"type": "text" if chosen is None else chosen.type}}
    described = {"name": chosen.name, "schema": chosen.schema_, "strict": chosen.strict, "description": chosen.description}
    return {"format": {"type": chosen.type, **described}}


def _tool_choice(plan: ResponsePlan) -> str | dict[str, Any]:
    choice = plan.request.tool_choice
    match choice.type:
        case "function":
            return {"type": "function", "name": choice.name}
        case "allowed_tools":
            return {
                "type": "allowed_tools",
                "mode": choice.mode,
                "tools": [{"type": "function", "name": tool.name} for tool in choice.tools],
            }
        case simple:
            return simple


def _tool(tool: ResponseTool) -> dict[str, Any]:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": tool.type, **described}


def _without_logprobs(item: OutputItem) -> OutputItem:
    """What goes on in the conversation is the text alone."""
    if not isinstance(item, MessageItem):
        return item
    return msgspec.structs.replace(item, content=[msgspec.structs.replace(part, logprobs=[]) for part in item.content])
