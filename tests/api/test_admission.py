"""When the server says not now: full, loading, restarting, shutting down. A place is given back by whatever door it is left."""

import asyncio
from dataclasses import replace

import httpx
import pytest
from fake_engine import HANG, FakeEngineClient, engine_info
from fastapi import FastAPI

from server.admission import Admission
from server.errors import InvalidRequest, Unavailable
from server.limits import Limits

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(info=engine_info(max_num_seqs=2))


@pytest.fixture
def limits() -> Limits:
    return replace(Limits(), max_queued_sequences=3, retry_after_s=1.5)


def test_sequences_are_let_in_up_to_the_capacity_and_not_past_it(engine: FakeEngineClient, limits: Limits):
    admission = Admission(engine, limits=limits)

    with admission.permit(3), admission.permit(2):
        with pytest.raises(Unavailable, match="5 of 5") as refusal, admission.permit(1):
            pass
        assert refusal.value.code == "server_overloaded"
        assert admission.num_open == 5

    assert admission.num_open == 0


def test_a_request_that_could_never_fit_is_the_clients_mistake(engine: FakeEngineClient, limits: Limits):
    admission = Admission(engine, limits=limits)

    with pytest.raises(InvalidRequest, match="holds 5"), admission.permit(6):
        pass


def test_a_place_is_given_back_after_a_failure(engine: FakeEngineClient, limits: Limits):
    admission = Admission(engine, limits=limits)

    with pytest.raises(RuntimeError), admission.permit(5):
        raise RuntimeError

    assert admission.num_open == 0


async def test_a_full_server_says_when_to_come_back_and_takes_the_next_when_there_is_room(
    http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI
):
    engine.script = lambda _: [HANG]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(http.post("/v1/completions", json={"prompt": [7], "n": 5, "timeout": 0.3}))
        while engine.num_open < 5:
            await asyncio.sleep(0.001)
        refused = await http.post("/v1/completions", json={"prompt": [7]})

    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "server_overloaded"
    assert refused.headers["retry-after"] == "2"
    assert refused.headers["retry-after-ms"] == "1500"
    assert "x-should-retry" not in refused.headers
    assert running.result().status_code == 504
    assert app.state.services.admission.num_open == 0


async def test_before_the_first_readiness_nothing_is_taken(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info, engine.is_ready = None, False

    loading = await http.post("/v1/completions", json={})

    assert (loading.status_code, loading.json()["error"]["code"]) == (503, "model_loading")
    assert loading.headers["retry-after"]


async def test_a_request_that_comes_while_the_engine_restarts_is_answered_afterwards(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.die()
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(http.post("/v1/completions", json={"prompt": [7], "max_tokens": 3}))
        while not engine.num_open:
            await asyncio.sleep(0.001)
        unready = await http.get("/readyz")
        assert not waiting.done()
        engine.revive()

    assert (unready.status_code, unready.json()["status"]) == (503, "engine_restarting")
    assert waiting.result().status_code == 200
    assert waiting.result().json()["usage"]["completion_tokens"] == 3
    assert (await http.get("/readyz")).status_code == 200


async def test_what_cannot_wait_for_the_restarted_engine_is_told_so(http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI):
    engine.die()
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(http.post("/v1/completions", json={"prompt": [7], "n": 5}))
        while engine.num_open < 5:
            await asyncio.sleep(0.001)
        refused = await http.post("/v1/completions", json={"prompt": [7]})
        engine.revive()

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
    assert refused.headers["retry-after"]
    assert waiting.result().status_code == 200
    assert app.state.services.admission.num_open == 0


async def test_a_timeout_that_passes_while_the_engine_restarts_is_kept(http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI):
    engine.die()

    late = await http.post("/v1/completions", json={"prompt": [7], "timeout": 0.05})

    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert app.state.services.admission.num_open == 0


async def test_a_client_that_leaves_while_the_engine_restarts_gives_its_place_back(engine: FakeEngineClient, live_url: str, app: FastAPI):
    engine.die()

    async with httpx.AsyncClient(timeout=0.2) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{live_url}/v1/completions", json={"prompt": [7]})

    async with asyncio.timeout(10):
        while app.state.services.admission.num_open:
            await asyncio.sleep(0.01)
    assert engine.num_open == 0


async def test_a_retiring_server_is_unready_and_still_takes_requests(http: httpx.AsyncClient, app: FastAPI):
    app.state.services.admission.retire()

    unready = await http.get("/readyz")
    taken = await http.post("/v1/completions", json={"prompt": [7]})

    assert (unready.status_code, unready.json()["status"]) == (503, "shutting_down")
    assert taken.status_code == 200


def test_a_retiring_server_answers_each_connection_once_more_and_closes_it(live_url: str, app: FastAPI):
    with httpx.Client(base_url=live_url) as client:
        kept = client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
        app.state.services.admission.retire()
        last = client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
        stream = client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1, "stream": True})

    assert "connection" not in kept.headers
    assert (last.status_code, last.headers["connection"]) == (200, "close")
    assert (stream.status_code, stream.headers["connection"]) == (200, "close")
    assert stream.text.endswith("data: [DONE]\n\n")


async def test_a_draining_server_is_unready_and_finishes_what_runs(http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI):
    engine.pause_s = 0.02
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(http.post("/v1/completions", json={"prompt": [7], "max_tokens": 5}))
        while not engine.num_open:
            await asyncio.sleep(0.001)
        app.state.services.admission.drain()
        refused = await http.post("/v1/completions", json={})
        unready = await http.get("/readyz")

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"]
    assert (unready.status_code, unready.json()["status"]) == (503, "shutting_down")
    assert running.result().status_code == 200


async def test_what_a_shutdown_cuts_short_is_told_so(http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI):
    engine.script = lambda _: [HANG]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(http.post("/v1/completions", json={"prompt": [7]}))
        while not engine.num_open:
            await asyncio.sleep(0.001)
        app.state.services.admission.drain()
        engine.give_up()

    assert (running.result().status_code, running.result().json()["error"]["code"]) == (503, "shutting_down")


async def test_a_refused_request_holds_no_place(http: httpx.AsyncClient, app: FastAPI):
    await http.post("/v1/completions", json={"prompt": [7] * 1000})
    await http.post("/v1/completions", json={"prompt": [100000]})

    assert app.state.services.admission.num_open == 0
