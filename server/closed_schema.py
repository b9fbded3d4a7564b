"""Closes the objects of a JSON schema that say nothing of further properties. Called where a client's schema becomes a grammar.

By the letter of JSON Schema an object may have properties beside those that are listed, and a model that is held to the letter goes on
with names of its own until its length ends it. Clients mean the listed ones: LangChain and instructor send schemas without
`additionalProperties: false`, and other servers close them. What is valid under the closed schema is valid under the client's. Nothing is
checked here.
"""

from collections.abc import Mapping
from typing import Any, cast

_SAYS_WHAT_ELSE = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"})
_SAYS_MORE_ELSEWHERE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef"})
_NAMED_SCHEMAS = ("properties", "$defs", "definitions")
_LISTED_SCHEMAS = ("anyOf", "oneOf", "prefixItems")


def closed_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with `additionalProperties: false` wherever an object lists properties and says nothing of others.

    One with an object that is described in several places (`allOf`, or `properties` beside `anyOf` and the like) comes back as it is: each
    place would forbid the others' properties. Raises `RecursionError` for what is nested too deep to walk.
    """
    return schema if _has_object_in_parts(schema) else cast(Mapping[str, Any], _closed(schema))


def _has_object_in_parts(value: Any) -> bool:
    """Errs towards yes, where a property is called like a keyword: that leaves the schema open."""
    if isinstance(value, list):
        return any(map(_has_object_in_parts, cast(list[Any], value)))
    if not isinstance(value, Mapping):
        return False
    members = cast(Mapping[str, Any], value)
    parts = members.get("allOf", ())
    if (isinstance(parts, list) and len(cast(list[Any], parts)) > 1) or ("properties" in members and _SAYS_MORE_ELSEWHERE & members.keys()):
        return True
    return any(map(_has_object_in_parts, members.values()))


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
