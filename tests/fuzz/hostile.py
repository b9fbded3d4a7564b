"""Hostile requests, without end and by seed: every field of every route under wrong types, extremes, nesting, odd encodings and torn JSON.

The fields come from the application's own OpenAPI document, so that a new field is attacked without a line here. `EXAMPLES` holds one good
body per route that takes one; everything hostile begins as one of these.
"""

import json
import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

HELLO = [{"role": "user", "content": "Hello"}]
EXAMPLES: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {"messages": HELLO, "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5, 6]},
}

STRINGS = (
    "",
    " ",
    "\u0000",
    "\ud800",  # a lone surrogate, which JSON can say and UTF-8 cannot
    "\ufeff",
    "\u202e\u2066",
    "e\u0301" * 50,
    "👩‍👩‍👧‍👦" * 20,
    "<|separator|>",
    "[BOS][EOS]",
    "<0x0A>",
    "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}",
    "../../etc/passwd",
    "a" * 5000,
    " " * 5000,
    "▁" * 300,
    "\n" * 300,
    "(((((a{1,99}){1,99}){1,99}){1,99}){1,99})",
    "[" * 400,
    'start: "a" start',
    "auto",
    "tiny",
    "1e999",
)
NUMBERS = (0, -0.0, 1, -1, 2, 0.5, 21, 128, 129, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 1e-320, 1e308, -1e308)
RAW = ("NaN", "Infinity", "-Infinity", "1" + "0" * 400, "1e400", "-", "01", "0x10", "nul", "'a'", '"\\x"', '"\\ud800"', "[,]", "{,}")
DEEP = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileRequest:
    """One POST; `what` says how it was made, for the report."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    what: str


def hostile_requests(document: Mapping[str, Any], *, seed: int) -> Iterator[HostileRequest]:
    """Requests for the POST routes of an OpenAPI document, for ever; the same for the same seed and document."""
    rng = random.Random(seed)
    routes = sorted(path for path, methods in document["paths"].items() if "post" in methods and path in EXAMPLES)
    fields = {path: _fields_of(document["paths"][path]["post"]) for path in routes}
    while True:
        path = rng.choice(routes)
        make = rng.choices((_one_field, _many_fields, _one_place, _torn, _encoded), weights=(5, 3, 4, 1, 1))[0]
        yield make(rng, path, fields[path])


def _fields_of(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Name to schema of the fields at the top of the body."""
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    fields: dict[str, Any] = dict(schema.get("properties", {}))
    for choice in schema.get("anyOf", ()):
        fields |= choice.get("properties", {})
    return fields


def _one_field(rng: random.Random, path: str, fields: dict[str, Any]) -> HostileRequest:
    name = rng.choice([*fields, "no_such_field"])
    value = _value(rng, fields.get(name, {}))
    return HostileRequest(path=path, body=_json(EXAMPLES[path] | {name: value}), what=f"{name} = {value!r:.80}")


def _many_fields(rng: random.Random, path: str, fields: dict[str, Any]) -> HostileRequest:
    names = rng.sample(list(fields), k=min(len(fields), rng.randint(2, 6)))
    values = {name: _value(rng, fields[name]) for name in names}
    return HostileRequest(path=path, body=_json(EXAMPLES[path] | values), what=f"{values!r:.200}")


def _one_place(rng: random.Random, path: str, fields: dict[str, Any]) -> HostileRequest:
    """Somewhere inside a good body with a structured field, replace, drop or double something."""
    body = json.loads(json.dumps(EXAMPLES[path]))
    if fields:
        name = rng.choice(list(fields))
        body[name] = _plausible(rng, fields[name], depth=0)
    places = list(_places(body))
    holder, key = rng.choice(places)
    match rng.randrange(3):
        case 0:
            holder[key] = _value(rng, {})
        case 1 if isinstance(holder, dict):
            del holder[key]
        case 1:
            holder.append(holder[key])
        case _:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    return HostileRequest(path=path, body=_json(body), what=f"around {key!r}")


