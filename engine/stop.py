"""When a sequence ends, as far as token ids and the clock can tell. Stop strings are text and are found by `engine/output.py`."""

from engine.sequence import Sequence
from engine.types import FinishReason, SamplingParams


def end_token_ids(sampling: SamplingParams, eos_token: int) -> tuple[int, ...]:
    """The ids that end this generation; they are masked until `min_tokens` are out."""
    return sampling.stop_token_ids if sampling.ignore_eos else (eos_token, *sampling.stop_token_ids)


def finish_reason(sequence: Sequence, *, eos_token: int, max_model_len: int) -> FinishReason | None:
    """Whether the newest token of the sequence, or its length, ends it."""
    sampling = sequence.request.sampling
    if sequence.num_output_tokens and sequence.token_ids[-1] in end_token_ids(sampling, eos_token):
        return FinishReason.STOP
    if sequence.num_output_tokens >= sampling.max_tokens or sequence.num_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None


def is_past_deadline(sequence: Sequence, now_s: float) -> bool:
    """True once the request's deadline (monotonic clock, seconds) has come."""
    deadline = sequence.request.deadline_s
    return deadline is not None and now_s >= deadline
