"""Whether a converted checkpoint holds what its source holds: exactly where the forms are equal, else by how much the values differ.

`convert --verify` runs this. It reads all of both checkpoints, a block of each at a time; digests are `verify`'s work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.convert import blocks
from engine.checkpoint.dequantize import read_slice
from engine.checkpoint.tensors import HostTensor, WeightForm
from engine.config import read_model_config
from engine.errors import CheckpointError
from engine.types import Progress

# Root of the mean squared error over that of the values: what is beyond has another cause than the rounding of its form.
MOST_RMS_ERROR: dict[WeightForm, float] = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.05, "int4": 0.2}

_MAX_PROBLEMS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How one tensor differs. Errors are relative: the largest to the largest value, the RMS to the RMS of the values."""

    name: str
    source_form: WeightForm
    form: WeightForm
    is_exact: bool  # compared to the bit, because nothing was to be rounded
    max_error: float
    rms_error: float


def compare(
    source: Path, target: Path, *, report: Callable[[Comparison], None], report_progress: Callable[[Progress], None]
) -> list[Comparison]:
    """Every tensor of both. Raises `CheckpointError` at the end, naming the tensors that differ by more than their form explains."""
    first = open_checkpoint(source, read_model_config(source))
    second = open_checkpoint(target, read_model_config(target))
    for name, tensor in first.tensors.items():
        other = second.tensors.get(name)
        if other is None or other.spec.shape != tensor.spec.shape:
            there = "is not in it" if other is None else f"is {list(other.spec.shape)} there"
            raise CheckpointError(f"{target}: is of another model than {source}: {name} of {list(tensor.spec.shape)} {there}")
    if surplus := sorted(second.tensors.keys() - first.tensors.keys()):
        raise CheckpointError(f"{target}: is of another model than {source}, which has no {surplus[0]}")
    found: list[Comparison] = []
    total, done = sum(tensor.spec.num_params for tensor in first.tensors.values()), 0
    for name, tensor in first.tensors.items():
        found.append(_compare(tensor, second.tensors[name]))
        report(found[-1])
        done += tensor.spec.num_params
        report_progress(Progress(phase="compare", done=done, total=total, unit="weights", detail=name))
    problems = [comparison for comparison in found if _is_too_far(comparison)]
    if problems:
        named = ", ".join(f"{problem.name} by {problem.rms_error:.3g} (RMS)" for problem in problems[:_MAX_PROBLEMS])
        more = f", and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError(f"{target}: differs from {source} by more than rounding: {named}{more}; convert it again")
    return found


def _compare(first: HostTensor, second: HostTensor) -> Comparison:
    weights, scales = (first.weight, second.weight), (first.scales, second.scales)
    is_exact = first.form == second.form and (scales[0] is None or (scales[1] is not None and scales[0].shape == scales[1].shape))
    squares = difference_squares = largest = largest_difference = 0.0
    for index in blocks(first.spec.shape, 2):
        real = read_slice(first.form, weights[0], scales[0], index, np.float32)
        difference = np.abs(read_slice(second.form, weights[1], scales[1], index, np.float32) - real)
        largest_difference = max(largest_difference, float(np.nan_to_num(difference.max(), nan=np.inf)))
        largest = max(largest, float(np.abs(real).max()))
        squares += float(np.einsum("i,i->", real.reshape(-1), real.reshape(-1), dtype=np.float64))
        difference_squares += float(np.einsum("i,i->", difference.reshape(-1), difference.reshape(-1), dtype=np.float64))
    return Comparison(
        name=first.spec.name,
        source_form=first.form,
        form=second.form,
        is_exact=is_exact,
        max_error=_ratio(largest_difference, largest),
        rms_error=_ratio(difference_squares, squares) ** 0.5,
    )


def _ratio(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole and np.isfinite(part) else float("inf")


def _is_too_far(comparison: Comparison) -> bool:
    limit = 0.0 if comparison.is_exact else MOST_RMS_ERROR[comparison.form]
    return not (comparison.rms_error <= limit and (limit > 0 or comparison.max_error == 0))
