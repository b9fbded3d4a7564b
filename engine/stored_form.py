"""The form in which a checkpoint's files hold its matrices, for those who count bytes before anything is loaded."""

from dataclasses import replace

from engine.checkpoint.tensors import Checkpoint
from engine.footprint import Setup


def as_stored(setup: Setup, checkpoint: Checkpoint) -> Setup:
    """The setup with matrices as packed as the files have them, and as the setup says where they are floats."""
    tensor = next(tensor for tensor in checkpoint.tensors.values() if tensor.spec.is_quantized)
    if tensor.form == "int8":
        model = replace(setup.model, row_parallel_scale_groups=checkpoint.row_parallel_scale_groups)
        return replace(setup, weights="int8", model=model)
    if tensor.form == "int4" and tensor.scales_source is not None:
        return replace(setup, weights="int4", int4_group=tensor.spec.shape[-2] // tensor.scales_source.shape[-2])
    return setup
