"""Closes the objects of a JSON schema that say nothing of further properties. Called where a client's schema becomes a grammar.

By the letter of JSON Schema an object may have properties beside those that are listed, and a model that is held to the letter goes on
with names of its own until its length ends it. Clients mean the listed ones: LangChain and instructor send schemas without
`additionalProperties: false`, and other servers close them. What is valid under the closed schema is valid under the client's. Nothing is
checked here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

_SAYS_WHAT_ELSE = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"})
_SAYS_MORE_ELSEWHERE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef"})
_NO_OBJECTS = ("string", "number", "integer", "boolean", "null", "array")
_MAX_COMPARED = 32  # objects in one `oneOf`
_NAMED_SCHEMAS = ("properties", "$defs", "definitions")
_LISTED_SCHEMAS = ("anyOf", "oneOf", "prefixItems")


def closed_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with `additionalProperties: false` wherever an object lists properties and says nothing of others.

    One with an object that is described in several places (`allOf`, or `properties` beside `anyOf` and the like) comes back as it is: each
    place would forbid the others' properties. So does one with a `oneOf` of objects where a text of one, when closed, could be of another
    as the client has it, and so of too many. Raises `RecursionError` for what is nested too deep to walk.
    """
    return schema if _means_more_when_open(schema, root=schema) else cast(Mapping[str, Any], _closed(schema))


def _means_more_when_open(value: Any, *, root: Mapping[str, Any]) -> bool:
    """Errs towards yes, where a property is called like a keyword: that leaves the schema open."""
    if isinstance(value, list):
        return any(_means_more_when_open(item, root=root) for item in cast(list[Any], value))
    if not isinstance(value, Mapping):
        return False
    members = cast(Mapping[str, Any], value)
    parts = members.get("allOf", ())
    if (isinstance(parts, list) and len(cast(list[Any], parts)) > 1) or ("properties" in members and _SAYS_MORE_ELSEWHERE & members.keys()):
        return True
    choices = members.get("oneOf", ())
    if isinstance(choices, list) and not _are_told_apart([_resolved(choice, root) for choice in cast(list[Any], choices)]):
        return True
    return any(_means_more_when_open(member, root=root) for member in members.values())


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, or the definition that it refers to; empty where that is not plain to see."""
    if not isinstance(schema, Mapping):
        return {}
    members = cast(Mapping[str, Any], schema)
    if "$ref" not in members:
        return members
    match str(members["$ref"]).split("/"):
        case ["#", "$defs" | "definitions" as place, name] if isinstance(definitions := root.get(place), Mapping):
            definition = cast(Mapping[str, Any], definitions).get(name)
            return cast(Mapping[str, Any], definition) if isinstance(definition, Mapping) else {}
        case _:
            return {}


@dataclass(frozen=True, slots=True)
class _Choice:
    """What of an object in a `oneOf` tells it from others."""

    is_closed: bool
    names: frozenset[str]
    required: frozenset[str]
    constants: Mapping[str, str]  # of the properties that can be one text alone

    @classmethod
    def of(cls, schema: Mapping[str, Any]) -> "_Choice":
        properties, required = schema.get("properties"), schema.get("required")
        members: Mapping[str, Any] = cast(Mapping[str, Any], properties) if isinstance(properties, Mapping) else {}
        return cls(
            is_closed=_lists_all_it_wants(schema),
            names=frozenset(members),
            required=frozenset(name for name in cast(list[Any], required) if isinstance(name, str))
            if isinstance(required, list)
            else frozenset(),
            constants=dict(_constants(members)),
        )

    def is_never(self, other: "_Choice") -> bool:
        """Whether no text of this one, closed, is one of the other, left open: that wants what this has not, or has otherwise."""
        return any(
            (self.is_closed and name not in self.names)
            or (name in self.constants and other.constants.get(name, self.constants[name]) != self.constants[name])
            for name in other.required
        )


def _constants(properties: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, member in properties.items():
        match member:
            case {"const": str(constant)} | {"enum": [str(constant)]}:
                yield name, constant
            case _:
                pass


def _are_told_apart(choices: list[Mapping[str, Any]]) -> bool:
    """Whether a text of one object, when closed, is never one of another. Errs towards no."""
    objects = [_Choice.of(choice) for choice in choices if choice.get("type", "object") not in _NO_OBJECTS]
    return len(objects) <= _MAX_COMPARED and all(one.is_never(other) for one, other in permutations(objects, 2))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(cast(Mapping[str, Any], schema))
    for key in _NAMED_SCHEMAS:
        if isinstance(members := closed.get(key), Mapping):
            closed[key] = {name: _closed(member) for name, member in cast(Mapping[str, Any], members).items()}
    for key in _LISTED_SCHEMAS:
        if isinstance(members := closed.get(key), list):
            closed[key] = [_closed(member) for member in cast(list[Any], members)]
    for key in ("items", "additionalProperties"):
        if key in closed:
            closed[key] = _closed(closed[key])
    if _lists_all_it_wants(closed):
        closed["additionalProperties"] = False
    return closed


def _lists_all_it_wants(schema: Mapping[str, Any]) -> bool:
    """Whether the listed properties are enough: nothing is said of others, none that is required is missing from the list."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list) or _SAYS_WHAT_ELSE & schema.keys():
        return False
    return all(isinstance(name, str) and name in properties for name in cast(list[Any], required))
