"""Structured output on the default model over HTTP: what is generated is valid and whole, and hostile grammars leave the others alone.

`python -m benchmarks.schemas` does the same 500 times.
"""

import asyncio
import json
import re

import httpx
import pytest
from server_process import RunningServer

from benchmarks.schemas import SCHEMAS, generated, verdict

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

SLOW = "".join(f"r{index} ::= r{index + 1}\n" for index in range(9000)) + 'r9000 ::= "a"\nroot ::= r0'
DEEP = {
    "$ref": "#/$defs/d0",
    "$defs": {
        f"d{index}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{index + 1}"}}, "required": ["a"]} for index in range(2000)
    }
    | {"d2000": {"type": "string"}},
}
CANARY = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}


async def test_a_generation_under_each_schema_ends_by_itself_and_is_valid(default_server: RunningServer):
    async with httpx.AsyncClient(base_url=default_server.url, timeout=200) as client:
        answers = await asyncio.gather(*(generated(client, schema, seed=seed) for seed, schema in enumerate(SCHEMAS.values())))

    verdicts = {name: verdict(SCHEMAS[name], *answer) for name, answer in zip(SCHEMAS, answers, strict=True)}
    assert set(verdicts.values()) == {"stop"}, [(name, answers[at]) for at, name in enumerate(SCHEMAS) if verdicts[name] != "stop"]


async def test_the_same_seed_gives_the_same_value_streamed_or_whole(default_server: RunningServer):
    body = CANARY | {"temperature": 1.0, "seed": 5, "max_tokens": 200, "structured_outputs": {"json": SCHEMAS["person"]}}

    async with httpx.AsyncClient(base_url=default_server.url, timeout=60) as client:
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: {")]

    assert "".join(choice["text"] for event in events for choice in json.loads(event)["choices"]) == whole
    assert list(json.loads(whole)) == ["name", "age", "mood", "alive"]


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["yes", "no", "maybe so"]}, r"yes|no|maybe so"),
        ({"regex": r"[A-Z][a-z]{2,7}, \d{4}"}, r"[A-Z][a-z]{2,7}, \d{4}"),
        ({"grammar": 'root ::= word (" " word){2}\nword ::= [a-z]{1,6}'}, r"[a-z]{1,6}( [a-z]{1,6}){2}"),
        ({"grammar": 'start: "<" NAME ">"\nNAME: /[a-z]{1,6}/'}, r"<[a-z]{1,6}>"),
    ],
)
async def test_the_other_kinds_of_constraint_hold_too(default_server: RunningServer, constraint: dict, pattern: str):
    async with httpx.AsyncClient(base_url=default_server.url, timeout=60) as client:
        body = CANARY | {"temperature": 1.0, "max_tokens": 100, "n": 4, "structured_outputs": constraint}
        choices = (await client.post("/v1/completions", json=body)).json()["choices"]

    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert all(re.fullmatch(pattern, choice["text"]) for choice in choices), choices


async def test_hostile_grammars_leave_tokens_and_the_next_grammar_as_they_are(default_server: RunningServer):
    async with httpx.AsyncClient(base_url=default_server.url, timeout=120) as client:
        before = (await client.post("/v1/completions", json=CANARY)).json()["choices"]

        bombs = [{"guided_grammar": SLOW}, {"guided_json": DEEP}]
        hostile = [asyncio.create_task(client.post("/v1/completions", json=CANARY | bomb)) for bomb in bombs]
        beside = (await client.post("/v1/completions", json=CANARY)).json()["choices"]
        refused = await asyncio.gather(*hostile)
        content, ending = await generated(client, SCHEMAS["person"], seed=1)

    assert beside == before
    slow, deep = (response.json()["error"] for response in refused)
    assert slow["param"] == "guided_grammar" or slow["code"] == "server_overloaded"  # where its two seconds of a processor take twenty
    assert "too deeply" in deep["message"]
    assert verdict(SCHEMAS["person"], content, ending) == "stop"
