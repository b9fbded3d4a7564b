"""The wire types of Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`: requests, the `Message`, its content blocks.

Blocks come in as one flat `InputBlock`; which fields belong to which kind, and what all of it means, is `server/messages_input.py`'s. The
events of a stream are made in `server/answers/messages.py` of the objects below.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import msgspec
from pydantic import BeforeValidator, FailFast, Field, Strict, WithJsonSchema

from server.schemas.common import SamplingFields, StopStrings, WireModel
from server.schemas.structured import GUIDED_FIELDS, Schema


def _blocks(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of blocks")
    return [{"type": "text", "text": value}] if isinstance(value, str) else cast("list[Any]", value)


_BLOCK_SCHEMA = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
_BLOCKS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK_SCHEMA}]}


class ResultBlock(WireModel):
    """A block of a tool's result, or of the system prompt; only text is understood here."""

    type: str
    text: str | None = None


ResultBlocks = Annotated[tuple[ResultBlock, ...], Strict(False), BeforeValidator(_blocks), WithJsonSchema(_BLOCKS_SCHEMA)]


class InputBlock(WireModel):
    """A block of a message."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: ResultBlocks = ()
    is_error: bool = False


class InputMessage(WireModel):
    """A turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[tuple[InputBlock, ...], Strict(False), FailFast(), BeforeValidator(_blocks), WithJsonSchema(_BLOCKS_SCHEMA)]


class MessagesTool(WireModel):
    """A tool of the client's; Anthropic's own have another type than custom."""

    type: str = "custom"
    name: str
    description: str | None = None
    input_schema: Schema | None = None
    strict: bool = False


class MessagesToolChoice(WireModel):
    """Whether and which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class MessagesMetadata(WireModel):
    """Who is asking."""

    user_id: str | None = None


class JsonFormat(WireModel):
    """A schema that the text follows."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(WireModel):
    """What the text must look like. How much effort it takes is always the same."""

    format: JsonFormat | None = None
    effort: Any = None


class ConversationFields(WireModel):
    """What is said; with `model`, all that counting tokens needs."""

    not_an_object: ClassVar[str] = "the body must be a JSON object"

    messages: Annotated[tuple[InputMessage, ...], Strict(False), FailFast()]
    system: ResultBlocks = ()
    tools: Annotated[tuple[MessagesTool, ...], Strict(False), FailFast()] = ()
    tool_choice: MessagesToolChoice = MessagesToolChoice(type="auto")
    output_config: OutputConfig = OutputConfig()
    output_format: JsonFormat | None = None  # what `output_config.format` was called first
    thinking: Any = None
    cache_control: Any = None
    speed: Any = None


class CountTokensRequest(ConversationFields):
    """A body of `POST /v1/messages/count_tokens`."""

    model: str | None = None


class MessagesRequest(SamplingFields, ConversationFields):
    """A body of `POST /v1/messages`. The sampling fields beyond Anthropic's are those of the other endpoints."""

    not_an_object: ClassVar[str] = "the body must be a JSON object"
    refused_fields: ClassVar[Mapping[str, str]] = {
        **SamplingFields.refused_fields,
        "container": "the server runs no code of the model's",
        "mcp_servers": "the server opens no connections",
        "context_management": "nothing is edited or compacted",
        "response_format": "use output_config.format",
        "structured_outputs": "use output_config.format",
        "prompt": "use messages",
        "input": "use messages",
        "instructions": "use system",
        "stop": "use stop_sequences",
        "logprobs": "ask /v1/chat/completions for them",
        **dict.fromkeys(GUIDED_FIELDS, "use output_config.format"),
    }

    max_tokens: int = Field(ge=0)
    temperature: float = Field(1.0, ge=0, le=1)
    stop: StopStrings = Field((), alias="stop_sequences")
    metadata: MessagesMetadata = MessagesMetadata()
    inference_geo: Any = None


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag="text", tag_field="type"):
    text: str
    citations: None = None


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_use", tag_field="type"):
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ToolUseBlock


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, those found in the prefix cache apart: the prompt is the sum of the first three."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, and what begins a stream."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokensCount(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
