"""Sixty-four streams at once on the default model: each equals its own solo run, and whoever leaves gives everything back."""

import re

import anyio
import httpx
import openai
import pytest
from server_process import RunningServer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]

NUM_STREAMS = 64
OPENINGS = [
    "Once upon a time",
    "The old bear",
    "A little girl",
    "In the forest",
    "One morning the king",
    "The sea was",
    "Human: Hello! How",
    "Tom and",
]


def body(index: int) -> dict:
    """Different prompts, lengths and ways of choosing tokens; every second one is greedy."""
    prompt = OPENINGS[index % len(OPENINGS)] + " and the fox" * (index % 5)
    sampling = {"temperature": 0} if index % 2 else {"temperature": 1.0, "top_p": 0.95 if index % 3 else 1.0, "seed": index}
    return {"model": "grok-1-tiny", "prompt": prompt, "max_tokens": 8 + index % 17, **sampling}


async def streamed_text(client: openai.AsyncOpenAI, index: int) -> str:
    stream = await client.completions.create(**body(index), stream=True)
    return "".join([choice.text async for chunk in stream for choice in chunk.choices])


async def gauge(url: str, name: str) -> float:
    async with httpx.AsyncClient() as client:
        metrics = (await client.get(f"{url}/metrics")).text
    match = re.search(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", metrics, flags=re.MULTILINE)
    assert match, metrics
    return float(match[1])


async def until_idle(url: str) -> None:
    with anyio.fail_after(20):
        while await gauge(url, "grok:num_requests_running") or await gauge(url, "grok:kv_cache_usage_perc"):
            await anyio.sleep(0.05)


def sdk(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


async def test_every_stream_among_64_equals_its_solo_run(default_server: RunningServer):
    async with sdk(default_server) as client:
        together: list[str] = [""] * NUM_STREAMS

        async def run(index: int) -> None:
            together[index] = await streamed_text(client, index)

        async with anyio.create_task_group() as tasks:
            for index in range(NUM_STREAMS):
                tasks.start_soon(run, index)
        alone = [await streamed_text(client, index) for index in range(NUM_STREAMS)]

    assert together == alone
    assert any(together)


async def test_clients_that_leave_give_back_their_blocks_and_hurt_nobody(default_server: RunningServer):
    async with sdk(default_server) as client:
        expected = [await streamed_text(client, index) for index in range(1, NUM_STREAMS, 8)]
        stayed: dict[int, str] = {}

        async def stay(index: int) -> None:
            stayed[index] = await streamed_text(client, index)

        async def leave(index: int) -> None:
            stream = await client.completions.create(**{**body(index), "max_tokens": 400}, stream=True, extra_body={"ignore_eos": True})
            async for _ in stream:
                break
            await stream.close()

        async with anyio.create_task_group() as tasks:
            for index in range(NUM_STREAMS):
                tasks.start_soon(stay if index % 8 == 1 else leave, index)
        await until_idle(default_server.url)

    assert [stayed[index] for index in range(1, NUM_STREAMS, 8)] == expected


async def test_a_client_that_leaves_an_unstreamed_request_gives_back_its_blocks(default_server: RunningServer):
    async with httpx.AsyncClient(timeout=1.0) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{default_server.url}/v1/completions", json={**body(0), "max_tokens": 900, "ignore_eos": True, "n": 16})

    await until_idle(default_server.url)


async def test_nothing_is_compiled_after_readiness(default_server: RunningServer):
    async with sdk(default_server) as client:
        await client.completions.create(model="grok-1-tiny", prompt=["a", "b c"], max_tokens=3, n=2, echo=True, logprobs=5, seed=1)

    assert await gauge(default_server.url, "grok:late_compilations_total") == 0
