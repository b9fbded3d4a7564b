"""The wire types that say what a generated text must look like: OpenAI's `response_format`, the Responses API's `text.format`, and vLLM's
`structured_outputs` with its older `guided_...` names.

They only read. That no more than one of them is used, and what they mean, is `server/structured_output.py`'s.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, PlainValidator, WithJsonSchema

from server.schemas.common import WireModel


def _schema(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a JSON schema, which is an object")
    return cast("dict[str, Any]", value)


def _schema_or_text(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON schema: an object, or its text as a string")
    return cast("dict[str, Any] | str", value)


def _choices(value: Any) -> tuple[str, ...]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    if not items or set(map(type, items)) != {str}:
        raise ValueError("must be a list of one or more strings")
    return tuple(items)


Schema = Annotated[dict[str, Any], PlainValidator(_schema), WithJsonSchema({"type": "object"})]
SchemaOrText = Annotated[
    dict[str, Any] | str, PlainValidator(_schema_or_text), WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})
]
Choices = Annotated[
    tuple[str, ...], PlainValidator(_choices), WithJsonSchema({"type": "array", "minItems": 1, "items": {"type": "string"}})
]
NonEmpty = Annotated[str, Field(min_length=1)]


class JsonSchema(WireModel):
    """A named schema. `strict` changes nothing: the text always follows the schema."""

    name: str
    schema_: Schema = Field(alias="schema")
    strict: bool = False
    description: str | None = None


class ResponseFormat(WireModel):
    """OpenAI's field of completions and chat."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TextFormat(WireModel):
    """The same content as `text.format` of the Responses API has it: flat."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool = False
    description: str | None = None


class StructuredOutputs(WireModel):
    """vLLM's field: one of the first five, and how to write JSON."""

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: NonEmpty | None = None
    choice: Choices | None = None
    grammar: NonEmpty | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: NonEmpty | None = None
    disable_additional_properties: bool = False
    structural_tag: Any = None


GUIDED_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # that constrain, of those below


class StructuredFields(WireModel):
    """What a request may say of the form of its text; a base of the requests that generate."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: NonEmpty | None = None
    guided_choice: Choices | None = None
    guided_grammar: NonEmpty | None = None
    guided_whitespace_pattern: NonEmpty | None = None
