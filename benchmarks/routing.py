"""What a request's way among data shards is worth: steps until its tokens, and tokens computed, by how much a known prefix counts.

    python -m benchmarks.routing

Cores around devices that do nothing, every step as long as any other; so it counts, and does not measure. Requests of three kinds come at
random times: prompts that share one of a few long beginnings, prompts with four choices each, and prompts that share nothing. `weight` is
what a prompt token counts that a shard would have to compute first, in tokens of its backlog (`PREFIX_WEIGHT` of `engine/replicas.py`); 0
looks at the backlog alone. Kept in `benchmarks/results/routing.json`.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks.host_step import null_core
from engine import replicas
from engine.types import GenerationRequest, SamplingParams

RESULTS = Path(__file__).parent / "results" / "routing.json"
NUM_REQUESTS = 1200
NUM_BEGINNINGS = 12
BEGINNING_LEN = 512
ARRIVALS = {"shared beginnings": 1.0, "four choices": 0.28, "nothing shared": 0.45}  # a step and shard: more than they can do


def main() -> None:
    results: list[dict[str, object]] = []
    for kind, rate in ARRIVALS.items():
        for num_shards in (2, 4):
            for weight in (0, 1, 2, 4):
                replicas.PREFIX_WEIGHT = weight
                result = {"requests": kind, "shards": num_shards, "weight": weight, **serve(kind, num_shards, rate=rate * num_shards)}
                results.append(result)
                print(json.dumps(result))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def serve(kind: str, num_shards: int, *, rate: float) -> dict[str, float]:
    """Let all requests of a kind come and end."""
    shards = replicas.Replicas([null_core(32, max_model_len=1024, step_tokens=128) for _ in range(num_shards)])
    coming = list(arrivals(kind, rate=rate))
    came: dict[str, float] = {}
    firsts: dict[str, float] = {}
    lengths: list[float] = []
    now = 0
    while len(came) < len(coming) or shards.has_work:
        while len(came) < len(coming) and coming[len(came)][0] <= now:
            arrival, request = coming[len(came)]
            came[request.request_id] = arrival
            shards.submit(request)
        for delta in shards.step():
            firsts.setdefault(delta.request_id, now - came[delta.request_id])
            if delta.finish_reason is not None:
                lengths.append(now - came[delta.request_id])
        now += 1
    stats = shards.stats()
    return {
        "steps_to_first_token": round(mean(firsts.values()), 1),
        "steps_to_end": round(mean(lengths), 1),
        "steps_to_end_p95": round(sorted(lengths)[len(lengths) * 19 // 20], 1),
        "found_in_cache": round(stats.num_hit_tokens / stats.num_lookup_tokens, 3),
        "steps_of_all": now,
    }


def arrivals(kind: str, *, rate: float) -> Iterator[tuple[float, GenerationRequest]]:
    """When which request comes."""
    random_ = random.Random(7)
    beginnings = [tokens(random_, BEGINNING_LEN) for _ in range(NUM_BEGINNINGS)]
    time, number = 0.0, 0
    while number < NUM_REQUESTS:
        time += random_.expovariate(rate)
        beginning = random_.choice(beginnings) if kind == "shared beginnings" else ()
        prompt = beginning + tokens(random_, random_.randrange(16, 96) if beginning else random_.randrange(50, 600))
        sampling = SamplingParams(max_tokens=random_.randrange(20, 120), ignore_eos=True)
        for choice in range(4 if kind == "four choices" else 1):
            yield time, GenerationRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling, choice=choice)
            number += 1


def tokens(random_: random.Random, count: int) -> tuple[int, ...]:
    return tuple(random_.randrange(100, 100_000) for _ in range(count))


if __name__ == "__main__":
    main()
