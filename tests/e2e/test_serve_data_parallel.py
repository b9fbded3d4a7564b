"""The installed command with two data shards of two devices each: answers as always, and metrics that are sums."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from server_process import RunningServer, running_server

from server.engine_options import engine_options
from server.settings import load_settings

pytestmark = pytest.mark.timeout(600)  # compiles twice

CACHE_BYTES = 32 << 20  # of each shard


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ("--data-parallel-size", "2", "--tensor-parallel-size", "2", "--max-num-seqs", "1", "--no-engine-standby")
    flags += ("--kv-cache-memory-bytes", str(CACHE_BYTES), "--max-num-batched-tokens", "32")
    with running_server(tmp_path_factory.mktemp("two-shards"), *flags, num_devices=4) as server:
        yield server


def body(prompt: str, *, max_tokens: int, **fields: object) -> dict[str, object]:
    return {"model": "grok-1-tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


def metrics(server: RunningServer) -> dict[str, float]:
    lines = (line.split() for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line.startswith("grok:"))
    return {name: float(value) for name, value, *_ in lines}


def test_both_shards_serve_at_the_same_time_and_metrics_have_the_sums(server: RunningServer, default_server: RunningServer):
    prompts = ["Once upon a time", "The little dog"]
    with ExitStack() as streams:
        chunks: list[Iterator[str]] = []
        for prompt in prompts:
            request = body(prompt, max_tokens=600, stream=True)
            stream = streams.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=120))
            chunks.append(line for line in stream.iter_lines() if line.startswith("data: {"))
        first = [json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] for lines in chunks]
        meanwhile = metrics(server)
    texts = [text_of(server, prompt) for prompt in prompts]

    assert meanwhile["grok:num_requests_running"] == 2  # and one slot each
    assert meanwhile["grok:num_requests_waiting"] == 0
    assert meanwhile["grok:kv_cache_blocks"] == 2 * num_blocks_of_a_shard()
    assert texts == [text_of(default_server, prompt) for prompt in prompts]
    assert all(text.startswith(begin) for text, begin in zip(texts, first, strict=True))
    assert metrics(server)["grok:late_compilations_total"] == 0


def text_of(server: RunningServer, prompt: str) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json=body(prompt, max_tokens=24), timeout=120).json()
    return answer["choices"][0]["text"]


def num_blocks_of_a_shard() -> int:
    options = engine_options(load_settings({"tensor_parallel_size": 2, "kv_cache_memory_bytes": CACHE_BYTES}))
    return options.resolve(backend="cpu", free_bytes=0).cache.num_blocks
