"""Write a checkpoint in the released format with layers as wide as the released ones, but few: 13 GB for two of the 64.

    python scripts/write_wide_checkpoint.py --out DIR [--layers N] [--seed N]

For trials of loading and of memory on shapes that matter. The int8 weights are drawn evenly from -127 to 127 and scaled to the spread that
training starts from, so that no activation grows or dies away; embeddings are small beside what the layers add, or every token would be
followed by itself. A few million numbers are in memory at a time; `scripts/write_checkpoint.py`
takes any configuration, and draws whole tensors.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.released import specs_in_file_order, tensor_file_name
from engine.checkpoint.released_writer import write_tensor, write_tensor_in_blocks
from engine.checkpoint.save import UNIFORM_INT8_STD, random_tensors, scale_groups
from engine.config import ModelConfig
from engine.errors import CheckpointError, EngineError
from engine.model.params import ParamSpec

PRESET = Path(__file__).resolve().parent.parent / "configs" / "models" / "grok-1.json"
BLOCK_NUMBERS = 16 << 20
EMBEDDING_STD = 0.05  # of that of a matrix
SMALL_NUMBERS = 1 << 20  # tensors up to here are drawn whole


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint in the released format with few layers of the released width.")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--layers", type=int, default=2, help="how many of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        write(arguments.out, num_layers=arguments.layers, seed=arguments.seed)
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(out: Path, *, num_layers: int, seed: int) -> None:
    """Write the files and their config.json, then check them as a server would."""
    raw: dict[str, Any] = json.loads(PRESET.read_bytes())
    raw["model"]["num_layers"] = num_layers
    config = ModelConfig.from_json(raw)
    directory = out / "ckpt-0"
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise CheckpointError(f"{directory}: is not empty; choose another directory")
    specs = specs_in_file_order(config)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:
        bar = bars.add_task("write", total=sum(_num_bytes(spec) for spec in specs))
        for index, spec in enumerate(specs):
            path = directory / tensor_file_name(index)
            _write(path, spec, config, seed=seed, advance=lambda count: bars.advance(bar, count))
            _leave_to_disk(path)
    (out / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    checkpoint = open_checkpoint(out, config)
    sizes = f"{len(checkpoint.tensors)} tensors, {checkpoint.num_params:,} parameters, {checkpoint.file_bytes:,} bytes"
    print(f"{sizes} in {checkpoint.directory}")


def _write(path: Path, spec: ParamSpec, config: ModelConfig, *, seed: int, advance: Callable[[int], None]) -> None:
    if spec.num_params <= SMALL_NUMBERS or spec.fan_in is None:
        weight, scales = random_tensors(config, seed=seed)(spec)
        write_tensor(path, weight, scales=scales)
        advance(_num_bytes(spec))
        return
    random = np.random.default_rng([seed, *spec.name.encode()])
    std = np.float32(spec.fan_in**-0.5)
    if not spec.is_quantized:
        blocks = _normal(random, np.float32(EMBEDDING_STD) * std, prod(spec.shape), advance)
        write_tensor_in_blocks(path, spec.shape, np.float32, blocks)
        return
    *lead, _, columns = spec.shape
    spread = random.uniform(0.5, 1.5, (*lead, scale_groups(spec, config), columns))
    scales = (spread * std / UNIFORM_INT8_STD).astype(ml_dtypes.bfloat16)
    write_tensor_in_blocks(path, spec.shape, np.int8, _integers(random, prod(spec.shape), advance), scales=scales)


def _normal(random: np.random.Generator, std: np.float32, count: int, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for start in range(0, count, BLOCK_NUMBERS):
        block = random.standard_normal(min(BLOCK_NUMBERS, count - start), np.float32)
        block *= std
        yield block
        advance(block.nbytes)


def _integers(random: np.random.Generator, count: int, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for start in range(0, count, BLOCK_NUMBERS):
        block = random.integers(-127, 127, min(BLOCK_NUMBERS, count - start), np.int8, endpoint=True)
        yield block
        advance(block.nbytes)


def _num_bytes(spec: ParamSpec) -> int:
    return spec.num_params * (1 if spec.is_quantized else 4)


def _leave_to_disk(path: Path) -> None:
    """Have the file on the disk before the next begins: gigabytes that only wait to be written are memory that others may need."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
