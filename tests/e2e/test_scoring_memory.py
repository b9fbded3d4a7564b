"""Scoring long prompts over Grok-1's vocabulary: the engine's memory stays where it was, and a second pass is read from the cache."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from server_process import ROOT, RunningServer, running_server

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak of resident memory"),
]

VOCAB_SIZE = 131_072
NUM_PROMPTS, PROMPT_LEN = 64, 1000
MAX_GROWTH_BYTES = 64 << 20
LIMITS = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(8 << 20))  # a cache that holds all prompts
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "sequence_len": 1024,
    "emb_size": 16,
    "key_size": 8,
    "num_q_heads": 2,
    "num_kv_heads": 1,
    "num_layers": 1,
    "num_experts": 2,
    "num_selected_experts": 1,
    "ffn_size": 16,
    "embedding_multiplier_scale": 4.0,
    "output_multiplier_scale": 0.5,
    "attn_output_multiplier": 0.35,
}


@pytest.fixture(scope="module")
def wide_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A tiny random model with the vocabulary of the large one."""
    directory = tmp_path_factory.mktemp("wide")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write = [sys.executable, ROOT / "scripts" / "write_checkpoint.py"]
    subprocess.run(
        [*write, "--config", directory / "config.json", "--out", directory / "model"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    with running_server(directory, "--model", str(directory / "model"), "--skip-tokenizer-init", *LIMITS) as server:
        yield server


def engine_pid(server: RunningServer) -> int:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    engines = [pid for pid in children if b"\0engine\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(engines[0])


def peak_bytes(pid: int) -> int:
    """Most resident memory since `reset_peak`."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) << 10


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def score(server: RunningServer, prompts: list[list[int]]) -> dict[str, Any]:
    body = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 20}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=600)
    assert answer.status_code == 200, answer.text[:500]
    return answer.json()


def test_64_prompts_of_1000_tokens_are_scored_in_bounded_memory_and_once_only(wide_server: RunningServer):
    prompts = np.random.default_rng(0).integers(3, VOCAB_SIZE, (NUM_PROMPTS, PROMPT_LEN)).tolist()
    engine = engine_pid(wide_server)
    score(wide_server, [[5] * 40])  # whatever is allocated once
    reset_peak(engine)
    before = peak_bytes(engine)

    first = score(wide_server, prompts)
    growth = peak_bytes(engine) - before
    second = score(wide_server, prompts)

    assert growth < MAX_GROWTH_BYTES
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0.95 * NUM_PROMPTS * PROMPT_LEN
    assert [choice["logprobs"] for choice in second["choices"]] == [choice["logprobs"] for choice in first["choices"]]
    assert len(first["choices"][-1]["logprobs"]["token_logprobs"]) == PROMPT_LEN
