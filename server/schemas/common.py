"""What every endpoint that generates shares on the wire: how a body is read, the sampling fields, usage.

Types are strict: `true` is not 1, `"5"` is not 5, NaN is not a number. `null` means the default. Bounds that depend on the model or on the
table of limits are checked by `server/preprocess.py`, the others here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, cast

import msgspec
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from server.limits import Limits

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_PRIORITY = 1000


class WireModel(BaseModel):
    """A JSON object from a client. Fields it does not know are kept aside, to be named in a response header."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True, protected_namespaces=())

    not_an_object: ClassVar[str] = "must be an object"  # said after the name of the field that holds one
    refused_fields: ClassVar[Mapping[str, str]] = {}  # not among the fields, but ignoring them would change what is meant; why they are not

    @classmethod
    def from_body(cls, body: bytes, *, limits: Limits) -> Self:
        """Read a request body. Raises pydantic's `ValidationError`, which `server/errors.py` translates."""
        return cls.model_validate_json(body, context={"limits": limits})

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(cls.not_an_object)
        return {name: value for name, value in cast("dict[str, Any]", data).items() if value is not None}

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Names the client sent that mean nothing here."""
        return tuple(self.model_extra or ())


def _token_ids(value: Any) -> tuple[int, ...]:
    items = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not isinstance(value, list) or set(map(type, items)) - {int}:
        raise ValueError("must be a list of token ids")
    return tuple(items)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = cast("list[Any]", value) if isinstance(value, list) else [value]
    if set(map(type, strings)) - {str}:
        raise ValueError("must be a string or a list of strings")
    if "" in strings:
        raise ValueError("an empty stop string would stop everywhere")
    return tuple(strings)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids to numbers")
    return cast("dict[str, Any]", value)


TokenIds = Annotated[
    tuple[int, ...], PlainValidator(_token_ids), WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}})
]
StopStrings = Annotated[
    tuple[str, ...],
    PlainValidator(_stop_strings),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]}),
]


def _words(value: Any) -> tuple[str, ...]:
    words = cast("list[Any]", value)
    if not isinstance(value, list) or set(map(type, words)) - {str} or "" in words:
        raise ValueError("must be a list of strings that are not empty")
    return tuple(words)


def _some_token_ids(value: Any) -> tuple[int, ...]:
    ids = _token_ids(value)
    if not ids:
        raise ValueError("is empty, so that no token could be chosen; leave it out to allow all")
    return ids


Words = Annotated[tuple[str, ...], PlainValidator(_words), WithJsonSchema({"type": "array", "items": {"type": "string", "minLength": 1}})]
SomeTokenIds = Annotated[
    tuple[int, ...],
    PlainValidator(_some_token_ids),
    WithJsonSchema({"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}),
]
LogitBias = Annotated[
    dict[str, Any],
    PlainValidator(_object),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]


class StreamOptions(WireModel):
    """Options that only mean something with `stream`."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted; there is nothing to obfuscate


class SamplingFields(WireModel):
    """How tokens are chosen: OpenAI's fields, then the extra ones other servers have taught clients."""

    not_an_object: ClassVar[str] = "the body must be a JSON object"
    refused_fields: ClassVar[Mapping[str, str]] = {
        "use_beam_search": "use best_of, or ask for less temperature",
        "length_penalty": "it belongs to beam search",
        "prompt_embeds": "send the prompt as text or token ids",
        "logits_processors": "no code of a client is run",
        "dynatemp_range": "temperature is one number",
        "typical_p": "use top_p or min_p",
        "mirostat": "use top_p or min_p",
        "dry_multiplier": "use frequency_penalty or repetition_penalty",
        "xtc_probability": "use temperature",
        "thinking_token_budget": "the model does not think aloud",
    }

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    stop: StopStrings = ()
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # without API keys: the tenant, see `server/preprocess.py`
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    top_k: int = Field(0, ge=-1, le=INT64_MAX)  # 0 and -1: all
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: TokenIds = ()
    allowed_token_ids: SomeTokenIds | None = None
    bad_words: Words = ()
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT64_MAX)
    include_stop_str_in_output: bool = False
    parse_special_tokens: bool = False
    add_special_tokens: bool = False
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    timeout: float | None = Field(None, gt=0)  # seconds from arrival
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)  # within the tenant; the higher goes first
    cache_salt: str | None = Field(None, min_length=1)


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one request: each prompt counted once, every generated token of every choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def json_request(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI part of a route that reads its body itself."""
    schema = _inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def json_answer(struct: type[msgspec.Struct]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI part of a route that answers with a msgspec struct."""
    schema = msgspec.json.schema(struct)
    return {200: {"description": "OK", "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that refers to nothing outside itself: OpenAPI resolves `$ref` from the top of its own document."""
    definitions = schema.get("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in cast("list[Any]", node)]
        if not isinstance(node, dict):
            return node
        fields = cast("dict[str, Any]", node)
        if "$ref" in fields:
            return inline(definitions[fields["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in fields.items() if key != "$defs"}

    return inline(schema)
