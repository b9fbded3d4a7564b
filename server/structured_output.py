"""From what a request says of the form of its text to one grammar.

`output_grammar` and `text_format_grammar` read the wire types of `server/schemas/structured.py`. They translate and do not judge: whether
a grammar compiles, and at what cost, is found out by `server/grammar_check.py` in a process of its own. So nothing here does more than
walk over a text whose size is in bounds, once.

JSON is written as `{"a": 1, "b": [1, 2]}`, with no other whitespace: where any is allowed, small models never stop writing it. Clients that
name a `whitespace_pattern`, or disable whitespace, get that.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llguidance import LLMatcher
from pydantic import ConfigDict, TypeAdapter

from server.closed_schema import closed_schema
from server.errors import InvalidRequest, shown
from server.limits import Limits
from server.schema_formats import without_loose_formats
from server.schemas.structured import GUIDED_FIELDS, ResponseFormat, StructuredFields, StructuredOutputs, TextFormat

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # only its stubs have it

CHOICE_SEPARATOR = " | "
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

_as_json = json.JSONEncoder()
_schemas = TypeAdapter(Mapping[str, Any], config=ConfigDict(ser_json_inf_nan="constants"))  # many times as fast as the standard library


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGrammar:
    """What a text must match, before anybody knows whether it compiles."""

    text: str  # llguidance's serialized form, or a grammar as the client wrote it, in Lark or EBNF
    param: str  # the request's field that it is from


def output_grammar(body: StructuredFields, *, limits: Limits) -> OutputGrammar | None:
    """The one grammar of a request; None where any text will do.

    Raises `InvalidRequest` with the field for what is no schema or too large, and for more than one constraint.
    """
    given = list(_constraints(body))
    if len(given) > 1:
        (name, _), (other, _) = given[:2]
        raise InvalidRequest(f"{name} and {other} both say what the text must look like; send only one of them", param=other)
    for name, value in given:
        return OutputGrammar(text=_grammar(name, value, body, limits=limits), param=name)
    return None


def text_format_grammar(text_format: TextFormat, *, limits: Limits, param: str = "text") -> OutputGrammar | None:
    """The grammar of the Responses API's `text.format`, a part of the field `param`. Raises `InvalidRequest`."""
    match text_format.type:
        case "text":
            return None
        case "json_object":
            return OutputGrammar(text=json_grammar(ANY_OBJECT, param=param, limits=limits), param=param)
        case "json_schema":
            if text_format.name is None or text_format.schema_ is None:
                raise InvalidRequest(f"{param}.format: json_schema needs a name and a schema", param=param)
            return OutputGrammar(text=json_grammar(text_format.schema_, param=param, limits=limits), param=param)


def check_num_chars(num_chars: int, *, param: str | None, limits: Limits) -> None:
    """Raises `InvalidRequest` for more than a grammar may have, in whatever form it is."""
    if num_chars > limits.max_grammar_chars:
        name = param or "the grammar"
        raise InvalidRequest(f"{name} comes to {num_chars:,} characters, the limit is {limits.max_grammar_chars:,}", param=param)


def json_grammar(
    schema: Mapping[str, Any] | str, *, param: str, limits: Limits, has_whitespace: bool = True, whitespace_pattern: str | None = None
) -> str:
    """llguidance's form of a JSON schema, given as an object or as its text.

    What is given as text is taken to the letter; an object is closed, and loses formats that cannot be enforced. Without `has_whitespace`
    there is none at all; a `whitespace_pattern` says what may stand wherever JSON allows whitespace. Raises `InvalidRequest` for what is
    no object, or too large.
    """
    is_compact = has_whitespace and whitespace_pattern is None
    options: JsonCompileOptions = {
        "item_separator": ", " if is_compact else ",",
        "key_separator": ": " if is_compact else ":",
        "whitespace_flexible": False,
        "lenient": False,
        "coerce_one_of": False,
    }
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
    try:
        text = schema if isinstance(schema, str) else _schemas.dump_json(schema).decode()
        check_num_chars(len(text), param=param, limits=limits)
        if not isinstance(schema, str):
            text = _schemas.dump_json(closed_schema(without_loose_formats(schema))).decode()
            check_num_chars(len(text), param=param, limits=limits)
        return LLMatcher.grammar_from_json_schema(text, overrides=options)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: this is no JSON schema: {error}", param=param) from None


