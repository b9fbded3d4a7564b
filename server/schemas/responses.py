"""The wire types of `POST /v1/responses`: the request, the items of a conversation, and the `Response` that is answered, kept and told of.

Items come in as one flat `InputItem`, because clients leave out what they can; `server/responses_input.py` makes of them the `Item`s that
are kept, listed and answered. The events of a stream are made of these same objects in `server/answers/responses.py`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import msgspec
from pydantic import BeforeValidator, FailFast, Field, Strict, WithJsonSchema

from server.schemas.common import SamplingFields, WireModel
from server.schemas.structured import GUIDED_FIELDS, Schema, TextFormat

MAX_METADATA_PAIRS, MAX_METADATA_KEY_CHARS, MAX_METADATA_VALUE_CHARS = 16, 64, 512  # OpenAI's bounds
LOGPROBS_INCLUDED = "message.output_text.logprobs"

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ContentPart(WireModel):
    """One part of a message or of a tool's result; only text is understood here."""

    type: str
    text: str | None = None


def _parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else cast("list[Any]", value)


def _items(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else cast("list[Any]", value)


def _choice(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


_PARTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {"type": "object", "properties": {"type": {"type": "string"}, "text": {"type": "string"}}, "required": ["type"]},
        },
    ]
}

Parts = Annotated[tuple[ContentPart, ...], Strict(False), BeforeValidator(_parts), WithJsonSchema(_PARTS_SCHEMA)]


class InputItem(WireModel):
    """An item as clients send it. What kind it is says `type`, or else what it has; which fields belong to which kind is checked later."""

    type: str | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Parts | None = None


class ResponseTool(WireModel):
    """A tool; only those of type function can be had."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Schema | None = None
    strict: bool = False


class ResponseToolChoice(WireModel):
    """`none`, `auto` and `required` are here as types, too. `tools` and `mode` belong to `allowed_tools`."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[tuple[ResponseTool, ...], Strict(False), FailFast()] = ()


class TextOptions(WireModel):
    """What the text must look like. How wordy it should be is the model's own affair."""

    format: TextFormat | None = None
    verbosity: Any = None


_ITEM_SCHEMA = InputItem.model_json_schema()
_CHOICE_SCHEMA = {
    "anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}]
}

InputItems = Annotated[
    tuple[InputItem, ...],
    Strict(False),
    FailFast(),
    BeforeValidator(_items),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM_SCHEMA}]}),
]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=MAX_METADATA_KEY_CHARS)],
        Annotated[str, Field(max_length=MAX_METADATA_VALUE_CHARS)],
    ],
    Field(max_length=MAX_METADATA_PAIRS),
]


class ResponsesRequest(SamplingFields):
    """A body of `POST /v1/responses`. `input` is always items here; a string is one message of the user."""

    refused_fields: ClassVar[Mapping[str, str]] = {
        **SamplingFields.refused_fields,
        "background": "every response is made while its client waits; stream it",
        "conversation": "there are no conversation objects; use previous_response_id",
        "prompt": "there are no prompt templates; send input and instructions",
        "context_management": "nothing is compacted; use truncation: auto",
        "moderation": "there is no moderation model here",
        "response_format": "use text.format",
        "structured_outputs": "use text.format",
        "messages": "use input",
        "max_tokens": "use max_output_tokens",
        "max_completion_tokens": "use max_output_tokens",
        "stop_sequences": "use stop",
        "system": "use instructions",
        "logprobs": "use include and top_logprobs",
        **dict.fromkeys(GUIDED_FIELDS, "use text.format"),
    }

    input: InputItems = ()
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: Annotated[tuple[ResponseTool, ...], Strict(False), FailFast()] = ()
    tool_choice: Annotated[ResponseToolChoice, BeforeValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)] = ResponseToolChoice(type="auto")
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    include: Annotated[tuple[str, ...], Strict(False), FailFast()] = ()
    top_logprobs: int | None = Field(None, ge=0)
    truncation: Literal["auto", "disabled"] = "disabled"
    store: bool = True
    metadata: Metadata = Field(default_factory=dict)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    reasoning: Any = None
    max_tool_calls: Any = None  # of tools that run on a server; here none does


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token of the text, and the likeliest in its place."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class InputText(msgspec.Struct, frozen=True, kw_only=True, tag="input_text", tag_field="type"):
    text: str


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag="output_text", tag_field="type"):
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class MessageItem(msgspec.Struct, frozen=True, kw_only=True, tag="message", tag_field="type"):
    id: str
    status: Status
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText]


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True, tag="function_call", tag_field="type"):
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(msgspec.Struct, frozen=True, kw_only=True, tag="function_call_output", tag_field="type"):
    id: str
    status: Status
    call_id: str
    output: str


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem
OutputItem = MessageItem | FunctionCallItem


class CachedTokens(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0  # nobody is billed for them


class ReasoningTokens(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, as it is kept, and in the events that begin and end a stream."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    background: bool = False
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, None]
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of `GET /v1/responses/{id}/input_items`; the ids are empty where it is."""

    object: str = "list"
    data: list[msgspec.Raw]
    first_id: str
    last_id: str
    has_more: bool


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "response"
    deleted: bool = True
