"""What the host adds to a step: schedule, lay out, commit and emit around a device that does nothing.

    python -m benchmarks.host_step [--context 1000]

Prints, per number of running sequences, the median and the shortest step in microseconds: decoding, one token each, and with
log-probabilities. No two sequences share a block, and in every step some get full, are hashed, and enter the prefix cache.
"""

import argparse
import json
import statistics
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.batch import TILE, Batch, StepLayout
from engine.config import CacheConfig, EngineConfig, MeshConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.engine_loop import EngineLoop
from engine.messages import FromEngine, encode
from engine.types import EngineInfo, GenerationRequest, SamplingParams

NUM_SEQS = (1, 32, 256)
NUM_STEPS = 200
NUM_TOP = 20
STEP_TOKENS = 4096


class NullLogprobs(NamedTuple):
    """As `engine.sampling.Logprobs`."""

    chosen: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top: NDArray[np.float32]


class NullOutput(NamedTuple):
    """As `engine.runner.StepOutput`."""

    token_ids: NDArray[np.int32]
    is_finite: NDArray[np.bool_]
    logprobs: NullLogprobs
    scores: None = None


class NullRunner:
    """Answers every step with the same token."""

    def __init__(self, layouts: tuple[StepLayout, ...]) -> None:
        self.layouts = layouts
        self.num_late_compilations = 0
        rows = layouts[-1].num_seqs
        logprobs = NullLogprobs(np.zeros(rows, np.float32), np.zeros((rows, NUM_TOP), np.int32), np.zeros((rows, NUM_TOP), np.float32))
        self._output = NullOutput(np.full(rows, 7, np.int32), np.ones(rows, bool), logprobs)

    def reset_slot(self, slot: int, sampling: SamplingParams, end_token_ids: tuple[int, ...], **tokens: object) -> None:
        """Nothing is kept per slot."""

    def write_masks(self, masks: object) -> None:
        """Nor here."""

    def launch(self, batch: Batch) -> NullOutput:  # noqa: ARG002
        return self._output

    def choose(self, launched: NullOutput, *, dropped: object = ()) -> NullOutput:  # noqa: ARG002
        return launched

    def is_done(self, output: NullOutput) -> bool:  # noqa: ARG002
        return True

    def collect(self, output: NullOutput) -> NullOutput:
        return output


def null_core(num_seqs: int, *, max_model_len: int, step_tokens: int = STEP_TOKENS) -> EngineCore:
    """A core for `num_seqs` sequences of `max_model_len` tokens, with blocks for all of them."""
    model = ModelConfig.preset("grok-1")
    block_size = 16
    blocks_per_seq = -(-max_model_len // block_size)
    config = EngineConfig(
        model=model,
        model_dir="",
        dtype="bfloat16",
        mesh=MeshConfig(),
        cache=CacheConfig(block_size=block_size, num_blocks=blocks_per_seq * num_seqs),
        scheduler=SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=step_tokens, max_model_len=max_model_len),
    )
    sizes = sorted({2 * TILE, max(2 * TILE, num_seqs), step_tokens})
    layouts = tuple(StepLayout(num_tokens=size, num_seqs=min(size, num_seqs), blocks_per_seq=blocks_per_seq) for size in sizes)
    info = EngineInfo(
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=step_tokens,
        max_logprobs=NUM_TOP,
        block_size=block_size,
        num_blocks=config.cache.num_blocks,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        backend="none",
        num_devices=0,
        num_params=0,
        weight_bytes=0,
        num_programs=0,
        load_s=0.0,
        compile_s=0.0,
    )
    return EngineCore(config, NullRunner(layouts), info)


def step_times_us(num_seqs: int, *, context: int, logprobs: int | None) -> list[float]:
    """Microseconds of each of `NUM_STEPS` steps in which `num_seqs` sequences of about `context` tokens get one more."""
    max_tokens = NUM_STEPS + num_seqs * context // STEP_TOKENS + 16  # those who read their prompt first decode meanwhile
    core = null_core(num_seqs, max_model_len=context + max_tokens)
    sampling = SamplingParams(max_tokens=max_tokens, logprobs=logprobs)
    for index in range(num_seqs):
        core.submit(GenerationRequest(request_id=str(index), prompt_token_ids=(index,) * context, sampling=sampling))
    while core.scheduler.num_waiting or any(sequence.num_remaining_tokens > 1 for sequence in core.scheduler.running):
        core.step()

    def emit(message: FromEngine) -> None:
        encode(message)

    loop = EngineLoop(core, send=emit)
    times: list[float] = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        loop.turn()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1000, help="tokens before the measured steps")
    context = parser.parse_args().context
    for logprobs in (None, 5):
        for num_seqs in NUM_SEQS:
            times = step_times_us(num_seqs, context=context, logprobs=logprobs)
            result = {"logprobs": logprobs, "num_seqs": num_seqs, "context": context}
            print(json.dumps({**result, "median_us": round(statistics.median(times)), "min_us": round(min(times))}))


if __name__ == "__main__":
    main()
