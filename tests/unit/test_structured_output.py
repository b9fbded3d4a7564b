"""What a request says of the form of its text, as the texts that its grammar lets through."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_tokenizer import tiny_tokenizer

from engine.errors import GrammarError
from engine.grammar import GrammarMatcher, GrammarTokenizer
from server.errors import InvalidRequest
from server.grammar_worker import judge
from server.limits import Limits
from server.schemas.structured import StructuredFields, TextFormat
from server.structured_output import OutputGrammar, output_grammar, text_format_grammar

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["x", "tags"],
    "additionalProperties": False,
}
COMPACT = '{"x": 1, "tags": ["a", "b"]}'
DENSE = '{"x":1,"tags":["a","b"]}'
AIRY = '{\n  "x": 1,\n  "tags": ["a", "b"]\n}'
SHORT_TERMS = {"json": POINT, "regex": "[a-c]+", "choice": ["yes", "no"], "grammar": 'start: "a"+', "json_object": True}


@cache
def grammar_tokenizer() -> GrammarTokenizer:
    return GrammarTokenizer(tiny_tokenizer(), vocab_size=tiny_tokenizer().vocab_size, eos_token=2)


def of(**fields: Any) -> OutputGrammar | None:
    """The grammar of a request with these fields, read as a body is."""
    return output_grammar(StructuredFields.model_validate_json(json.dumps(fields)), limits=Limits())


def lets_through(grammar: OutputGrammar | None, text: str) -> bool:
    """Whether a whole answer may be `text`."""
    assert grammar is not None
    answer = judge(grammar_tokenizer(), grammar.text)
    assert answer.reason is None, answer.reason
    matcher = GrammarMatcher(grammar_tokenizer(), answer.grammar)
    for token_id in tiny_tokenizer().encode_continuation(text):
        matcher.advance(token_id)
    return matcher.is_accepting


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        of(**fields)
    return refused.value


def test_a_request_that_says_nothing_of_its_form_has_no_grammar():
    assert of() is None
    assert of(response_format=None, structured_outputs=None, guided_json=None) is None
    assert of(response_format={"type": "text"}) is None


def test_a_json_object_may_hold_anything_but_must_be_one():
    grammar = of(response_format={"type": "json_object"})

    assert grammar is not None
    assert grammar.param == "response_format"
    assert lets_through(grammar, '{"a": [1, {"b": null}], "c": "d"}')
    assert lets_through(grammar, "{}")
    assert not lets_through(grammar, "[1]")
    assert not lets_through(grammar, '{"a": ')


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_json_schema_is_followed_whether_strict_or_not(strict: bool | None):
    grammar = of(response_format={"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": strict}})

    assert lets_through(grammar, COMPACT)
    assert not lets_through(grammar, '{"x": 1}')
    assert not lets_through(grammar, '{"x": "1", "tags": []}')


def test_json_has_one_space_after_commas_and_colons_and_no_other_whitespace():
    grammar = of(response_format={"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}})

    assert [lets_through(grammar, text) for text in (COMPACT, DENSE, AIRY)] == [True, False, False]


def test_an_object_that_lists_its_properties_has_no_others_unless_its_schema_speaks_of_them():
    listed = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    closed, open_ = (
        of(response_format={"type": "json_schema", "json_schema": {"name": "point", "schema": schema}})
        for schema in (listed, listed | {"additionalProperties": True})
    )

    assert lets_through(closed, '{"x": 1}')
    assert [lets_through(grammar, '{"x": 1, "y": 2}') for grammar in (closed, open_)] == [False, True]


def test_properties_come_in_the_order_of_the_schema():
    grammar = of(structured_outputs={"json": POINT})

    assert not lets_through(grammar, '{"tags": [], "x": 1}')


def test_a_schema_cannot_bring_options_of_its_own():
    options = {"whitespace_flexible": True, "lenient": True}

    grammar = of(structured_outputs={"json": POINT | {"x-guidance": options}})
    unsupported = of(structured_outputs={"json": {"type": "string", "contentEncoding": "base64", "not": {}, "x-guidance": options}})

    assert not lets_through(grammar, AIRY)
    assert unsupported is not None
    assert judge(grammar_tokenizer(), unsupported.text).reason is not None


@pytest.mark.parametrize("field", ["structured_outputs", "guided"])
@pytest.mark.parametrize(
    ("kind", "content", "text", "other"),
    [
        ("json", POINT, COMPACT, "{}"),
        ("json", json.dumps(POINT), COMPACT, "{}"),
        ("regex", r"\d{2}/[a-c]+", "12/abc", "12/d"),
        ("choice", ["yes", "no, never", ""], "no, never", "no"),
        ("choice", ["yes", ""], "", "no"),
        ("choice", ['"quoted"\n', "漢😀", "a|b"], "漢😀", "a"),
        ("grammar", 'start: "a" b+\nb: /[0-9]/', "a12", "a"),
        ("grammar", 'root ::= "a" digit+\ndigit ::= [0-9]', "a12", "a"),
    ],
)
def test_each_kind_of_constraint_is_taken_by_its_newer_and_its_older_name(field: str, kind: str, content: Any, text: str, other: str):
    grammar = of(structured_outputs={kind: content}) if field == "structured_outputs" else of(**{f"guided_{kind}": content})

    assert grammar is not None
    assert grammar.param == ("structured_outputs" if field == "structured_outputs" else f"guided_{kind}")
    assert lets_through(grammar, text)
    assert not lets_through(grammar, other)


def test_thousands_of_choices_are_one_alternative_for_the_parser():
    choices = [f"choice number {index}" for index in range(5000)]

    grammar = of(guided_choice=choices)

    assert lets_through(grammar, choices[4321])


def test_any_json_object_may_be_asked_for_by_structured_outputs():
    assert lets_through(of(structured_outputs={"json_object": True}), '{"a": 1}')


def test_without_any_whitespace_json_is_dense():
    grammar = of(structured_outputs={"json": POINT, "disable_any_whitespace": True})

    assert [lets_through(grammar, text) for text in (COMPACT, DENSE, AIRY)] == [False, True, False]


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"json": POINT, "whitespace_pattern": r"[\n ]*"}},
        {"guided_json": POINT, "guided_whitespace_pattern": r"[\n ]*"},
    ],
)
def test_whitespace_may_be_what_the_client_says(fields: dict[str, Any]):
    grammar = of(**fields)

    assert [lets_through(grammar, text) for text in (COMPACT, DENSE, AIRY)] == [True, True, True]
    assert not lets_through(grammar, DENSE.replace(",", ",\t"))


@pytest.mark.parametrize(
    ("fields", "other"),
    [
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "guided_grammar": 'start: "a"'}, "guided_grammar"),
    ],
)
def test_two_constraints_are_refused_by_both_names(fields: dict[str, Any], other: str):
    refused = refusal(**fields)

    assert refused.param == other
    assert all(name in refused.message for name in fields)


def test_a_response_format_of_text_leaves_room_for_another_constraint():
    assert of(response_format={"type": "text"}, guided_choice=["a"]) is not None


@pytest.mark.parametrize("kinds", [(), ("json", "regex"), ("choice", "grammar", "json_object")])
def test_structured_outputs_has_exactly_one_kind(kinds: tuple[str, ...]):
    refused = refusal(structured_outputs={kind: SHORT_TERMS[kind] for kind in kinds})

    assert refused.param == "structured_outputs"
    assert "exactly one" in refused.message
    assert all(kind in refused.message for kind in kinds)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_schema"}),
        ("structured_outputs", {"json": "{"}),
        ("structured_outputs", {"json": "[1]"}),
        ("structured_outputs", {"json": "true"}),
        ("structured_outputs", {"json": '{"a":' * 1000}),
        ("structured_outputs", {"grammar": ' {"grammars": []}'}),
        ("structured_outputs", {"structural_tag": "{}"}),
        ("structured_outputs", {"json": {}, "disable_additional_properties": True}),
        ("guided_json", '"a"'),
    ],
)
def test_what_is_no_schema_or_not_supported_is_refused(field: str, value: Any):
    assert refusal(**{field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "xml"}),
        ("response_format", {}),
        ("response_format", "json_object"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": True}}),
        ("structured_outputs", {"json": [1]}),
        ("structured_outputs", {"json": False}),
        ("structured_outputs", {"regex": ""}),
        ("structured_outputs", {"choice": []}),
        ("structured_outputs", {"choice": "yes"}),
        ("structured_outputs", {"choice": ["yes", 1]}),
        ("structured_outputs", {"grammar": ""}),
        ("structured_outputs", {"json_object": 1}),
        ("guided_choice", ["a", None]),
        ("guided_regex", 5),
    ],
)
def test_a_wrong_type_is_the_fields_own(field: str, value: Any):
    with pytest.raises(ValidationError) as refused:
        of(**{field: value})

    assert refused.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("field", "at_cap", "past_it"),
    [
        ("guided_json", {"title": "x" * 88}, {"title": "x" * 89}),
        ("guided_json", json.dumps({"title": "x" * 87}), json.dumps({"title": "x" * 88})),
        ("guided_regex", "x" * 100, "x" * 101),
        ("guided_grammar", 'start: "a"'.ljust(100), 'start: "a"'.ljust(101)),
        ("guided_choice", ["x" * 44, "y" * 50], ["x" * 45, "y" * 50]),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_translated(field: str, at_cap: Any, past_it: Any):
    limits = replace(Limits(), max_grammar_chars=100)
    small, large = (StructuredFields.model_validate_json(json.dumps({field: value})) for value in (at_cap, past_it))

    assert output_grammar(small, limits=limits) is not None
    with pytest.raises(InvalidRequest, match="101 characters, the limit is 100") as refused:
        output_grammar(large, limits=limits)
    assert refused.value.param == field


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"not": {}},
        {"enum": []},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"$ref": "https://example.org/schema.json"},
        {"type": "string", "pattern": "(?<=a)b"},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"$ref": "#"},
        {"type": "array", "uniqueItems": True},
    ],
)
def test_a_schema_that_cannot_be_followed_is_told_why(schema: dict[str, Any]):
    grammar = of(structured_outputs={"json": schema})

    assert grammar is not None
    assert judge(grammar_tokenizer(), grammar.text).reason


def test_branches_of_oneof_that_no_value_shares_are_followed_and_others_told_what_to_say():
    def union(*branches: dict[str, Any]) -> str:
        grammar = of(guided_json={"oneOf": branches})
        assert grammar is not None
        return judge(grammar_tokenizer(), grammar.text).reason or ""

    cat, dog = ({"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("cat", "dog"))

    assert union(cat, dog) == ""
    assert union({"type": "string"}, {"type": "integer"}) == ""
    assert "anyOf" in union(cat, {"type": "object"})


def test_the_responses_api_says_the_same_flat():
    def format_of(**fields: Any) -> OutputGrammar | None:
        return text_format_grammar(TextFormat.model_validate_json(json.dumps(fields)), limits=Limits())

    nested = of(response_format={"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}})
    flat = format_of(type="json_schema", name="point", schema=POINT, strict=True)

    assert format_of() is format_of(type="text") is None
    assert lets_through(format_of(type="json_object"), "{}")
    assert nested is not None
    assert flat == OutputGrammar(text=nested.text, param="text")
    for incomplete in ({"name": "point"}, {"schema": POINT}):
        with pytest.raises(InvalidRequest, match=r"text\.format.* needs a name and a schema"):
            format_of(type="json_schema", **incomplete)


def test_what_is_neither_lark_nor_ebnf_is_told_so():
    grammar = of(guided_grammar='root ::= "a" missing')

    assert grammar is not None
    reason = judge(grammar_tokenizer(), grammar.text).reason
    assert reason is not None
    assert "'missing' not found" in reason


def test_an_object_may_have_hundreds_of_properties_but_not_all_of_them_optional():
    properties = {f"p{index}": {"type": "string"} for index in range(400)}

    required, optional = (of(guided_json={"type": "object", "properties": properties, "required": names}) for names in ([*properties], []))

    assert required is not None
    assert optional is not None
    assert judge(grammar_tokenizer(), required.text).reason is None
    assert "let fewer properties be optional" in (judge(grammar_tokenizer(), optional.text).reason or "")


def test_the_verdict_and_the_engine_agree():
    grammar = of(guided_regex="[")

    assert grammar is not None
    assert judge(grammar_tokenizer(), grammar.text).reason is not None
    with pytest.raises(GrammarError):
        GrammarMatcher(grammar_tokenizer(), grammar.text)
