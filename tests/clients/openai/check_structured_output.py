"""`openai`: response_format on chat, and parse() with pydantic models, whole and streamed."""

import json

import openai
from pets import Pet
from served import MODEL, QUESTION, Refused

sdk = openai.OpenAI(timeout=60)


def check_parse_gives_an_object_of_the_model_asked_for():
    answer = sdk.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Pet, max_tokens=400, seed=1)

    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Pet)
    assert choice.message.refusal is None


def check_the_stream_helper_parses_as_the_text_grows():
    request = {"model": MODEL, "messages": QUESTION, "response_format": Pet, "max_tokens": 400, "seed": 2}

    with sdk.chat.completions.stream(**request) as stream:
        events = list(stream)
        final = stream.get_final_completion()

    parts = [event.parsed for event in events if event.type == "content.delta" and event.parsed]
    assert parts
    assert isinstance(final.choices[0].message.parsed, Pet)
    assert final.choices[0].message.parsed.model_dump(mode="json").keys() >= parts[0].keys()


def check_json_mode_gives_an_object():
    answer = sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Answer in JSON."}],
        response_format={"type": "json_object"},
        max_tokens=300,
        temperature=0,
    )

    (choice,) = answer.choices
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def check_a_text_format_is_the_default():
    answer = sdk.chat.completions.create(model=MODEL, messages=QUESTION, response_format={"type": "text"}, max_tokens=3)

    assert answer.choices[0].message.content is not None


def check_a_choice_and_a_pattern_hold_on_both_endpoints():
    choice = {"structured_outputs": {"choice": ["red", "green", "blue"]}}
    pattern = {"structured_outputs": {"regex": "[0-9]{3}-[0-9]{2}"}}

    chosen = sdk.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=20, extra_body=choice).choices[0]
    matching = sdk.completions.create(model=MODEL, prompt="My number is ", max_tokens=20, extra_body=pattern).choices[0]

    assert chosen.message.content in ("red", "green", "blue")
    assert chosen.finish_reason == matching.finish_reason == "stop"
    assert len(matching.text) == 6
    assert matching.text[3] == "-"


def check_a_text_that_is_cut_raises_rather_than_parse():
    with Refused(openai.LengthFinishReasonError) as refusal:
        sdk.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Pet, max_tokens=3)

    assert refusal.error.completion.usage.completion_tokens == 3
