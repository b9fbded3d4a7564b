"""The wire types of `POST /v1/chat/completions`: the request, the whole answer, and the chunks of a streamed one.

What the request's parts mean together (turns, tools, limits) is `server/chat_plan.py`'s.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

import msgspec
from pydantic import BeforeValidator, FailFast, Field, PlainValidator, Strict, WithJsonSchema, model_validator

from server.schemas.common import SamplingFields, Usage, WireModel
from server.schemas.structured import Schema, StructuredFields

_PART_FIELDS = {"text": "text", "refusal": "refusal"}  # of the kinds of parts that hold text


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("must be a list")
    return cast("list[Any]", value)


def _content(value: Any) -> str:
    """Text, given whole or in parts. Parts of text are lines of one text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, or a list of parts of type text")
    return "\n".join(map(_text_of_part, cast("list[Any]", value)))


def _text_of_part(part: Any) -> str:
    fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
    kind = fields.get("type")
    if not isinstance(kind, str):
        raise ValueError("each part must be an object with a type")
    if kind not in _PART_FIELDS:
        raise ValueError(f"parts of type {kind[:32]} are not supported: the model reads text alone")
    text = fields.get(_PART_FIELDS[kind])
    if not isinstance(text, str):
        raise ValueError(f"a part of type {kind} must have a string {_PART_FIELDS[kind]}")
    return text


def _tool_choice(value: Any) -> str | dict[str, Any]:
    if not isinstance(value, str | dict):
        raise ValueError("must be none, auto, required, or an object that names a tool")
    return cast("str | dict[str, Any]", value)


def _variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return cast("dict[str, Any]", value)


Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], Strict(False), FailFast(), BeforeValidator(_list)]  # one complaint, however many are wrong

_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
Content = Annotated[str, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
WireToolChoice = Annotated[
    str | dict[str, Any],
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}),
]
Variables = Annotated[dict[str, Any], PlainValidator(_variables), WithJsonSchema({"type": "object"})]


class WireFunctionCall(WireModel):
    """The function of a call."""

    name: str
    arguments: str


class WireToolCall(WireModel):
    """A call that the assistant made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: WireFunctionCall


class WireFunction(WireModel):
    """What a tool is called and takes."""

    name: str
    description: str | None = None
    parameters: Schema | None = None
    strict: bool = False


class WireTool(WireModel):
    """A tool: a function. OpenAI's other kinds are not offered."""

    type: Literal["function"]
    function: WireFunction


class Message(WireModel):
    """One turn. `content` is one text here, whatever form it came in; None where it was null or left out."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Several[WireToolCall] = ()
    tool_call_id: str | None = None
    refusal: str | None = None
    function_call: Any = None
    audio: Any = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.function_call is not None:
            raise ValueError("function_call is not supported: use tool_calls")
        if self.audio is not None:
            raise ValueError("audio is not supported: the model reads text alone")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the assistant, not to a message of role {self.role}")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role tool needs the tool_call_id that it answers")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal is not None)):
            raise ValueError(f"a message of role {self.role} needs content")
        return self


class ConversationFields(WireModel):
    """What makes the prompt of a conversation's next turn."""

    messages: Several[Message]
    tools: Several[WireTool] = ()
    tool_choice: WireToolChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Variables = Field(default_factory=dict)


class ChatRequest(ConversationFields, SamplingFields, StructuredFields):
    """A body of `POST /v1/chat/completions`."""

    not_an_object: ClassVar[str] = "the body must be a JSON object"
    refused_fields: ClassVar[Mapping[str, str]] = {
        **SamplingFields.refused_fields,
        "functions": "it is deprecated; use tools",
        "function_call": "it is deprecated; use tool_choice",
        "audio": "the model speaks no audio",
        "web_search_options": "the server opens no connections",
        "documents": "put what they say into the messages",
        "chat_template": "the template is the server's; its operator sets it with --chat-template",
        "echo": "ask /v1/completions for it",
        "best_of": "use n",
        "prompt_logprobs": "ask /v1/completions for them",
        "prompt": "use messages, or ask /v1/completions",
        "input": "use messages, or ask /v1/responses",
        "system": "use a message of role system",
        "max_output_tokens": "use max_completion_tokens",
        "stop_sequences": "use stop",
    }

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # the newer name
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    modalities: Several[Literal["text"]] = ("text",)


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """The function of a call; in a stream its name comes first, and then more and more of the arguments."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str


class ToolCallMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole call."""

    id: str
    type: str = "function"
    function: FunctionCall


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a call; `id` and `type` come with the first."""

    index: int
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET
    function: FunctionCall


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the assistant said. `content` is null where it only made calls."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallMessage] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new. The first of a choice has the role and empty content."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    refusal: msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate for a token; `bytes` are those it contributes to the text, null for a token that is no text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """One token of the answer. It need not be among the top ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """One entry per token of the answer, those of tool calls included; the token that ends the turn is not part of it."""

    content: list[TokenLogprobs]
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One whole choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer. `prompt_token_ids` is there where it was asked for."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk of a stream. `usage` is left out unless the client asked for it, and then null in all but the last."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
