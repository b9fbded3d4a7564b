"""One greedy completion on layers of the released width, over 8 devices with int8 kept, against the same in NumPy float64.

    python scripts/write_wide_checkpoint.py --out DIR
    python -m benchmarks.wide_completion --model DIR [--prompt-tokens N]

The engine, in a process of its own and without HTTP, loads the files over 8 fake CPU devices, tensor parallel, and chooses 8 tokens. Then
NumPy goes once over prompt and tokens with weights that come from the files in blocks of rows, and tells which token it would have chosen
at each place. Printed, and kept in `benchmarks/results/wide_completion.json`; ends with status 1 where a token differs. Needs as much
memory as the weights and 3 GB more.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.dequantize import real_slice
from engine.checkpoint.tensors import HostTensor
from engine.config import CacheConfig, EngineConfig, MeshConfig, ModelConfig, SchedulerConfig, read_model_config
from engine.model.params import Params, map_specs, param_specs

RESULTS = Path(__file__).parent / "results" / "wide_completion.json"
SUPPORT = Path(__file__).resolve().parent.parent / "tests" / "support"
NUM_DEVICES = 8
NUM_TOKENS = 8
NUM_TOP = 5  # log-probabilities compared at each place
BLOCK_NUMBERS = 16 << 20

Floats = NDArray[np.float64]


def main() -> int:
    parser = argparse.ArgumentParser(description="A greedy completion on wide layers, and the same in NumPy.")
    parser.add_argument("--model", type=Path, required=True, help="a directory that scripts/write_wide_checkpoint.py wrote")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--compile-cache-dir", help="where compiled programs are kept, for another run")
    parser.add_argument("--engine", type=str, help=argparse.SUPPRESS)  # the prompt, in the engine's process
    arguments = parser.parse_args()
    config = read_model_config(arguments.model)
    if arguments.engine is not None:
        print(json.dumps(complete(arguments.model, config, prompt=json.loads(arguments.engine), cache=arguments.compile_cache_dir)))
        return 0

    prompt = np.random.default_rng(0).integers(3, config.vocab_size, arguments.prompt_tokens).tolist()
    command = [sys.executable, "-m", "benchmarks.wide_completion", "--model", str(arguments.model), "--engine", json.dumps(prompt)]
    if arguments.compile_cache_dir is not None:
        command += ["--compile-cache-dir", arguments.compile_cache_dir]
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES}"}
    child = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True, text=True)
    completed: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    start = time.perf_counter()
    logits = numpy_logits(arguments.model, config, prompt + completed["token_ids"][:-1], first=len(prompt) - 1)
    numpy_s = time.perf_counter() - start

    result = compare(logits, completed) | {"prompt": prompt, "numpy_s": round(numpy_s, 1)}
    result |= {name: completed[name] for name in ("load_s", "compile_s", "seconds")}
    show(result)

    from benchmarks.serving import machine

    setting = {"devices": f"{NUM_DEVICES} fake CPU devices, tensor parallel", "weights": "int8 kept, the rest float32"}
    RESULTS.write_text(json.dumps({"machine": machine(), "setting": setting, "result": result}, indent=1) + "\n")
    return 0 if result["is_equal"] else 1


def complete(model_dir: Path, config: ModelConfig, *, prompt: list[int], cache: str | None) -> dict[str, Any]:
    """The engine's tokens, and at each place the likeliest with their log-probabilities."""
    from engine.build import build_engine
    from engine.types import GenerationRequest, SamplingParams

    engine_config = EngineConfig(
        model=config,
        model_dir=str(model_dir),
        dtype="float32",
        mesh=MeshConfig(tensor=NUM_DEVICES),
        cache=CacheConfig(num_blocks=16),
        scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64),
        cpu_weights="packed",
        compile_cache_dir=cache,
    )
    core = build_engine(engine_config, report=lambda progress: print(progress, file=sys.stderr))
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=NUM_TOP)
    core.submit(GenerationRequest(request_id="one", prompt_token_ids=tuple(prompt), sampling=sampling))
    token_ids: list[int] = []
    tops: list[dict[int, float]] = []
    start = time.perf_counter()
    while core.has_work:
        for delta in core.step():
            token_ids += delta.token_ids
            tops += [dict(entry.top) for entry in delta.logprobs]
    seconds = time.perf_counter() - start
    info = core.info
    timing = {"load_s": round(info.load_s, 1), "compile_s": round(info.compile_s, 1), "seconds": round(seconds, 1)}
    return {"token_ids": token_ids, "tops": [list(top.items()) for top in tops], **timing}


