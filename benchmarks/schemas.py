"""Generations under 20 JSON schemas that bound their sizes, over HTTP: every one must end with `stop` and be valid.

    python -m benchmarks.schemas [--model DIR] [--each N] [--at-once N]

Half of them are asked of completions, half of chat, each with a seed of its own at temperature 1. Prints how they ended, and keeps it in
`benchmarks/results/schemas.json`. Exits with status 1 where one did not end with `stop` or is not valid.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs

from benchmarks.serving import machine, running_server
from server.settings import default_model_dir

RESULTS = Path(__file__).parent / "results" / "schemas.json"
PROMPT = "The bear and the fox as JSON:"
MAX_TOKENS = 900  # what a context of 1,024 leaves beside the prompt


def text(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


def integer(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def record(*, optional: dict[str, Any] | None = None, **properties: Any) -> dict[str, Any]:
    """An object with these properties, the optional ones last, and no others."""
    fields = properties | (optional or {})
    return {"type": "object", "properties": fields, "required": [*properties], "additionalProperties": False}


def some(items: dict[str, Any], *, most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SCHEMAS: dict[str, dict[str, Any]] = {
    "truth": {"type": "boolean"},
    "number in a range": integer(-5, 1200),
    "one of a few": {"enum": ["red", "green", 'dark "blue"', "漢字\n", 7, None, True, ["x"]]},
    "string": {"type": "string", "minLength": 3, "maxLength": 40},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{1,8} [0-9]{2,4}$"},
    "date": record(day={"type": "string", "format": "date"}),
    "identifier": record(id={"type": "string", "format": "uuid"}, address={"type": "string", "format": "ipv4"}),
    "person": record(name=text(20), age=integer(0, 120), mood={"enum": ["happy", "sad", "angry"]}, alive={"type": "boolean"}),
    "person perhaps": {"anyOf": [record(name=text(20), age=integer(0, 120)), {"type": "null"}]},
    "numbers": some(integer(0, 9), least=1, most=20),
    "people": some(record(name=text(12), age=integer(0, 99)), most=3),
    "pair": {"type": "array", "prefixItems": [text(10), integer(1, 6)], "items": False, "minItems": 2},
    "nested": record(house=record(room=record(table=record(plates=integer(0, 12), colour=text(8))))),
    "references": {
        "$defs": {"point": record(x=integer(-99, 99), y=integer(-99, 99))},
        **record(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}, way=some({"$ref": "#/$defs/point"}, most=3)),
    },
    "optional": record(title=text(16), optional={"year": integer(1900, 2100), "pages": integer(1, 999), "tags": some(text(8), most=3)}),
    "either kind": {
        "oneOf": [
            record(kind={"const": "cat"}, lives=integer(1, 9)),
            record(kind={"const": "dog"}, tricks=some({"enum": ["sit", "roll", "fetch"]}, most=3)),
        ]
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 10}, {"type": "integer", "maximum": 99}, {"multipleOf": 5}]},
    "mixture": some({"anyOf": [{"type": "boolean"}, {"type": "null"}, integer(0, 999), text(6)]}, least=2, most=6),
    "matrix": some(some(integer(0, 1), least=3, most=3), least=3, most=3),
    "call": record(name={"const": "search"}, arguments=record(query=text(30), limit=integer(1, 50), sort={"enum": ["new", "old"]})),
}


async def generated(client: httpx.AsyncClient, schema: dict[str, Any], *, seed: int) -> tuple[str, str]:
    """What was generated, and how it ended. Even seeds ask for a completion, odd ones chat."""
    body = {
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": seed,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    }
    if seed % 2:
        response = await client.post("/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": PROMPT}]})
    else:
        response = await client.post("/v1/completions", json=body | {"prompt": PROMPT})
    if response.status_code != 200:
        return response.text, str(response.status_code)
    (choice,) = response.json()["choices"]
    return choice["message"]["content"] if seed % 2 else choice["text"], choice["finish_reason"]


def verdict(schema: dict[str, Any], content: str, ending: str) -> str:
    """`stop` for a valid value that ended so, else what was wrong."""
    if ending != "stop":
        return ending
    try:
        value = json.loads(content)
    except ValueError:
        return "no JSON"
    return "stop" if jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value) else "not valid"


def main() -> None:
    parser = argparse.ArgumentParser(description="Generations under JSON schemas that bound their sizes.")
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--each", type=int, default=25, help="generations under each schema")
    parser.add_argument("--at-once", type=int, default=32, help="requests open at the same time")
    arguments = parser.parse_args()
    with running_server(arguments.model) as (url, _):
        before_s = time.monotonic()
        endings, examples, failures = asyncio.run(run(url, each=arguments.each, at_once=arguments.at_once))
        took_s = time.monotonic() - before_s
    for name, counts in endings.items():
        print(f"{name:20} {dict(counts)}  {examples[name][:90]}")
    total = sum(endings.values(), Counter[str]())
    print(f"{sum(total.values())} generations in {took_s:.0f} s: {dict(total)}")
    result = {
        "schemas": len(SCHEMAS),
        "generations": sum(total.values()),
        "at_once": arguments.at_once,
        "endings": total,
        "failures": failures,
    }
    RESULTS.write_text(json.dumps({"machine": machine(), "model": arguments.model.name, **result}, indent=1, ensure_ascii=False) + "\n")
    sys.exit(total != Counter({"stop": total.total()}))


async def run(url: str, *, each: int, at_once: int) -> tuple[dict[str, Counter[str]], dict[str, str], list[list[str]]]:
    """How the generations under each schema ended, one example of each, and what went wrong."""
    endings: dict[str, Counter[str]] = {name: Counter() for name in SCHEMAS}
    examples: dict[str, str] = {}
    failures: list[list[str]] = []
    places = asyncio.Semaphore(at_once)

    async def one(name: str, seed: int) -> None:
        async with places:
            content, ending = await generated(client, SCHEMAS[name], seed=seed)
        judged = verdict(SCHEMAS[name], content, ending)
        endings[name][judged] += 1
        examples[name] = content
        if judged != "stop":
            failures.append([name, judged, content[:300]])

    async with httpx.AsyncClient(base_url=url, timeout=600) as client, asyncio.TaskGroup() as tasks:
        for seed in range(each):
            for name in SCHEMAS:
                tasks.create_task(one(name, seed))
    return endings, examples, failures


if __name__ == "__main__":
    main()
