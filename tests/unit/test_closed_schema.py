"""Which objects of a schema are closed, and which are left as open as they came."""

from typing import Any

import pytest

from server.closed_schema import closed_schema

NAME = {"name": {"type": "string"}}
CLOSED = {"type": "object", "properties": NAME, "additionalProperties": False}
OPEN = {"type": "object", "properties": NAME}


def test_an_object_that_lists_its_properties_has_no_others():
    assert closed_schema(OPEN) == CLOSED


@pytest.mark.parametrize(
    ("around", "within"),
    [
        ({"type": "object", "properties": {"pet": OPEN}, "required": ["pet"]}, ("properties", "pet")),
        ({"type": "object", "additionalProperties": OPEN}, ("additionalProperties",)),
        ({"type": "array", "items": OPEN}, ("items",)),
        ({"type": "array", "prefixItems": [OPEN]}, ("prefixItems", 0)),
        ({"anyOf": [OPEN, {"type": "null"}]}, ("anyOf", 0)),
        ({"oneOf": [{"type": "null"}, OPEN]}, ("oneOf", 1)),
        ({"$ref": "#/$defs/Pet", "$defs": {"Pet": OPEN}}, ("$defs", "Pet")),
        ({"allOf": [{"$ref": "#/definitions/Pet"}], "definitions": {"Pet": OPEN}}, ("definitions", "Pet")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_objects_are_closed_wherever_they_are(around: dict[str, Any], within: tuple[str | int, ...]):
    found: Any = closed_schema(around)
    for step in within:
        found = found[step]

    assert found == CLOSED


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "string"}},
        OPEN | {"additionalProperties": True},
        OPEN | {"additionalProperties": {"type": "integer"}},
        OPEN | {"unevaluatedProperties": True},
        OPEN | {"patternProperties": {"^x-": {"type": "string"}}},
        OPEN | {"minProperties": 3},
        OPEN | {"required": ["name", "age"]},
        OPEN | {"required": [["name"]]},
        OPEN | {"required": "name"},
        {"type": "object", "properties": 5},
    ],
    ids=str,
)
def test_an_object_that_says_what_else_it_has_stays_as_it_is(schema: dict[str, Any]):
    assert closed_schema(schema) == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [OPEN, {"type": "object", "properties": {"age": {"type": "integer"}}}]},
        OPEN | {"anyOf": [{"properties": {"age": {"type": "integer"}}}, {"properties": {"size": {"type": "integer"}}}]},
        OPEN | {"$ref": "#/$defs/Other", "$defs": {"Other": {"type": "object", "properties": {"age": {"type": "integer"}}}}},
        {"type": "array", "items": {"allOf": [OPEN, OPEN]}},
    ],
    ids=str,
)
def test_an_object_in_several_parts_leaves_the_whole_schema_as_it_is(schema: dict[str, Any]):
    assert closed_schema(schema) == schema


def test_values_that_look_like_schemas_are_left_alone():
    schema = {"type": "object", "properties": {"kind": {"const": OPEN}, "other": {"enum": [OPEN], "default": OPEN}}}

    assert closed_schema(schema) == schema | {"additionalProperties": False}


def test_the_clients_own_schema_is_not_touched():
    schema = {"type": "object", "properties": {"pet": dict(OPEN)}}

    closed_schema(schema)

    assert schema == {"type": "object", "properties": {"pet": OPEN}}


def of_kind(kind: str, **says: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": kind}, kind: {"type": "integer"}}, "required": ["kind"]} | says


def test_one_of_several_objects_is_closed_where_a_constant_or_a_name_tells_them_apart():
    in_place = {"oneOf": [of_kind("cat"), of_kind("dog"), {"type": "null"}]}
    referred_to = {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "$defs": {"Cat": of_kind("cat"), "Dog": of_kind("dog")}}

    closed = closed_schema({"type": "array", "items": in_place})["items"]["oneOf"]
    defined = closed_schema(referred_to)["$defs"]

    assert [one["additionalProperties"] for one in closed[:2]] == [False, False]
    assert [one["additionalProperties"] for one in defined.values()] == [False, False]
    named = [{"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]} for name in ("a", "b")]
    assert [one["additionalProperties"] for one in closed_schema({"oneOf": named})["oneOf"]] == [False, False]


@pytest.mark.parametrize(
    "choices",
    [
        [OPEN | {"required": ["name"]}, {"type": "object", "properties": {"age": {"type": "integer"}}}],
        [of_kind("cat"), of_kind("cat")],
        [of_kind("cat"), of_kind("dog", required=[])],
        [of_kind("cat"), {"$ref": "#/elsewhere"}],
        [of_kind("cat"), True],
        [of_kind(f"kind {number}") for number in range(33)],
    ],
    ids=["no constant", "the same constant", "not required", "not seen", "anything", "too many to compare"],
)
def test_one_of_several_objects_stays_open_where_a_text_could_be_two_of_them(choices: list[Any]):
    schema = {"oneOf": choices}

    assert closed_schema(schema) == schema
