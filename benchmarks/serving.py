"""One and many streams through HTTP, against the bare compiled step of the same model. Run by `make bench`.

    python -m benchmarks.serving [--model DIR] [--tokens N] [--rounds N]

The server is the real command on a free port. The bare step is what one stream can reach at best: the compiled program called in a loop
with prepared inputs, its token ids read on the host after every call. Each round measures all figures one after the other, so that they
share the machine's mood; medians and ranges are printed and kept in `benchmarks/results/serving.json`. With the right to it (root), all
processes run in the real-time class, which neighbours on the machine cannot slow down.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from engine.batch import Batch, Batcher
from engine.build import build_engine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import Schedule, ScheduledTokens
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams
from server.engine_options import engine_options
from server.settings import default_model_dir, load_settings

RESULTS = Path(__file__).parent / "results" / "serving.json"
PROMPT = "Once upon a time there was a little bear who lived in the forest"
NUM_PROMPT_TOKENS = 16  # of the bare step's sequence, about as many as `PROMPT` has
MANY = 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams through HTTP against the bare compiled step.")
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--tokens", type=int, default=128, help="generated per stream")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    is_real_time = use_real_time_class()

    bare = BareStep(arguments.model, num_tokens=arguments.tokens)
    with running_server(arguments.model) as (url, _):
        measures: dict[str, Callable[[], float]] = {
            "bare compiled step": bare.rate,
            "1 stream over HTTP": lambda: asyncio.run(stream_rate(url, 1, arguments.tokens)),
            f"{MANY} streams over HTTP": lambda: asyncio.run(stream_rate(url, MANY, arguments.tokens)),
        }
        for measure in measures.values():
            measure()
        rounds = [{name: measure() for name, measure in measures.items()} for _ in range(arguments.rounds)]

    bare_name, one_name, many_name = measures
    ratios = {
        "1 stream / bare step": [row[one_name] / row[bare_name] for row in rounds],
        f"{MANY} streams / 1 stream": [row[many_name] / row[one_name] for row in rounds],
    }
    rates = {name: [row[name] for row in rounds] for name in measures}
    show(rates, ratios)
    RESULTS.parent.mkdir(exist_ok=True)
    setting = {"model": arguments.model.name, "tokens": arguments.tokens, "rounds": arguments.rounds, "real_time_class": is_real_time}
    figures = {name: summary(values) for name, values in {**rates, **ratios}.items()}
    RESULTS.write_text(json.dumps({"machine": machine(), "setting": setting, "tokens_per_s_and_ratios": figures}, indent=1) + "\n")


class BareStep:
    """One greedy sequence, its whole continuation prepared as packed inputs; tokens are made up, their number is what matters."""

    def __init__(self, model_dir: Path, *, num_tokens: int):
        options = engine_options(load_settings({"model": str(model_dir)}))
        self.config: EngineConfig = options.resolve(backend="cpu", free_bytes=256 << 20)
        core = build_engine(self.config, report=lambda _: None)
        assert isinstance(core, EngineCore), "one data shard is one core"
        assert isinstance(core.runner, ModelRunner)
        self.runner = core.runner
        self.batches = [self._batch(core.batcher, NUM_PROMPT_TOKENS + step) for step in range(num_tokens)]

    def _batch(self, batcher: Batcher, position: int) -> Batch:
        request = GenerationRequest(
            request_id="bare", prompt_token_ids=(5,) * NUM_PROMPT_TOKENS, sampling=SamplingParams(temperature=0, max_tokens=4096)
        )
        sequence = Sequence(request=request, arrival=0, token_ids=[5] * (position + 1), num_computed_tokens=position, slot=0)
        sequence.block_ids = list(range(1, 2 + position // self.config.cache.block_size))
        item = ScheduledTokens(sequence=sequence, start=position, num_tokens=1, chooses_token=True)
        return batcher.build(Schedule(items=(item,), admitted=(sequence,)))

    def rate(self) -> float:
        """Tokens a second."""
        start = time.perf_counter()
        for batch in self.batches:
            np.asarray(self.runner.choose(self.runner.launch(batch)).token_ids)
        return len(self.batches) / (time.perf_counter() - start)


async def stream_rate(url: str, num_streams: int, num_tokens: int) -> float:
    """Tokens a second over all streams, between the first token that arrives anywhere and the last."""
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    arrivals: list[float] = []

    async def one(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    arrivals.append(time.perf_counter())

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(one(client) for _ in range(num_streams)))
    return num_streams * (num_tokens - 1) / (max(arrivals) - min(arrivals))


@contextmanager
def running_server(model_dir: Path):
    """The command on a free port; yields its address and its process id."""
    command = [Path(sys.executable).with_name("grok-server"), "serve", "--model", str(model_dir), "--port", "0", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield next(match[1] for line in server.stdout if (match := re.match(r"Ready on (http://\S+)", line))), server.pid
        finally:
            server.terminate()


def use_real_time_class() -> bool:
    """Ask for it, for this process and all it starts; False where that is not allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except (AttributeError, PermissionError):
        return False
    return True


def summary(values: list[float], *, digits: int = 3) -> dict[str, float]:
    """Median and range, for the table and the file of results."""
    return {"median": round(statistics.median(values), digits), "min": round(min(values), digits), "max": round(max(values), digits)}


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor()


def show(rates: dict[str, list[float]], ratios: dict[str, list[float]]) -> None:
    table = Table("figure", "median", "min", "max", title="tokens a second, and ratios within a round")
    for name, values in {**rates, **ratios}.items():
        digits = 2 if name in ratios else 0
        table.add_row(name, *(f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)


if __name__ == "__main__":
    main()
