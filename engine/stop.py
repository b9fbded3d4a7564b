"""When a sequence ends, as far as token ids and the clock can tell. Stop strings are text and are found by `engine/output.py`."""

from engine.sequence import Sequence
from engine.types import FinishReason, SamplingParams


def end_token_ids(sampling: SamplingParams, eos_token: int) -> tuple[int, ...]:
    """The ids that end this generation; they are masked until `min_tokens` are out."""
    return sampling.stop_token_ids if sampling.ignore_eos else (eos_token, *sampling.stop_token_ids)


def is_end(token: int, sampling: SamplingParams, *, eos_token: int) -> bool:
    """Whether this token, generated, ends the generation."""
    return token in sampling.stop_token_ids or (token == eos_token and not sampling.ignore_eos)


def finish_reason(sequence: Sequence, *, eos_token: int, max_model_len: int) -> FinishReason | None:
    """Whether the newest known token of the sequence, or its length, ends it. A token that is still pending does not count."""
    num_tokens = len(sequence.token_ids)
    if num_tokens > sequence.num_prompt_tokens and is_end(sequence.token_ids[-1], sequence.request.sampling, eos_token=eos_token):
        return FinishReason.STOP
    if num_tokens >= sequence.max_len or num_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None


def is_past_deadline(sequence: Sequence, now_s: float) -> bool:
    """True once the request's deadline (monotonic clock, seconds) has come."""
    deadline = sequence.request.deadline_s
    return deadline is not None and now_s >= deadline
