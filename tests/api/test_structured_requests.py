"""Structured output through the front door: what grammar the engine gets, and how what cannot be followed is refused."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient, tiny_config
from fastapi import FastAPI
from tiny_tokenizer import tiny_tokenizer

from engine.types import FinishReason, TokenDelta
from server.app import create_app
from server.grammar_check import GrammarCheck
from server.limits import Limits
from server.structured_output import json_grammar

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "point", "schema": SCHEMA}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
}

every_endpoint = pytest.mark.parametrize("path", BODIES)


async def asked(http: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    return await http.post(path, json=BODIES[path] | fields)


async def grammar_of(http: httpx.AsyncClient, engine: FakeEngineClient, path: str, **fields: Any) -> str | None:
    """What the engine gets with a request of these fields."""
    response = await asked(http, path, **fields)
    assert response.status_code == 200, response.text
    return engine.submitted.pop().grammar


async def refusal(http: httpx.AsyncClient, path: str, **fields: Any) -> dict[str, Any]:
    response = await asked(http, path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] is None
    return error


async def refusal_with_code(http: httpx.AsyncClient, **fields: Any) -> str:
    """The message of a grammar's end."""
    error = (await asked(http, "/v1/completions", **fields)).json()["error"]
    assert error["code"] == "grammar_limit"
    return error["message"]


@every_endpoint
async def test_a_request_without_a_form_has_no_grammar(http: httpx.AsyncClient, engine: FakeEngineClient, path: str):
    assert await grammar_of(http, engine, path) is None
    assert await grammar_of(http, engine, path, response_format={"type": "text"}) is None


@every_endpoint
async def test_the_engine_gets_the_schemas_grammar(http: httpx.AsyncClient, engine: FakeEngineClient, path: str):
    expected = json_grammar(SCHEMA, param="", limits=Limits())

    for fields in (
        {"response_format": RESPONSE_FORMAT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ):
        assert await grammar_of(http, engine, path, **fields) == expected


@every_endpoint
async def test_the_engine_gets_ebnf_as_lark(http: httpx.AsyncClient, engine: FakeEngineClient, path: str):
    grammar = await grammar_of(http, engine, path, structured_outputs={"grammar": 'root ::= "a" digit\ndigit ::= [0-9]'})

    assert grammar is not None
    assert "start:" in grammar


async def test_each_choice_follows_the_grammar(http: httpx.AsyncClient, engine: FakeEngineClient):
    await asked(http, "/v1/completions", prompt=["a", "b"], n=2, guided_choice=["yes", "no"])

    assert len(engine.submitted) == 4
    assert len({request.grammar for request in engine.submitted}) == 1
    assert engine.submitted[0].grammar is not None


@every_endpoint
@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "text"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}}, "response_format", "not"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": {"enum": []}}}, "structured_outputs", "Unsatisfiable"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs", "missing"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "one or more strings"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-ahead"),
        ({"response_format": RESPONSE_FORMAT, "guided_regex": "a"}, "guided_regex", "response_format and guided_regex"),
    ],
)
async def test_what_cannot_be_followed_is_refused_before_the_engine_sees_it(
    http: httpx.AsyncClient, engine: FakeEngineClient, path: str, fields: dict[str, Any], param: str, told: str
):
    error = await refusal(http, path, **fields)

    assert error["param"] == param
    assert told in error["message"]
    assert not engine.submitted


async def test_a_stream_is_refused_with_a_status_too(http: httpx.AsyncClient):
    error = await refusal(http, "/v1/completions", structured_outputs={"regex": "["}, stream=True)

    assert error["param"] == "structured_outputs"


async def test_deeply_nested_schemas_are_refused_whichever_way_they_come(http: httpx.AsyncClient):
    nested: dict[str, Any] = {}
    for _ in range(150):
        nested = {"items": nested}

    for fields in ({"guided_json": nested}, {"guided_json": json.dumps(nested)}, {"guided_json": '{"items":' * 10_000}):
        assert (await refusal(http, "/v1/completions", **fields))["param"] == "guided_json"


async def test_a_schema_at_the_cap_of_its_size_is_taken_and_one_past_it_is_not(http: httpx.AsyncClient):
    room = Limits().max_grammar_chars - len(json_grammar({"description": ""}, param="", limits=Limits()))

    taken = await asked(http, "/v1/completions", guided_json={"description": "x" * room})
    error = await refusal(http, "/v1/completions", guided_json={"description": "x" * (room + 1)})

    assert taken.status_code == 200
    assert error["param"] == "guided_json"
    assert "262,145 characters, the limit is 262,144" in error["message"]


async def test_a_generation_that_its_grammar_ends_is_the_clients_to_mend(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request.request_id, (80,), finish_reason=FinishReason.GRAMMAR)]

    response = await asked(http, "/v1/completions", guided_regex="a+")

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "grammar_limit"


async def test_a_generation_that_nothing_is_left_for_hears_of_the_other_fields(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request.request_id, (), finish_reason=FinishReason.GRAMMAR)]

    alone = await refusal_with_code(http, guided_regex="a+")
    narrowed = await refusal_with_code(http, guided_regex="a+", allowed_token_ids=[5])

    assert "allowed_token_ids" not in alone
    assert "no token was left" in narrowed
    assert "allowed_token_ids" in narrowed


async def test_without_a_tokenizer_there_are_no_grammars(idless_app: FastAPI):
    transport = httpx.ASGITransport(idless_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        error = await refusal(http, "/v1/completions", prompt=[5], guided_regex="a")

    assert error["param"] == "guided_regex"
    assert "without a tokenizer" in error["message"]


async def test_while_too_many_grammars_wait_a_request_may_come_again(engine: FakeEngineClient, tokenizer_path: Path, limits: Limits):
    few = replace(limits, max_queued_grammars=1, grammar_timeout_s=0.5)
    check = GrammarCheck(tokenizer_path=tokenizer_path, vocab_size=420, eos_token=2, limits=few)
    app = create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", limits=few, grammar_check=check)
    slow = "".join(f"r{index} ::= r{index + 1}\n" for index in range(9000)) + 'r9000 ::= "a"\nroot ::= r0'

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answers = await asyncio.gather(
            *(asked(http, "/v1/completions", user="mallory", guided_grammar=f"{slow}\n# {index}") for index in range(5))
        )

    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} <= {400, 503}  # on a machine that is very busy, a check is given up, too
    assert len(refused) >= 3  # all but the one that is checked and the one that waits
    assert {answer.json()["error"]["code"] for answer in refused} == {"server_overloaded"}
    assert all("retry-after" in answer.headers for answer in refused)


async def test_a_hostile_grammar_delays_nobody(http: httpx.AsyncClient):
    slow = "".join(f"r{index} ::= r{index + 1}\n" for index in range(9000)) + 'r9000 ::= "a"\nroot ::= r0'
    await asked(http, "/v1/completions", guided_regex="warm")

    hostile = asyncio.create_task(asked(http, "/v1/completions", guided_grammar=slow))
    await asyncio.sleep(0.05)
    for _ in range(10):
        plain = await asked(http, "/v1/completions")
        assert plain.status_code == 200

    assert not hostile.done()
    assert (await hostile).status_code in (400, 503)  # on a machine that is very busy, its check is given up
