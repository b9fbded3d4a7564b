"""`python -m engine.plan_query`: a question about a machine on standard input, the plan on standard output, both JSON.

`grok-server plan` runs it, because what it needs is what the server must not import. `engine/compile_plan.py` takes the same questions.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import msgspec

from engine.checkpoint.checkpoint import formats_in, open_checkpoint
from engine.config import DType, KVDType, ModelConfig, SchedulerConfig, mesh_of
from engine.errors import ConfigError, EngineError
from engine.footprint import DEVICES, Setup, WeightFormat
from engine.plan import Question, as_json, make_plan
from engine.stored_form import as_stored


class Query(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A `Question` as it travels."""

    model: ModelConfig
    device: str  # one of `footprint.DEVICES`
    device_bytes: int | None = None  # where it has another memory than that one
    num_devices: int = 1  # that share each matrix, or hold whole experts
    data_parallel: int = 1
    is_expert_parallel: bool = False
    model_dir: str | None = None  # whose files say the form of the weights, if the question does not
    weights: WeightFormat | None = None  # None: as in the files; int8, as released, where there are none
    kv: KVDType | None = None  # None: as the activations
    dtype: DType = "bfloat16"
    scheduler: SchedulerConfig
    block_size: int = 16
    memory_share: float = 0.9
    step_bytes: int | None = None  # temporaries of the compiled step, where it was compiled for such a device

    def question(self) -> Question:
        """Raises `ConfigError` for a device that nobody knows, `CheckpointError` for files that are no such model."""
        device = DEVICES.get(self.device)
        if device is None:
            raise ConfigError(f"--device: {self.device} is none of {', '.join(DEVICES)}; take a near one and give its --device-memory")
        if self.device_bytes is not None:
            device = replace(device, memory_bytes=self.device_bytes)
        mesh = mesh_of(self.model, num_devices=self.num_devices, data=self.data_parallel, is_expert_parallel=self.is_expert_parallel)
        directory = Path(self.model_dir) if self.model_dir is not None else None
        files = directory if self.weights is None and directory is not None and formats_in(directory) else None
        setup = Setup(
            model=self.model,
            mesh=mesh,
            scheduler=self.scheduler,
            weights=self.weights or ("int8" if files is None else self.dtype),
            kv=self.kv or self.dtype,
            dtype=self.dtype,
            block_size=self.block_size,
        )
        if files is not None:
            setup = as_stored(setup, open_checkpoint(files, self.model))
        return Question(setup=setup, device=device, memory_share=self.memory_share, step_bytes=self.step_bytes)


def read_question(text: bytes) -> Question:
    """Raises `EngineError` or `msgspec.DecodeError`."""
    return msgspec.json.decode(text, type=Query).question()


def main() -> int:
    """Standard input to standard output; a question that makes no sense is an error object and status 2."""
    try:
        plan = make_plan(read_question(sys.stdin.buffer.read()))
    except (EngineError, msgspec.DecodeError) as error:
        print(json.dumps({"error": str(error)}))
        return 2
    print(json.dumps(as_json(plan)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
