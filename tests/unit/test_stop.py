"""Ends that token ids, lengths and the clock decide."""

import pytest

from engine.sequence import Sequence
from engine.stop import end_token_ids, finish_reason, is_past_deadline
from engine.types import FinishReason, GenerationRequest, SamplingParams

EOS, STOP_ID, WORD = 2, 9, 50


def sequence_of(
    *outputs: int, sampling: SamplingParams, prompt: tuple[int, ...] = (1, WORD, EOS), deadline_s: float | None = None
) -> Sequence:
    request = GenerationRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, deadline_s=deadline_s)
    return Sequence(request=request, arrival=0, token_ids=[*prompt, *outputs])


def reason_of(*outputs: int, sampling: SamplingParams, max_model_len: int = 100) -> FinishReason | None:
    return finish_reason(sequence_of(*outputs, sampling=sampling), eos_token=EOS, max_model_len=max_model_len)


def test_the_end_token_and_the_stop_ids_end_a_generation() -> None:
    assert end_token_ids(SamplingParams(stop_token_ids=(STOP_ID,)), EOS) == (EOS, STOP_ID)


def test_ignore_eos_leaves_the_stop_ids_in_force() -> None:
    assert end_token_ids(SamplingParams(stop_token_ids=(STOP_ID,), ignore_eos=True), EOS) == (STOP_ID,)


def test_a_generation_goes_on_while_nothing_ends_it() -> None:
    assert reason_of(WORD, WORD, sampling=SamplingParams(max_tokens=3)) is None


@pytest.mark.parametrize("end", [EOS, STOP_ID])
def test_an_end_token_stops_the_generation(end: int) -> None:
    assert reason_of(WORD, end, sampling=SamplingParams(stop_token_ids=(STOP_ID,))) is FinishReason.STOP


def test_an_end_token_as_last_of_max_tokens_is_a_stop() -> None:
    assert reason_of(WORD, EOS, sampling=SamplingParams(max_tokens=2)) is FinishReason.STOP


def test_an_ignored_end_token_counts_like_any_other() -> None:
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)

    assert reason_of(EOS, sampling=sampling) is None
    assert reason_of(EOS, EOS, sampling=sampling) is FinishReason.LENGTH


def test_an_end_token_at_the_end_of_the_prompt_ends_nothing() -> None:
    assert reason_of(sampling=SamplingParams(max_tokens=1)) is None


def test_max_tokens_ends_by_length() -> None:
    assert reason_of(WORD, WORD, sampling=SamplingParams(max_tokens=2)) is FinishReason.LENGTH


def test_a_generation_of_no_tokens_has_ended_by_length() -> None:
    assert reason_of(sampling=SamplingParams(max_tokens=0)) is FinishReason.LENGTH


def test_the_end_of_the_context_ends_by_length() -> None:
    assert reason_of(WORD, sampling=SamplingParams(max_tokens=50), max_model_len=5) is None
    assert reason_of(WORD, WORD, sampling=SamplingParams(max_tokens=50), max_model_len=5) is FinishReason.LENGTH


def test_a_deadline_is_over_from_its_very_moment_on() -> None:
    sequence = sequence_of(sampling=SamplingParams(), deadline_s=5.0)

    assert not is_past_deadline(sequence, 4.999)
    assert is_past_deadline(sequence, 5.0)


def test_without_a_deadline_time_never_runs_out() -> None:
    assert not is_past_deadline(sequence_of(sampling=SamplingParams()), 1e18)
