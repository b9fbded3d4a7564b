"""Writes whole checkpoints in the released layout, one tensor at a time. For tests, the default model and trials of other sizes."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from engine.checkpoint.quantize import quantize
from engine.checkpoint.released import specs_in_file_order, tensor_file_name
from engine.checkpoint.released_writer import write_tensor
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.params import ParamSpec

WeightAndScales = tuple[np.ndarray, np.ndarray | None]

UNIFORM_INT8_STD = 73.3  # of integers drawn evenly from -127 to 127


def save_checkpoint(model_dir: Path, config: ModelConfig, *, make_tensor: Callable[[ParamSpec], WeightAndScales]) -> None:
    """Write `model_dir/ckpt-0/`, asking `make_tensor` for each tensor in turn: (float32, None) or (int8, bfloat16 scales).

    Raises `CheckpointError` where there are files in `ckpt-0/` already.
    """
    directory = model_dir / "ckpt-0"
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise CheckpointError(f"{directory}: is not empty; choose another directory")
    for index, spec in enumerate(specs_in_file_order(config)):
        weight, scales = make_tensor(spec)
        write_tensor(directory / tensor_file_name(index), weight, scales=scales)


def scale_groups(spec: ParamSpec, config: ModelConfig) -> int:
    """How many scale groups a quantised tensor is written with: one, or the configured number where it is row-parallel."""
    return (config.row_parallel_scale_groups or 1) if spec.is_row_parallel else 1


def random_tensors(config: ModelConfig, *, seed: int) -> Callable[[ParamSpec], WeightAndScales]:
    """Draws tensors with the spread of their specs; norms vary around one, and scales by column, so that a mix-up shows.

    A tensor depends on the seed and its name alone.
    """

    def draw(spec: ParamSpec) -> WeightAndScales:
        random = np.random.default_rng([seed, *spec.name.encode()])
        if spec.fan_in is None:
            return np.float32(1) + np.float32(0.1) * random.standard_normal(spec.shape, np.float32), None
        std = np.float32(spec.fan_in**-0.5)
        if not spec.is_quantized:
            return std * random.standard_normal(spec.shape, np.float32), None
        *lead, _, columns = spec.shape
        spread = random.uniform(0.5, 1.5, (*lead, scale_groups(spec, config), columns))
        weight = random.integers(-127, 127, spec.shape, np.int8, endpoint=True)
        return weight, (spread * std / UNIFORM_INT8_STD).astype(ml_dtypes.bfloat16)

    return draw


def quantized_tensors(config: ModelConfig, *, read: Callable[[str], np.ndarray]) -> Callable[[ParamSpec], WeightAndScales]:
    """Takes float32 arrays from `read(released name)` and quantises those that the release holds as int8.

    What it returns raises `CheckpointError` for a wrong shape or dtype.
    """

    def convert(spec: ParamSpec) -> WeightAndScales:
        array = read(spec.name)
        if array.shape != spec.shape or array.dtype != np.float32:
            raise CheckpointError(f"{spec.name}: expected float32 {list(spec.shape)}, found {array.dtype} {list(array.shape)}")
        return quantize(array, scale_groups(spec, config)) if spec.is_quantized else (array, None)

    return convert
