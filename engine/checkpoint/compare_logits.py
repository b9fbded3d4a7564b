"""How far a converted model's logits are from its source's on given prompts, both computed in float32 on the CPU, one after the other.

`convert --compare-prompt` runs this behind the conversion, and `check` before it: whatever would be in the way is known before hours of
work. The result is kept beside the weights, in `REPORT_NAME`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.convert import Settings, target_entries
from engine.checkpoint.logits import Arithmetic, prompt_logits
from engine.checkpoint.tensors import Checkpoint, WeightForm
from engine.config import ModelConfig, read_model_config
from engine.errors import CheckpointError
from engine.model.params import LayerParams, each_spec, layer_specs, param_specs

Prompts = Mapping[str, Sequence[int]]  # token ids, by the name under which the result tells of them

REPORT_NAME = "logit-errors.json"
MAX_PROMPT_TOKENS = 512

_RUNTIME_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitError:
    """How far the logits of one prompt are from the source's, over all its positions."""

    prompt: str  # its name
    num_tokens: int  # with the start token
    max_error: float
    rms_error: float
    std_of_logits: float  # the source's, to measure the errors by
    same_likeliest: float  # share of the positions


def check(source: Path, prompts: Prompts, *, memory_bytes: int, target: Path | None = None, settings: Settings | None = None) -> None:
    """Raises `EngineError` for prompts that the model cannot take, and for models that do not fit into `memory_bytes`.

    What the source is compared with is a checkpoint, or what `settings` will make of it.
    """
    config = read_model_config(source)
    checkpoint = open_checkpoint(source, config)
    _check_prompts(prompts, config)
    forms = [_stored_forms(checkpoint)]
    if settings is not None:
        forms.append({entry.name: (entry.form, entry.num_bytes) for entry in target_entries(checkpoint, config, settings)})
    if target is not None:
        forms.append(_stored_forms(open_checkpoint(target, read_model_config(target))))
    needed = max(_bytes_to_run(config, each) for each in forms)
    if needed > memory_bytes:
        raise CheckpointError(
            f"{source}: comparing logits takes about {needed:,} bytes of memory, {memory_bytes:,} are here; convert without, and compare "
            "with --verify on a larger machine"
        )


def compare_logits(source: Path, target: Path, prompts: Prompts, *, report: Callable[[LogitError], None]) -> list[LogitError]:
    """Compute all prompts with both, and keep the result beside the target's weights. Raises `EngineError`; `check` comes first."""
    runs = list(prompts.values())
    expected = list(prompt_logits(source, runs, Arithmetic()))
    found: list[LogitError] = []
    for (prompt, token_ids), logits, other in zip(prompts.items(), expected, prompt_logits(target, runs, Arithmetic()), strict=True):
        error = other - logits
        found.append(
            LogitError(
                prompt=prompt,
                num_tokens=len(token_ids),
                max_error=float(np.abs(error).max()),
                rms_error=float(np.sqrt(np.square(error, dtype=np.float64).mean())),
                std_of_logits=float(logits.std()),
                same_likeliest=float((logits.argmax(axis=-1) == other.argmax(axis=-1)).mean()),
            )
        )
        report(found[-1])
    try:
        (target / REPORT_NAME).write_text(
            json.dumps({"source": str(source), "prompts": [asdict(error) for error in found]}, indent=1) + "\n"
        )
    except OSError as error:
        raise CheckpointError(f"{target / REPORT_NAME}: cannot be written: {error.strerror}") from None
    return found


def _check_prompts(prompts: Prompts, config: ModelConfig) -> None:
    most = min(MAX_PROMPT_TOKENS, config.sequence_len)
    for prompt, token_ids in prompts.items():
        if not 1 <= len(token_ids) <= most:
            raise CheckpointError(f"the prompt {prompt[:40]!r} to compare is {len(token_ids):,} tokens, must be 1 to {most:,}")
        if outside := [token_id for token_id in token_ids if not 0 <= token_id < config.vocab_size]:
            raise CheckpointError(f"the token id {outside[0]} to compare is outside the vocabulary of {config.vocab_size:,}")


def _stored_forms(checkpoint: Checkpoint) -> dict[str, tuple[WeightForm, int]]:
    """Form and bytes of every tensor."""
    return {name: (tensor.form, tensor.num_bytes) for name, tensor in checkpoint.tensors.items()}


def _bytes_to_run(config: ModelConfig, forms: dict[str, tuple[WeightForm, int]]) -> int:
    """int8 and int4 stay packed, all else becomes float32; one layer at a time may be unpacked, and a few arrays of logits exist."""
    weights = sum(
        forms[spec.name][1] if forms[spec.name][0] in ("int8", "int4") else 4 * spec.num_params for spec in each_spec(param_specs(config))
    )
    layer = sum(4 * getattr(layer_specs(config, 0), field.name).num_params for field in fields(LayerParams))
    return weights + layer + 3 * 4 * MAX_PROMPT_TOKENS * config.vocab_size + _RUNTIME_BYTES
