"""`openai` on /v1/completions and /v1/models."""

import openai
from served import MODEL, STORY, ask

sdk = openai.OpenAI(timeout=60)


def check_a_completion_has_every_field_that_its_type_requires():
    answer = sdk.completions.create(model=MODEL, prompt=STORY, max_tokens=6)

    openai.types.Completion.model_validate(answer.to_dict())
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def check_a_stream_joins_to_the_whole_text_and_ends_with_usage():
    request = {"model": MODEL, "prompt": STORY, "max_tokens": 24, "seed": 4}
    whole = sdk.completions.create(**request)

    chunks = list(sdk.completions.create(**request, stream=True, stream_options={"include_usage": True}))

    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def check_several_choices_of_several_prompts_stream_side_by_side():
    request = {"model": MODEL, "prompt": [STORY, "The old sailor"], "n": 2, "max_tokens": 8, "seed": 7}
    whole = sdk.completions.create(**request)
    texts = dict.fromkeys(range(4), "")

    for chunk in sdk.completions.create(**request, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text

    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in whole.choices] == list(texts.values())


def check_echo_with_logprobs_scores_the_prompt():
    answer = sdk.completions.create(model=MODEL, prompt=STORY, max_tokens=0, echo=True, logprobs=2)

    (choice,) = answer.choices
    logprobs = choice.logprobs
    assert choice.text == STORY
    assert answer.usage.prompt_tokens == len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(STORY[start:].startswith(token) for start, token in zip(logprobs.text_offset[1:], logprobs.tokens[1:], strict=True))


def check_token_ids_are_a_prompt():
    ids = ask("/tokenize", {"prompt": STORY, "add_special_tokens": False})["tokens"]
    request = {"model": MODEL, "max_tokens": 6, "temperature": 0}

    from_ids = sdk.completions.create(prompt=ids, **request)
    from_text = sdk.completions.create(prompt=STORY, **request)

    assert from_ids.choices[0].text == from_text.choices[0].text


def check_a_stop_string_ends_the_text_and_is_not_in_it():
    (choice,) = sdk.completions.create(model=MODEL, prompt=STORY, max_tokens=60, temperature=0, stop=["."]).choices

    assert choice.finish_reason == "stop"
    assert "." not in choice.text


def check_fields_beyond_openais_travel_in_extra_body():
    answer = sdk.completions.create(
        model=MODEL, prompt=STORY, max_tokens=3, temperature=0, extra_body={"return_token_ids": True, "top_k": 1}
    )

    assert len(answer.choices[0].token_ids) == 3


def check_the_model_is_listed_and_retrieved():
    assert MODEL in [model.id for model in sdk.models.list()]
    openai.types.Model.model_validate(sdk.models.retrieve(MODEL).to_dict())


async def check_the_async_client_completes_and_streams():
    request = {"model": MODEL, "prompt": STORY, "max_tokens": 8, "seed": 2}
    async with openai.AsyncOpenAI(timeout=60) as client:
        whole = await client.completions.create(**request)
        text = "".join([chunk.choices[0].text async for chunk in await client.completions.create(**request, stream=True)])

    assert text == whole.choices[0].text
