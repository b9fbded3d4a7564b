"""Far more requests than the cache holds: all finish, and each has the tokens that it has alone."""

import re
from collections.abc import Iterator

import anyio
import httpx
import pytest
from server_process import ROOT, RunningServer, running_server

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]

NUM_REQUESTS = 200
BLOCK_SIZE = 16
KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, kv heads, key size, float32


def body(index: int) -> dict:
    """Prompts of 4 to 43 ids, a third of them with a beginning in common; 8 to 47 tokens of output; every second one greedy."""
    beginning = list(range(5, 25)) if index % 3 == 0 else []
    prompt = [*beginning, *(5 + (index * 7 + place * 11) % 500 for place in range(4 + index % 20))]
    sampling = {"temperature": 0} if index % 2 else {"temperature": 1.2, "seed": index}
    return {"prompt": prompt, "max_tokens": 8 + index * 13 % 40, "ignore_eos": True, "logprobs": 1, **sampling}


def num_blocks(request: dict) -> int:
    return -(-(len(request["prompt"]) + request["max_tokens"]) // BLOCK_SIZE)


@pytest.fixture(scope="module")
def cramped_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A cache for a tenth of what the requests need together."""
    needed = sum(num_blocks(body(index)) for index in range(NUM_REQUESTS))
    cache = ("--kv-cache-memory-bytes", str(needed // 10 * BLOCK_SIZE * KV_BYTES_PER_TOKEN))
    model = str(ROOT / "tests" / "data" / "tiny-a")
    with running_server(
        tmp_path_factory.mktemp("cramped"), "--model", model, "--skip-tokenizer-init", "--dtype", "float32", "--no-engine-standby", *cache
    ) as server:
        yield server


async def answer(client: httpx.AsyncClient, index: int) -> tuple[dict, int]:
    """The choice, and the prompt tokens found in the cache."""
    response = await client.post("/v1/completions", json=body(index))
    assert response.status_code == 200, response.text
    whole = response.json()
    return whole["choices"][0], whole["usage"]["prompt_tokens_details"]["cached_tokens"]


async def metric(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    match = re.search(rf"^grok:{name}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)
    assert match, text
    return float(match[1])


async def test_200_requests_in_a_cache_for_a_tenth_of_them_all_finish_as_if_alone(cramped_server: RunningServer):
    together: list[tuple[dict, int]] = [({}, 0)] * NUM_REQUESTS
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=cramped_server.url, timeout=300, limits=limits) as client:

        async def run(index: int) -> None:
            together[index] = await answer(client, index)

        async with anyio.create_task_group() as tasks:
            for index in range(NUM_REQUESTS):
                tasks.start_soon(run, index)
        num_preemptions = await metric(client, "preemptions_total")
        alone = [await answer(client, index) for index in range(NUM_REQUESTS)]
        blocks_held = await metric(client, "kv_cache_usage_perc")

    assert [choice for choice, _ in together] == [choice for choice, _ in alone]
    assert all(choice["finish_reason"] == "length" for choice, _ in alone)
    assert num_preemptions > 0
    assert blocks_held == 0
    assert sum(cached for _, cached in together) > 0
