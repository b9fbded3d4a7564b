"""Choices of one scored prompt: all get its scores, and it is computed once."""

import pytest
from scripted_runner import ScriptedRunner, engine_config, expected, joined, run_until_idle, scripted_core

from engine.types import GenerationRequest, SamplingParams

PROMPT = tuple(range(3, 45))  # 42 tokens, 10 blocks of 4 and 2 tokens
SCORED = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=2)


def choices_of(prompt: tuple[int, ...], count: int) -> list[GenerationRequest]:
    return [GenerationRequest(request_id=f"{prompt[-1]}.{n}", prompt_token_ids=prompt, sampling=SCORED, choice=n) for n in range(count)]


def num_prompt_tokens(runner: ScriptedRunner, prompt: tuple[int, ...]) -> int:
    """Computed in all steps, for whichever choice."""
    items = [item for batch in runner.batches for item in batch.items if item.sequence.request.prompt_token_ids == prompt]
    return sum(max(0, min(item.start + item.num_tokens, len(prompt)) - item.start) for item in items)


@pytest.mark.parametrize("budget", [64, 16, 9])
def test_four_choices_compute_their_scored_prompt_once(budget: int) -> None:
    core, runner = scripted_core(engine_config(max_num_batched_tokens=budget, num_blocks=100))
    choices = choices_of(PROMPT, 4)
    for choice in choices:
        core.submit(choice)

    deltas = run_until_idle(core)

    assert [joined(deltas[choice.request_id]) for choice in choices] == [expected(choice) for choice in choices]
    assert num_prompt_tokens(runner, PROMPT) == 42 + 3 * 2


def test_choices_behind_an_aborted_one_compute_the_rest_themselves() -> None:
    core, runner = scripted_core(engine_config(max_num_batched_tokens=16, num_blocks=100))
    choices = choices_of(PROMPT, 3)
    for choice in choices:
        core.submit(choice)
    core.step()

    core.abort(choices[0].request_id)
    deltas = run_until_idle(core)

    for choice in choices[1:]:
        assert joined(deltas[choice.request_id]).prompt_logprobs == expected(choice).prompt_logprobs
    assert num_prompt_tokens(runner, PROMPT) <= 16 + 42 + 2


def test_another_prompt_with_the_same_beginning_waits_for_that_alone() -> None:
    core, runner = scripted_core(engine_config(max_num_batched_tokens=64, num_blocks=100))
    other = (*PROMPT[:20], *range(60, 75))
    for choice in (*choices_of(PROMPT, 1), *choices_of(other, 1)):
        core.submit(choice)

    deltas = run_until_idle(core)

    for choice in (*choices_of(PROMPT, 1), *choices_of(other, 1)):
        assert joined(deltas[choice.request_id]).prompt_logprobs == expected(choice).prompt_logprobs
    assert num_prompt_tokens(runner, other) == 35 - 16, "the score of the 20th token's successor is another one"
