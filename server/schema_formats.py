"""Leaves out of a JSON schema the formats that say nothing about its text. Called where a client's schema becomes a grammar.

JSON Schema lets anybody make up a `format`, and has whoever does not know one ignore it; pydantic writes `path`, `password`, `binary` and
more. The grammar engine refuses a schema with one that it cannot enforce, so those go and the rest of the schema stays.
"""

from collections.abc import Mapping
from typing import Any, cast

ENFORCED = frozenset({"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown"})

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS = ("items", "additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "not", "if", "then", "else")


def without_loose_formats(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with the enforced formats alone. Raises `RecursionError` for what is nested too deep to walk."""
    kept = {key: value for key, value in schema.items() if key != "format" or value in ENFORCED or not isinstance(value, str)}
    for key in kept.keys() & _NAMED_SCHEMAS:
        if isinstance(members := kept[key], Mapping):
            kept[key] = {name: _kept(member) for name, member in cast("Mapping[str, Any]", members).items()}
    for key in kept.keys() & _LISTED_SCHEMAS:
        if isinstance(members := kept[key], list):
            kept[key] = [_kept(member) for member in cast("list[Any]", members)]
    for key in kept.keys() & _SCHEMAS:
        kept[key] = _kept(kept[key])
    return kept


def _kept(value: Any) -> Any:
    return without_loose_formats(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value
