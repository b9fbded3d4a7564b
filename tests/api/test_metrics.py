"""What `/metrics` tells about the engine and the queue: gauges as they are, totals that never fall."""

import asyncio
from dataclasses import replace

import httpx
import pytest
from fake_engine import HANG, FakeEngineClient, engine_info
from prometheus_client.parser import text_string_to_metric_families

from engine.types import EngineStats
from server.limits import Limits

pytestmark = pytest.mark.anyio


async def scraped(http: httpx.AsyncClient) -> dict[str, float]:
    """Every sample by its name, with its labels' values behind it."""
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    return {" ".join((sample.name, *sample.labels.values())): sample.value for family in families for sample in family.samples}


async def test_the_cache_is_shown_by_its_blocks_and_what_it_found(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.base_stats = EngineStats(num_blocks=100, num_blocks_cached=30, num_lookup_tokens=640, num_hit_tokens=320)

    samples = await scraped(http)

    assert samples["grok:kv_cache_blocks"] == 100
    assert samples["grok:kv_cache_blocks_used"] == 0
    assert samples["grok:kv_cache_blocks_cached"] == 30
    assert samples["grok:kv_cache_usage_perc"] == 0
    assert samples["grok:prefix_cache_queries_total"] == 640
    assert samples["grok:prefix_cache_hits_total"] == 320


async def test_trouble_of_the_engine_is_counted(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.base_stats = EngineStats(num_blocks=100, num_steps=7, num_preemptions=5, num_late_compilations=1)
    engine.num_restarts = 2

    samples = await scraped(http)

    assert samples["grok:engine_steps_total"] == 7
    assert samples["grok:preemptions_total"] == 5
    assert samples["grok:late_compilations_total"] == 1
    assert samples["grok:engine_restarts_total"] == 2
    assert samples["grok:engine_ready"] == 1


async def test_who_waits_is_shown_with_the_reason(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.base_stats = EngineStats(num_blocks=100, num_waiting=4)
    engine.num_held = 3

    samples = await scraped(http)

    assert samples["grok:num_requests_waiting_by_reason capacity"] == 4
    assert samples["grok:num_requests_waiting_by_reason engine"] == 3
    assert samples["grok:num_requests_waiting"] == samples["vllm:num_requests_waiting tiny"] == 7


@pytest.mark.parametrize("engine", [FakeEngineClient(info=engine_info(max_num_seqs=1))])
@pytest.mark.parametrize("limits", [replace(Limits(), max_queued_sequences=0)])
async def test_refusals_are_counted_by_their_code(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = lambda _: [HANG]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(http.post("/v1/completions", json={"prompt": [7], "timeout": 0.2}))
        while not engine.num_open:
            await asyncio.sleep(0.001)
        await http.post("/v1/completions", json={"prompt": [7]})
        await http.post("/v1/completions", json={"prompt": [7]})
        await http.post("/v1/completions", json={"prompt": "x", "n": 0})

    samples = await scraped(http)
    assert samples["grok:requests_refused_total server_overloaded"] == 2
    assert [name for name in samples if name.startswith("grok:requests_refused")] == ["grok:requests_refused_total server_overloaded"]