def _torn(rng: random.Random, path: str, _: dict[str, Any]) -> HostileRequest:
    body = _json(EXAMPLES[path])
    at = rng.randrange(len(body))
    torn = rng.choice(
        (
            body[:at],
            body + body,
            body[:at] + bytes([rng.randrange(256)]) + body[at:],
            body[:at] + rng.choice(RAW).encode() + body[at + 1 :],
            b"[" * 100_000,
            b'{"a":' * 50_000,
            body[:-1] + b"," + body[1:],  # every key twice
            b" " * 200_000 + body,
        )
    )
    return HostileRequest(path=path, body=torn, what="torn JSON")


def _encoded(rng: random.Random, path: str, _: dict[str, Any]) -> HostileRequest:
    body = _json(EXAMPLES[path])
    kind = rng.choice(
        ("application/json; charset=utf-16", "text/plain", "application/x-www-form-urlencoded", "", "application/json;" * 200)
    )
    return rng.choice(
        (
            HostileRequest(path=path, body=body.decode().encode("utf-16"), what="UTF-16"),
            HostileRequest(path=path, body=b"\xef\xbb\xbf" + body, what="a byte order mark"),
            HostileRequest(path=path, body=body.replace(b"Hello", b"\xff\xfe\x80"), what="no UTF-8"),
            HostileRequest(path=path, body=body, headers={"content-type": kind}, what=f"type {kind:.40}"),
            HostileRequest(path=path, body=body, headers={"content-type": "application/json", "content-encoding": "gzip"}, what="no gzip"),
        )
    )


def _value(rng: random.Random, schema: Mapping[str, Any]) -> Any:
    """Anything: now and then something the schema allows, else the wrong type, an extreme or a monster."""
    match rng.randrange(8):
        case 0 | 1 | 2:
            return _plausible(rng, schema, depth=0)
        case 3:
            return rng.choice(NUMBERS)
        case 4:
            return rng.choice(STRINGS)
        case 5:
            return rng.choice((True, False, None, [], {}, [None], {"": None}, [[]], [{}]))
        case 6:
            return _nested(rng)
        case _:
            return rng.choice(
                (
                    [rng.choice(NUMBERS)] * rng.choice((1, 17, 300, 5000)),
                    [rng.choice(STRINGS)] * rng.choice((1, 17, 300)),
                    {str(number): rng.choice(NUMBERS) for number in range(rng.choice((1, 20, 1100)))},
                    {rng.choice(STRINGS): rng.choice(STRINGS)},
                )
            )


def _nested(rng: random.Random) -> Any:
    value: Any = rng.choice(STRINGS)
    for _ in range(rng.randint(1, DEEP)):
        value = [value] if rng.random() < 0.5 else {rng.choice(("properties", "items", "anyOf", "a", "$ref", "content")): value}
    return value


def _plausible(rng: random.Random, schema: Mapping[str, Any], *, depth: int) -> Any:
    """What a JSON schema describes, at its bounds or just past them."""
    if depth > 6:
        return None
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return _plausible(rng, rng.choice(choices), depth=depth + 1)
    if "enum" in schema or "const" in schema:
        return rng.choice([*schema.get("enum", ()), schema.get("const"), "something else"])
    match schema.get("type"):
        case "boolean":
            return rng.choice((True, False))
        case "integer" | "number":
            bounds = [schema[name] for name in ("minimum", "maximum", "exclusiveMinimum") if name in schema]
            return rng.choice([0, 1, 2, *(int(bound) + step for bound in bounds for step in (-1, 0, 1))])
        case "string":
            return rng.choice((rng.choice(STRINGS), "".join(rng.choices(string.printable, k=rng.randrange(20)))))
        case "array":
            return [_plausible(rng, schema.get("items", {}), depth=depth + 1) for _ in range(rng.choice((0, 1, 2, 5, 20)))]
        case "object":
            named = {
                name: _plausible(rng, each, depth=depth + 1) for name, each in schema.get("properties", {}).items() if rng.random() < 0.7
            }
            return named or {rng.choice(STRINGS): rng.choice(NUMBERS)}
        case _:
            return rng.choice((None, rng.choice(STRINGS), rng.choice(NUMBERS)))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key or index) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _json(body: object) -> bytes:
    """As JSON; a lone surrogate stays an escape, infinities stay the words that Python writes for them."""
    return json.dumps(body, ensure_ascii=True).encode()
