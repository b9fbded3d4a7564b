"""The wire types of `POST /v1/completions`: the request as OpenAI documents it, and one answer shape for streamed and whole alike."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

import msgspec
from pydantic import Field, PlainValidator, ValidationInfo, WithJsonSchema

from server.limits import Limits
from server.schemas.common import SamplingFields, Usage
from server.schemas.structured import StructuredFields

TextPrompts = tuple[str, ...]
IdPrompts = tuple[tuple[int, ...], ...]


def _prompts(value: Any, info: ValidationInfo) -> TextPrompts | IdPrompts:
    """The four forms of a prompt as one: a tuple of texts or a tuple of id tuples.

    Types are looked at with one pass in C per list, and the number of prompts before any of them: a hostile list costs little.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")
    items = cast("list[Any]", value)
    if not items:
        raise ValueError("the list is empty; leave the prompt out to start a new document")
    kinds = set(map(type, items))
    if kinds == {int}:
        return (tuple(items),)
    max_prompts = cast("dict[str, Limits]", info.context)["limits"].max_prompts
    if len(items) > max_prompts:
        raise ValueError(f"{len(items):,} prompts in one request, the limit is {max_prompts:,}")
    if kinds == {str}:
        return tuple(items)
    if kinds == {list}:
        if not all(items):
            raise ValueError("one of the lists of token ids is empty; leave the prompt out to start a new document")
        if all(set(map(type, ids)) == {int} for ids in items):
            return tuple(map(tuple, items))
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids, not a mixture")


_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}

Prompts = Annotated[
    TextPrompts | IdPrompts,
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                _IDS_SCHEMA,
                {"type": "array", "minItems": 1, "items": _IDS_SCHEMA},
            ]
        }
    ),
]


class CompletionRequest(SamplingFields, StructuredFields):
    """A body of `POST /v1/completions`. `prompt` is always a tuple here; no prompt is one empty text, the document start."""

    refused_fields: ClassVar[Mapping[str, str]] = {
        **SamplingFields.refused_fields,
        "messages": "send a prompt, or ask /v1/chat/completions",
        "input": "send a prompt, or ask /v1/responses",
        "tools": "ask /v1/chat/completions",
        "max_completion_tokens": "use max_tokens",
        "max_output_tokens": "use max_tokens",
        "stop_sequences": "use stop",
    }

    prompt: Prompts = ("",)
    suffix: str = ""
    max_tokens: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=0, le=20)
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    echo: bool = False


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Four parallel lists, one entry per reported token; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate for a place in the prompt; `rank` is null for the prompt's own token where it is not among the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice, or in a stream one piece of it. The fields with a default are there where they were asked for."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, and each chunk of a streamed one. `usage` is left out of chunks unless the client asked for it."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
