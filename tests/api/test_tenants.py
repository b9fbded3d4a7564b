"""Whose a request is, what it may share, and which of two goes first: from the fields to the request that the engine gets."""

import httpx
import pytest
from fake_engine import FakeEngineClient

from engine.types import GenerationRequest
from server.plan import composed_salt

pytestmark = pytest.mark.anyio


async def submitted(http: httpx.AsyncClient, engine: FakeEngineClient, **fields: object) -> GenerationRequest:
    """The one request that the engine gets for a body with these fields."""
    response = await http.post("/v1/completions", json={"prompt": [7], "max_tokens": 1} | fields)
    assert response.status_code == 200, response.text
    return engine.submitted.pop()


async def test_requests_of_one_user_are_one_tenant_and_those_without_another(http: httpx.AsyncClient, engine: FakeEngineClient):
    tenants = [(await submitted(http, engine, user=user)).tenant for user in ("ann", "ann", "bob", None, "")]

    assert tenants[0] == tenants[1] != tenants[2]
    assert tenants[3] == tenants[4] == ""
    assert "" not in tenants[:3]


async def test_a_tenant_is_short_and_tells_no_name(http: httpx.AsyncClient, engine: FakeEngineClient):
    tenant = (await submitted(http, engine, user="ann@example.org" * 1000)).tenant

    assert len(tenant) < 64
    assert "ann" not in tenant


async def test_the_priority_reaches_the_engine_as_it_is(http: httpx.AsyncClient, engine: FakeEngineClient):
    priorities = [(await submitted(http, engine, priority=priority)).priority for priority in (-1000, 0, 1000, None)]

    assert priorities == [-1000, 0, 1000, 0]


async def test_every_sequence_of_a_request_has_its_tenant_priority_and_salt(http: httpx.AsyncClient, engine: FakeEngineClient):
    body = {"prompt": [[7], [8]], "n": 2, "max_tokens": 1, "user": "ann", "priority": 3, "cache_salt": "s"}

    await http.post("/v1/completions", json=body)

    assert len(engine.submitted) == 4
    assert len({(request.tenant, request.priority, request.cache_salt) for request in engine.submitted}) == 1


async def test_a_salt_divides_the_prefix_cache_and_a_user_does_not(http: httpx.AsyncClient, engine: FakeEngineClient):
    salts = [
        (await submitted(http, engine, **fields)).cache_salt
        for fields in ({}, {"user": "ann"}, {"cache_salt": "s"}, {"cache_salt": "s", "user": "bob"}, {"cache_salt": "t"})
    ]

    assert salts[0] == salts[1]
    assert salts[2] == salts[3]
    assert len({salts[0], salts[2], salts[4]}) == 3


def test_no_salt_of_one_key_can_be_made_to_look_like_that_of_another():
    parts = ["", "a", "b", "ab", ":", "1:a", "0:", "1:a:"]

    salts = {composed_salt(salt, key_tenant=tenant) for tenant in parts for salt in parts}

    assert len(salts) == len(parts) ** 2
