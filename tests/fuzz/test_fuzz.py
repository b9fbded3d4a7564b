"""Hostile requests against the application over an engine that follows a script; `make fuzz` does the same to a real server."""

import itertools
from collections.abc import AsyncIterator

import httpx
import pytest
import schemathesis
from fake_engine import FakeEngineClient, tiny_config
from fastapi import FastAPI
from hostile import EXAMPLES, hostile_requests
from hypothesis import HealthCheck, Phase, settings
from tiny_tokenizer import tiny_tokenizer
from verdict import complaint

from server.app import create_app

pytestmark = pytest.mark.anyio

NUM_REQUESTS = 1500
BATCH = 100
CANARY = {"prompt": [5, 6, 7], "max_tokens": 5, "seed": 3, "return_token_ids": True}


def an_app() -> FastAPI:
    return create_app(client=FakeEngineClient(), tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny")


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(an_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as client:
        yield client


async def canary(http: httpx.AsyncClient) -> list[int]:
    answer = await http.post("/v1/completions", json=CANARY)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


async def test_every_route_that_takes_a_body_has_an_example_and_it_is_answered(http: httpx.AsyncClient):
    document = (await http.get("/openapi.json")).json()
    routes = {path for path, methods in document["paths"].items() if "post" in methods and "requestBody" in methods["post"]}

    assert routes <= set(EXAMPLES)
    for path in routes:
        assert (await http.post(path, json=EXAMPLES[path])).status_code == 200, path


async def test_hostile_requests_cost_the_next_one_nothing(http: httpx.AsyncClient):
    document = (await http.get("/openapi.json")).json()
    before = await canary(http)
    complaints: list[str] = []

    for number, request in enumerate(itertools.islice(hostile_requests(document, seed=1), NUM_REQUESTS), start=1):
        answer = await http.post(request.path, content=request.body, headers=request.headers)
        if wrong := complaint(request.path, answer.status_code, answer.headers, answer.content):
            complaints.append(f"{request.path}, {request.what}: {wrong}")
        if number % BATCH == 0:
            assert await canary(http) == before, complaints

    assert complaints == []


schema = schemathesis.openapi.from_asgi("/openapi.json", an_app())


@schema.parametrize()
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_what_the_openapi_document_allows_is_never_our_failure(case: schemathesis.Case):
    response = case.call()

    assert response.status_code < 500 or response.status_code == 504, response.text
