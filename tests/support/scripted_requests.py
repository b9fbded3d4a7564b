"""Requests for the scripted core: a line each."""

from engine.types import GenerationRequest, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def request(
    request_id: str, *prompt: int, sampling: SamplingParams = GREEDY, choice: int = 0, deadline_s: float | None = None
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=prompt or (5, 6, 7), sampling=sampling, choice=choice, deadline_s=deadline_s
    )