def choice_grammar(choices: Iterable[str]) -> str:
    """The text is one of these strings. One terminal for all of them: thousands of alternatives in a rule are too many for the parser."""
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + CHOICE_SEPARATOR.join(map(_as_json.encode, choices)))


def _constraints(body: StructuredFields) -> Iterable[tuple[str, Any]]:
    """The fields that constrain, by name; those that say that anything goes are not among them."""
    if body.response_format is not None and body.response_format.type != "text":
        yield "response_format", body.response_format
    if body.structured_outputs is not None:
        yield "structured_outputs", body.structured_outputs
    for name in GUIDED_FIELDS:
        if (value := getattr(body, name)) is not None:
            yield name, value


def _grammar(name: str, value: Any, body: StructuredFields, *, limits: Limits) -> str:
    match value:
        case ResponseFormat():
            return _of_response_format(value, limits=limits)
        case StructuredOutputs():
            return _of_structured_outputs(value, limits=limits)
        case _:
            kind = name.removeprefix("guided_")
            return _of_kind(kind, value, param=name, limits=limits, whitespace_pattern=body.guided_whitespace_pattern)


def _of_response_format(value: ResponseFormat, *, limits: Limits) -> str:
    if value.type == "json_object":
        return json_grammar(ANY_OBJECT, param="response_format", limits=limits)
    if value.json_schema is None:
        raise InvalidRequest(
            "response_format: type json_schema needs the field json_schema, with a name and a schema", param="response_format"
        )
    return json_grammar(value.json_schema.schema_, param="response_format", limits=limits)


def _of_structured_outputs(value: StructuredOutputs, *, limits: Limits) -> str:
    param = "structured_outputs"
    if value.structural_tag is not None:
        raise InvalidRequest(f"{param}.structural_tag is not supported; use json or grammar", param=param)
    if value.disable_additional_properties:
        raise InvalidRequest(
            f"{param}.disable_additional_properties is not supported; say additionalProperties: false in the schema", param=param
        )
    kinds = {
        "json": value.json_,
        "regex": value.regex,
        "choice": value.choice,
        "grammar": value.grammar,
        "json_object": value.json_object or None,
    }
    given = [(kind, content) for kind, content in kinds.items() if content is not None]
    if len(given) != 1:
        found = " and ".join(kind for kind, _ in given) or "none of them"
        raise InvalidRequest(f"{param} must have exactly one of {', '.join(kinds)}; found {found}", param=param)
    ((kind, content),) = given
    return _of_kind(
        kind,
        content,
        param=param,
        limits=limits,
        has_whitespace=not value.disable_any_whitespace,
        whitespace_pattern=value.whitespace_pattern,
    )


def _of_kind(
    kind: str, content: Any, *, param: str, limits: Limits, has_whitespace: bool = True, whitespace_pattern: str | None = None
) -> str:
    if kind == "choice":
        check_num_chars(sum(map(len, content)) + len(CHOICE_SEPARATOR) * len(content), param=param, limits=limits)
        return choice_grammar(content)
    if kind in ("json", "json_object"):
        schema = ANY_OBJECT if kind == "json_object" else cast("dict[str, Any] | str", content)
        return json_grammar(schema, param=param, limits=limits, has_whitespace=has_whitespace, whitespace_pattern=whitespace_pattern)
    check_num_chars(len(content), param=param, limits=limits)
    return LLMatcher.grammar_from_regex(content) if kind == "regex" else _written_grammar(content, param=param)


def _written_grammar(text: str, *, param: str) -> str:
    """As it is; the check translates EBNF. What begins like JSON would be taken for llguidance's own form, which is not offered."""
    if text.lstrip().startswith("{"):
        raise InvalidRequest(f"{param}: a grammar must be in Lark or EBNF, found {shown(text)}", param=param)
    return text
