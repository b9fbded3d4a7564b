"""Every field of the one table of limits: taken at the cap, refused one past it. A field without such a test fails the last one here."""

import ast
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import HANG, FakeEngineClient, tiny_config
from fastapi import FastAPI
from tiny_tokenizer import tiny_tokenizer

from server.app import create_app
from server.limits import Limits

pytestmark = pytest.mark.anyio

TESTS = Path(__file__).parents[1]
JSON = {"content-type": "application/json"}


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


def app_with(engine: FakeEngineClient | None = None, **limits: float) -> FastAPI:
    """The application with these limits."""
    return create_app(
        client=engine or FakeEngineClient(),
        tokenizer=tiny_tokenizer(),
        model=tiny_config(),
        model_name="tiny",
        limits=replace(Limits(), **limits),
    )


# limit: (cap, the field that is named, the body that holds as much as it is told)
OF_ONE_REQUEST: dict[str, tuple[int, str | None, Callable[[int], dict[str, Any]]]] = {
    "max_prompts": (3, "prompt", lambda size: {"prompt": ["a"] * size}),
    "max_sequences": (3, "n", lambda size: {"prompt": "a", "n": size}),
    "max_logprobs": (3, "logprobs", lambda size: {"logprobs": size}),
    "max_stop_strings": (3, "stop", lambda size: {"stop": ["x"] * size}),
    "max_stop_chars": (3, "stop", lambda size: {"stop": "x" * size}),
    "max_stop_token_ids": (3, "stop_token_ids", lambda size: {"stop_token_ids": [1] * size}),
    "max_logit_bias": (3, "logit_bias", lambda size: {"logit_bias": {str(token): 1 for token in range(size)}}),
    "max_allowed_token_ids": (3, "allowed_token_ids", lambda size: {"allowed_token_ids": [5] * size}),
    "max_bad_words": (3, "bad_words", lambda size: {"bad_words": ["x"] * size}),
    "max_cache_salt_chars": (3, "cache_salt", lambda size: {"cache_salt": "x" * size}),
    "max_timeout_s": (3, "timeout", lambda size: {"timeout": size}),
    "max_fields": (5, None, lambda size: {f"unknown{number}": 1 for number in range(size)}),
    "max_answer_logprobs": (12, "logprobs", lambda size: {"prompt": [7], "n": size, "max_tokens": 1, "logprobs": 0}),
}

# limit: the tests elsewhere that try it at the cap and past it
ELSEWHERE: dict[str, list[str]] = {
    "max_connections": ["test_connections.py::test_connections_are_served_up_to_the_cap_and_refused_past_it"],
    "max_pipelined": ["test_connections.py::test_requests_are_taken_in_advance_up_to_the_limit_and_not_past_it"],
    "write_timeout_s": [
        "test_connections.py::test_an_answer_that_nobody_reads_ends_and_frees_what_it_runs",
        "test_connections.py::test_a_client_that_takes_enough_in_time_is_served_on",
    ],
    "max_header_bytes": [
        "test_http_edge.py::test_headers_are_taken_below_the_limit_and_refused_past_it",
        "test_http_edge.py::test_headers_without_end_are_refused_while_they_come",
    ],
    "max_body_bytes": ["test_http_edge.py::test_a_body_is_taken_at_the_limit_and_refused_past_it"],
    "body_timeout_s": [
        "test_http_edge.py::test_a_body_that_comes_too_slowly_is_408",
        "test_http_edge.py::test_headers_that_come_too_slowly_are_408",
    ],
    "max_messages": ["test_chat.py::test_messages_and_their_rendered_length_are_bounded"],
    "max_rendered_chars": ["test_chat_template.py::test_a_conversation_may_be_as_long_as_the_limit_and_not_one_character_longer"],
    "max_grammar_chars": ["test_grammar_check.py::test_a_grammar_at_the_cap_of_its_size_is_checked_and_one_past_it_is_not"],
    "grammar_timeout_s": ["test_grammar_check.py::test_more_time_and_memory_let_more_through"],
    "grammar_memory_bytes": ["test_grammar_check.py::test_more_time_and_memory_let_more_through"],
    "max_queued_grammars": ["test_grammar_check.py::test_more_grammars_than_may_wait_are_told_to_come_again"],
    "max_queued_sequences": ["test_admission.py::test_sequences_are_let_in_up_to_the_capacity_and_not_past_it"],
    "max_queued_tokens": [
        "test_load_limits.py::test_worst_case_tokens_are_let_in_up_to_what_cache_and_queue_hold_and_not_past_it",
    ],
    "max_tenant_sequences": ["test_load_limits.py::test_a_tenant_has_sequences_open_up_to_its_quota_and_not_past_it"],
    "max_tenant_tokens": ["test_load_limits.py::test_a_tenant_has_worst_case_tokens_open_up_to_its_quota_and_not_past_it"],
    "retry_after_s": ["test_admission.py::test_a_full_server_says_when_to_come_back_and_takes_the_next_when_there_is_room"],
    "max_stored_responses": ["test_response_store.py::test_as_many_responses_as_the_cap_are_kept_and_one_more_drops_the_oldest"],
    "max_stored_bytes": ["test_response_store.py::test_as_many_bytes_as_the_cap_are_kept_and_one_more_drops_the_oldest"],
    "keep_alive_s": ["test_completion_streams.py::test_silence_is_filled_with_comments"],
}

