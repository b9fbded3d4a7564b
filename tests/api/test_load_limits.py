"""How much may be open at once, of all and of one tenant: each bound at the cap and past it, over everything that a request fans out to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from fake_engine import HANG, FakeEngineClient, engine_info
from fastapi import FastAPI
from tiny_tokenizer import tiny_tokenizer

from server.limits import Limits

pytestmark = pytest.mark.anyio

CACHE_TOKENS = 4 * 16


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(info=replace(engine_info(max_num_seqs=8), num_blocks=4, block_size=16))


def limited(**limits: int):
    """The application with these limits."""
    return pytest.mark.parametrize("limits", [replace(Limits(), **limits)])


@asynccontextmanager
async def held(http: httpx.AsyncClient, engine: FakeEngineClient, *bodies: dict) -> AsyncIterator[None]:
    """Requests that are open meanwhile."""
    engine.script = lambda _: [HANG]
    tasks = [asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies]
    num_before = engine.num_open
    while engine.num_open - num_before < sum(len(body["prompt"]) * body.get("n", 1) for body in bodies):
        assert not any(task.done() for task in tasks), "one was not let in"
        await asyncio.sleep(0.001)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def attempt(http: httpx.AsyncClient, **body: object) -> httpx.Response:
    """The answer to a request that ends by itself soon after it was let in."""
    return await http.post("/v1/completions", json={"timeout": 0.05} | body)


def prompts(*lengths: int) -> list[list[int]]:
    return [[7] * length for length in lengths]


@limited(max_queued_tokens=36)
async def test_worst_case_tokens_are_let_in_up_to_what_cache_and_queue_hold_and_not_past_it(
    http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI
):
    async with held(http, engine, {"prompt": prompts(10), "max_tokens": 40}):
        at_the_cap = await attempt(http, prompt=prompts(20), max_tokens=30)
        past_it = await attempt(http, prompt=prompts(20), max_tokens=31)

    assert at_the_cap.status_code == 504  # it ran, into its timeout
    assert (past_it.status_code, past_it.json()["error"]["code"]) == (503, "server_overloaded")
    assert "50 of 100 tokens" in past_it.json()["error"]["message"]
    assert past_it.headers["retry-after"]
    assert app.state.services.admission.open == (0, 0)


@limited(max_queued_tokens=36)
@pytest.mark.parametrize("fields", [{"n": 2}, {"n": 1, "best_of": 2}])
async def test_every_candidate_of_every_prompt_counts(http: httpx.AsyncClient, engine: FakeEngineClient, fields: dict):
    at_the_cap = await attempt(http, prompt=prompts(10, 12), max_tokens=14, **fields)
    past_it = await attempt(http, prompt=prompts(10, 13), max_tokens=14, **fields)

    assert at_the_cap.status_code == 200
    assert past_it.status_code == 400
    assert past_it.json()["error"]["message"].startswith("the request asks for 102 tokens, this server holds 100; lower max_tokens")
    assert past_it.headers["x-should-retry"] == "false"
    assert len(engine.submitted) == 4


@limited(max_queued_tokens=36)
async def test_the_default_length_counts_too(http: httpx.AsyncClient, engine: FakeEngineClient):
    async with held(http, engine, {"prompt": prompts(10), "max_tokens": 40}):
        at_the_cap = await attempt(http, prompt=prompts(34))
        past_it = await attempt(http, prompt=prompts(35))

    assert (at_the_cap.status_code, past_it.status_code) == (504, 503)


@limited(max_queued_tokens=0)
async def test_a_text_is_refused_for_the_tokens_it_turns_out_to_have_and_holds_nothing(
    http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI
):
    text = "Once upon a time"
    num_tokens = len(tiny_tokenizer().encode(text))
    async with held(http, engine, {"prompt": prompts(10), "max_tokens": CACHE_TOKENS - 10 - num_tokens - 1}):
        at_the_cap = await attempt(http, prompt=text, max_tokens=1)
        past_it = await attempt(http, prompt=text, max_tokens=2)
        num_open = app.state.services.admission.num_open

    assert (at_the_cap.status_code, past_it.status_code) == (504, 503)
    assert num_open == 1


@limited(max_queued_tokens=0)
async def test_what_is_too_much_whatever_the_text_is_refused_before_anything_is_tokenised(idless_app: FastAPI, engine: FakeEngineClient):
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(idless_app), base_url="http://test") as http,
        held(http, engine, {"prompt": prompts(10), "max_tokens": 40}),
    ):
        refused = await attempt(http, prompt=["Once", "upon"], max_tokens=7)
        tokenised = await attempt(http, prompt=["Once", "upon"], max_tokens=6)

    assert refused.json()["error"]["code"] == "server_overloaded"
    assert "tokenizer" in tokenised.json()["error"]["message"]


@limited(max_tenant_sequences=3)
async def test_a_tenant_has_sequences_open_up_to_its_quota_and_not_past_it(http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI):
    async with held(http, engine, {"prompt": prompts(1, 1), "user": "ann"}, {"prompt": prompts(1, 1), "user": "bob"}):
        at_the_cap = await attempt(http, prompt=prompts(1), user="ann")
        past_it = await attempt(http, prompt=prompts(1, 1), user="ann")
        others = [await attempt(http, prompt=prompts(1), user="bob"), await attempt(http, prompt=prompts(1, 1, 1))]
    afterwards = await attempt(http, prompt=prompts(1, 1, 1), user="ann")

    assert at_the_cap.status_code == afterwards.status_code == 504
    assert [other.status_code for other in others] == [504, 504]
    assert past_it.status_code == 429
    assert past_it.json()["error"] == {
        "message": past_it.json()["error"]["message"],
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert "2 sequences of this tenant are open and 2 more are asked for, 3 may be" in past_it.json()["error"]["message"]
    assert (past_it.headers["retry-after"], past_it.headers["retry-after-ms"]) == ("1", "1000")
    assert "x-should-retry" not in past_it.headers
    assert app.state.services.admission.open == (0, 0)


@limited(max_tenant_tokens=60)
async def test_a_tenant_has_worst_case_tokens_open_up_to_its_quota_and_not_past_it(http: httpx.AsyncClient, engine: FakeEngineClient):
    async with held(http, engine, {"prompt": prompts(10), "max_tokens": 20, "user": "ann"}):
        at_the_cap = await attempt(http, prompt=prompts(20), max_tokens=10, user="ann")
        past_it = await attempt(http, prompt=prompts(20), max_tokens=11, user="ann")
        of_another = await attempt(http, prompt=prompts(20), max_tokens=11, user="bob")

    assert (at_the_cap.status_code, past_it.status_code, of_another.status_code) == (504, 429, 504)
    assert (past_it.json()["error"]["code"], past_it.json()["error"]["type"]) == ("rate_limit_exceeded", "tokens")


@limited(max_tenant_sequences=3, max_tenant_tokens=60)
@pytest.mark.parametrize("body", [{"prompt": prompts(1, 1), "n": 2, "max_tokens": 1}, {"prompt": prompts(31), "max_tokens": 30}])
async def test_what_is_beyond_the_quota_by_itself_is_the_clients_mistake(http: httpx.AsyncClient, body: dict):
    refused = await attempt(http, **body)

    assert refused.status_code == 400
    assert "one tenant of this server may hold" in refused.json()["error"]["message"]


@limited(max_tenant_tokens=60)
async def test_a_quota_counts_for_requests_without_a_user_together(http: httpx.AsyncClient, engine: FakeEngineClient):
    async with held(http, engine, {"prompt": prompts(10), "max_tokens": 40}):
        assert (await attempt(http, prompt=prompts(10), max_tokens=1)).status_code == 429


async def test_by_default_one_tenant_may_have_all_that_the_server_takes(http: httpx.AsyncClient, engine: FakeEngineClient):
    limits = Limits()
    engine.script = lambda _: [HANG]

    async with held(http, engine, {"prompt": prompts(*[1] * limits.max_prompts), "n": 2, "max_tokens": 63, "timeout": 5}):
        one_more = await attempt(http, prompt=prompts(*[1] * 8), max_tokens=63)
        past_it = await attempt(http, prompt=prompts(*[1] * 9), max_tokens=63)

    assert one_more.status_code == 504
    assert past_it.json()["error"]["code"] == "server_overloaded"
    assert limits.max_queued_tokens >= limits.max_queued_sequences * 8192  # Grok-1's whole context


async def test_tokens_are_given_back_whatever_the_end(http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI):
    engine.script = lambda _: [RuntimeError("broken")]
    bodies = [{"prompt": [7], "timeout": 0.01}, {"prompt": "word " * 400}, {"prompt": [100_000]}, {"prompt": [7], "stream": True}]

    for body in bodies:
        await http.post("/v1/completions", json=body)

    assert app.state.services.admission.open == (0, 0)
