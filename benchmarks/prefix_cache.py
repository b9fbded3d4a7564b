"""What the prefix cache gives and costs: time to the first token of a long prompt, cold and cached, and the share of hashing and lookup.

    python -m benchmarks.prefix_cache [--model DIR] [--rounds N]

The engine core of the real model, without HTTP. Each round takes a new random prompt of 1,000 tokens and measures, one after the other:
the cold prompt; another that shares its first 95 %; and, over steps that find nothing in the cache, the seconds spent in hashing, lookup
and insertion as a share of all. Medians and ranges are printed and kept in `benchmarks/results/prefix_cache.json`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine, summary, use_real_time_class
from engine.build import build_engine
from engine.core import EngineCore
from engine.types import GenerationRequest, SamplingParams
from server.engine_options import engine_options
from server.settings import default_model_dir, load_settings

RESULTS = Path(__file__).parent / "results" / "prefix_cache.json"
PROMPT_LEN = 1000
SHARED_LEN = 950


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token with and without a cached prefix; the cost of looking.")
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    is_real_time = use_real_time_class()

    options = engine_options(load_settings({"model": str(arguments.model)}))
    core = build_engine(options.resolve(backend="cpu", free_bytes=1 << 30), report=lambda _: None)
    assert isinstance(core, EngineCore), "one data shard is one core"
    random = np.random.default_rng(0)
    rounds = [measure(core, random) for _ in range(arguments.rounds + 1)][1:]

    figures = {name: summary([row[name] for row in rounds], digits=5) for name in rounds[0]}
    table = Table("figure", "median", "min", "max")
    for name, figure in figures.items():
        table.add_row(name, *(f"{figure[key]:.4f}" for key in ("median", "min", "max")))
    Console().print(table)
    setting = {"model": arguments.model.name, "prompt_tokens": PROMPT_LEN, "shared": SHARED_LEN, "real_time_class": is_real_time}
    RESULTS.write_text(json.dumps({"machine": machine(), "setting": setting, "figures": figures}, indent=1) + "\n")


def measure(core: EngineCore, random: np.random.Generator) -> dict[str, float]:
    """One round."""
    vocab_size = core.info.vocab_size
    prompt = random.integers(3, vocab_size, PROMPT_LEN).tolist()
    spent = Stopwatch()
    lookup, insert = core.cache.lookup, core.cache.insert
    core.cache.lookup, core.cache.insert = spent.timed(lookup), spent.timed(insert)
    cold_s = first_token_s(core, prompt)
    core.cache.lookup, core.cache.insert = lookup, insert
    cached_s = first_token_s(core, prompt[:SHARED_LEN] + random.integers(3, vocab_size, PROMPT_LEN - SHARED_LEN).tolist())
    return {
        "cold, s": cold_s,
        "95 % cached, s": cached_s,
        "95 % cached / cold": cached_s / cold_s,
        "hashing, lookup and insertion / steps, nothing found": spent.seconds / cold_s,
    }


def first_token_s(core: EngineCore, prompt: list[int]) -> float:
    """Seconds from submission to the first token."""
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    core.submit(GenerationRequest(request_id="one", prompt_token_ids=tuple(prompt), sampling=sampling))
    start = time.perf_counter()
    while not any(delta.token_ids for delta in core.step()):
        pass
    return time.perf_counter() - start


class Stopwatch:
    """Adds up the time inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return wrapper


if __name__ == "__main__":
    main()