HERE = {"max_headers", "max_all_body_bytes", "max_discarded_bytes", "max_message_chars", "max_ignored_fields"}


@pytest.mark.parametrize("name", OF_ONE_REQUEST)
async def test_a_request_is_taken_at_the_cap_and_refused_past_it(name: str):
    cap, param, body = OF_ONE_REQUEST[name]

    async with client(app_with(**{name: cap})) as http:
        at_the_cap = await http.post("/v1/completions", json=body(cap))
        past_it = await http.post("/v1/completions", json=body(cap + 1))

    assert at_the_cap.status_code == 200, at_the_cap.text
    assert past_it.status_code == 400
    assert past_it.json()["error"]["param"] == param
    assert str(cap) in past_it.json()["error"]["message"]


async def test_headers_are_taken_up_to_their_number_and_refused_past_it():
    async with client(app_with(max_headers=20)) as http:
        num_own = len((http.build_request("GET", "/livez")).headers)
        at_the_cap = await http.get("/livez", headers={f"x-{number}": "1" for number in range(20 - num_own)})
        past_it = await http.get("/livez", headers={f"x-{number}": "1" for number in range(21 - num_own)})

    assert at_the_cap.status_code == 200
    assert (past_it.status_code, past_it.json()["error"]["code"]) == (431, "headers_too_large")
    assert "21 headers, the limit is 20" in past_it.json()["error"]["message"]


@asynccontextmanager
async def open_streams(app: FastAPI, engine: FakeEngineClient, *contents: bytes) -> AsyncIterator[None]:
    """Requests with these bodies whose answers go on meanwhile."""
    async with client(app) as http:
        tasks = [asyncio.create_task(http.post("/v1/completions", content=content, headers=JSON)) for content in contents]
        while engine.num_open < len(contents):
            await asyncio.sleep(0.001)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def body_of(num_bytes: int, *, timeout: float = 0.05) -> bytes:
    start = b'{"prompt": [7], "timeout": %g, "user": "' % timeout
    return start + b"x" * (num_bytes - len(start) - 2) + b'"}'


async def test_bodies_are_held_up_to_the_cap_of_all_together_and_refused_past_it():
    engine = FakeEngineClient(script=lambda _: [HANG])
    app = app_with(engine, max_all_body_bytes=1000)
    hanging = body_of(391, timeout=60)

    async with client(app) as http:
        async with open_streams(app, engine, hanging, hanging):
            at_the_cap = await http.post("/v1/completions", content=body_of(1000 - 2 * 391), headers=JSON)
            past_it = await http.post("/v1/completions", content=body_of(1001 - 2 * 391), headers=JSON)
        afterwards = await http.post("/v1/completions", content=body_of(1000), headers=JSON)

    assert at_the_cap.status_code == afterwards.status_code == 504  # they ran, into their timeout
    assert (past_it.status_code, past_it.json()["error"]["code"]) == (503, "server_overloaded")
    assert past_it.headers["retry-after"]


@pytest.mark.parametrize("num_sent", [12, 13, 1000])
async def test_of_a_refused_body_is_read_up_to_the_cap_and_no_more(num_sent: int):
    num_read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(num_sent):
            num_read += 1
            yield b" " * 100

    async with client(app_with(max_body_bytes=100, max_discarded_bytes=1000)) as http, aclosing(body()) as content:
        answer = await http.post("/v1/completions", content=content, headers=JSON)

    assert answer.status_code == 413
    assert num_read == 12  # one that is taken, one that is too much, ten to discard


@pytest.mark.parametrize("cap", [50, 51, 400])
async def test_a_message_is_told_up_to_the_cap_and_shortened_past_it(cap: int):
    engine = FakeEngineClient()
    async with client(app_with(engine, max_message_chars=cap)) as http:
        engine.refusal = "x" * cap
        at_the_cap = (await http.post("/v1/completions", json={"prompt": [7]})).json()["error"]["message"]
        engine.refusal = "x" * (cap + 1)
        past_it = (await http.post("/v1/completions", json={"prompt": [7]})).json()["error"]["message"]

    assert at_the_cap == "x" * cap
    assert len(past_it) <= cap
    assert " ... " in past_it


async def test_ignored_fields_are_named_up_to_the_cap_and_hinted_at_past_it():
    async with client(app_with(max_ignored_fields=2)) as http:
        at_the_cap = await http.post("/v1/completions", json={"a": 1, "b": 1})
        past_it = await http.post("/v1/completions", json={"a": 1, "b": 1, "c": 1})

    assert at_the_cap.headers["x-ignored-fields"] == "a, b"
    assert past_it.headers["x-ignored-fields"] == "a, b, ..."


def test_every_limit_is_tried_at_the_cap_and_past_it():
    tried = [*OF_ONE_REQUEST, *ELSEWHERE, *HERE]

    assert sorted(tried) == sorted(field.name for field in fields(Limits)), "a limit without a test at the cap and past it, or with two"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_tests_of_a_limit_exist(name: str):
    for place in ELSEWHERE[name]:
        name, _, function = place.partition("::")
        (path,) = TESTS.glob(f"*/{name}")
        tree = ast.parse(path.read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}, place