def numpy_logits(model_dir: Path, config: ModelConfig, token_ids: list[int], *, first: int) -> Floats:
    """Of the reference that the tests compare the engine with, its weights read when they are multiplied with."""
    sys.path.insert(0, str(SUPPORT))
    logits_of_weights = import_module("numpy_grok").logits_of_weights
    checkpoint = open_checkpoint(model_dir, config)
    weights: Params = map_specs(lambda spec: _weight(checkpoint.tensors[spec.name]), param_specs(config))
    return logits_of_weights(weights, token_ids, config, first=first)


def _weight(tensor: HostTensor) -> "Floats | Stored":
    if tensor.spec.num_params > BLOCK_NUMBERS:
        return Stored(tensor)
    return real_slice(tensor, tuple(slice(0, size) for size in tensor.spec.shape), np.float64)


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix in the files, or a stack of them: real values in float64, a few rows at a time."""

    tensor: HostTensor
    matrix: int | None = None  # of the stack
    is_transposed: bool = False

    __array_ufunc__ = None  # NumPy leaves `x @ stored` to us

    @property
    def T(self) -> Self:
        return type(self)(self.tensor, self.matrix, not self.is_transposed)

    def __getitem__(self, index: int | Sequence[int]) -> "Stored | Floats":
        """One matrix of a stack, or some rows of a matrix."""
        if len(self.tensor.spec.shape) == 3:
            return Stored(self.tensor, int(index))  # type: ignore[arg-type]
        return np.concatenate([self._rows(row, row + 1) for row in index])  # type: ignore[union-attr]

    def __rmatmul__(self, x: Floats) -> Floats:
        if self.is_transposed:
            return np.concatenate([x @ rows.T for _, rows in self._blocks()], axis=-1)
        products = np.zeros((*x.shape[:-1], self.tensor.spec.shape[-1]))
        for start, rows in self._blocks():
            products += x[..., start : start + len(rows)] @ rows
        return products

    def _blocks(self) -> Iterator[tuple[int, Floats]]:
        num_rows, columns = self.tensor.spec.shape[-2:]
        step = max(1, BLOCK_NUMBERS // columns)
        for start in range(0, num_rows, step):
            yield start, self._rows(start, min(start + step, num_rows))

    def _rows(self, start: int, stop: int) -> Floats:
        lead = () if self.matrix is None else (slice(self.matrix, self.matrix + 1),)
        values = real_slice(self.tensor, (*lead, slice(start, stop), slice(0, self.tensor.spec.shape[-1])), np.float64)
        return values.reshape(stop - start, -1)


def compare(logits: Floats, completed: dict[str, Any]) -> dict[str, Any]:
    """Tokens, and how far the likeliest log-probabilities are from NumPy's; `gaps` are between NumPy's two largest."""
    order = np.argsort(-logits, axis=-1)[:, : NUM_TOP + 1]
    largest = logits.max(axis=-1)
    normalisers = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    wanted = np.take_along_axis(logits, order, axis=-1) - normalisers[:, None]
    told = np.array([[logprob for _, logprob in top] for top in completed["tops"]])
    return {
        "is_equal": completed["token_ids"] == order[:, 0].tolist(),
        "engine": completed["token_ids"],
        "numpy": order[:, 0].tolist(),
        "gaps": (wanted[:, 0] - wanted[:, 1]).round(6).tolist(),
        "same_likeliest": [[token for token, _ in top] for top in completed["tops"]] == order[:, :NUM_TOP].tolist(),
        "largest_logprob_error": float(np.abs(told - wanted[:, :NUM_TOP]).max()),
    }


def show(result: dict[str, Any]) -> None:
    table = Table("token", "engine", "NumPy", "gap to NumPy's next")
    for place, row in enumerate(zip(result["engine"], result["numpy"], result["gaps"], strict=True)):
        table.add_row(str(place), *map(str, row))
    tokens = "equal" if result["is_equal"] else "DIFFERENT"
    likeliest = f"the {NUM_TOP} likeliest {'the same' if result['same_likeliest'] else 'DIFFERENT'}"
    Console().print(table, f"{tokens}, {likeliest}; log-probabilities differ by at most {result['largest_logprob_error']:.2e}")


if __name__ == "__main__":
    sys.exit(main())
