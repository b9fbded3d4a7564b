"""`anthropic` on /v1/messages and /v1/messages/count_tokens: answers, streams, tools, parse(), typed errors, streams that are left."""

import os
from typing import Any, Literal

import anthropic
from anthropic.types import Message
from pydantic import BaseModel
from served import HAS_KEYS, KEY, MODEL, QUESTION, URL, WEATHER_SCHEMA, Refused, assert_nothing_runs_within, is_weather_call, num_running

sdk = anthropic.Anthropic(timeout=60, max_retries=0)
WEATHER = {"name": "get_weather", "description": "Tell the weather.", "input_schema": WEATHER_SCHEMA}
KNOBS = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}  # which newer SDKs have no arguments for
GREEDY = {"temperature": 0}
REQUIRED = {"type": "any", "disable_parallel_tool_use": True}


class Mood(BaseModel):
    """Without numbers and lengths: the SDK leaves their bounds out of the schema."""

    mood: Literal["happy", "sad"]
    is_hungry: bool


def check_a_message_has_every_field_that_its_type_requires():
    answer = sdk.messages.create(model=MODEL, messages=QUESTION, max_tokens=8)

    Message.model_validate(answer.to_dict())
    assert answer.id.startswith("msg_")
    assert answer.role == "assistant"
    assert answer.content[0].text
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.usage.output_tokens <= 8
    assert answer._request_id


def check_every_form_of_content_is_taken():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi!"}]},
        {"role": "user", "content": "Bye"},
    ]
    system = [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be brief."}]

    answer = sdk.messages.create(model=MODEL, messages=messages, system=system, max_tokens=4, metadata={"user_id": "ann"}, extra_body=KNOBS)

    assert answer.type == "message"


def check_no_tokens_at_all_warm_the_cache():
    answer = sdk.messages.create(model=MODEL, messages=QUESTION, max_tokens=0)

    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 0


def check_a_stop_sequence_is_named():
    answer = sdk.messages.create(model=MODEL, messages=QUESTION, max_tokens=200, stop_sequences=["a", "e", "i", "o", "u", " "])

    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence in ("a", "e", "i", "o", "u", " ")


def check_a_stream_tells_its_events_in_order():
    with sdk.messages.create(model=MODEL, messages=QUESTION, max_tokens=12, stream=True) as stream:
        events = list(stream)

    for event in events:
        type(event).model_validate(event.to_dict())
    kinds = [event.type for event in events]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.content == []
    assert events[-2].delta.stop_reason in ("end_turn", "max_tokens")
    assert events[-2].usage.output_tokens <= 12


def check_the_stream_helper_joins_to_the_whole_text():
    request = {"model": MODEL, "messages": QUESTION, "max_tokens": 16, "extra_body": GREEDY}
    whole = sdk.messages.create(**request)

    with sdk.messages.stream(**request) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens


def check_tokens_are_counted_without_generating():
    count = sdk.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be kind.")
    answer = sdk.messages.create(model=MODEL, messages=QUESTION, system="Be kind.", max_tokens=1)

    usage = answer.usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


def check_a_required_tool_is_used_with_input_that_fits():
    answer = sdk.messages.create(model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice=REQUIRED, max_tokens=200)

    Message.model_validate(answer.to_dict())
    (block,) = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use"
    assert block.name == "get_weather"
    assert is_weather_call(block.input)


def check_streamed_tool_input_joins_to_what_fits():
    named = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}

    with sdk.messages.stream(model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice=named, max_tokens=200) as stream:
        events = list(stream)
        final = stream.get_final_message()

    (block,) = [block for block in final.content if block.type == "tool_use"]
    parts = [event.partial_json for event in events if event.type == "input_json"]
    assert len(parts) > 2
    assert is_weather_call(block.input)
    assert final.stop_reason == "tool_use"


def check_a_result_goes_back_in():
    first = sdk.messages.create(model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice=REQUIRED, max_tokens=200)
    used = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "Sunny."}]}
    messages = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]

    second = sdk.messages.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice={"type": "none"}, max_tokens=8)

    assert second.content[0].type == "text"


def check_parse_gives_an_object_of_the_model_asked_for():
    answer = sdk.messages.parse(model=MODEL, messages=QUESTION, output_format=Mood, max_tokens=100)

    assert isinstance(answer.parsed_output, Mood)
    assert answer.stop_reason == "end_turn"


def check_a_wrong_value_is_a_bad_request_in_anthropics_form():
    error = _refusal(model=MODEL, messages=QUESTION, max_tokens=-1)

    assert isinstance(error, anthropic.BadRequestError)
    assert error.type == "invalid_request_error"
    assert "max_tokens" in error.message


def check_an_unknown_model_is_not_found():
    error = _refusal(model="claude-nowhere", messages=QUESTION, max_tokens=4)

    assert isinstance(error, anthropic.NotFoundError)
    assert error.type == "not_found_error"


def check_too_long_a_prompt_is_a_bad_request():
    error = _refusal(model=MODEL, messages=[{"role": "user", "content": "word " * 4000}], max_tokens=4)

    assert isinstance(error, anthropic.BadRequestError)


def check_a_key_is_taken_in_either_header():
    as_older_sdks_do = {"x-api-key": KEY, "authorization": anthropic.omit}
    with anthropic.Anthropic(api_key=None, auth_token=KEY, max_retries=0) as bearer:
        bearer.messages.create(model=MODEL, messages=QUESTION, max_tokens=1)
    sdk.messages.create(model=MODEL, messages=QUESTION, max_tokens=1, extra_headers=as_older_sdks_do)


def check_a_wrong_key_is_an_authentication_error():
    if not HAS_KEYS:
        return
    with anthropic.Anthropic(api_key=f"{KEY}-not", max_retries=0) as stranger:
        error = _refusal(stranger, model=MODEL, messages=QUESTION, max_tokens=1)

    assert isinstance(error, anthropic.AuthenticationError)
    assert error.type == "authentication_error"


def check_a_stream_that_is_left_ends_on_the_server():
    with sdk.messages.create(model=MODEL, messages=QUESTION, max_tokens=800, stream=True, extra_body={"ignore_eos": True}) as stream:
        for _ in range(6):
            next(stream)
        was_running = num_running()

    assert was_running == 1
    assert_nothing_runs_within(2)


async def check_the_async_client_answers_and_streams():
    request = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "extra_body": GREEDY}
    async with anthropic.AsyncAnthropic(timeout=60) as client:
        whole = await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            text = "".join([part async for part in stream.text_stream])

    assert text == whole.content[0].text


def check_the_address_came_from_the_environment():
    assert str(sdk.base_url).rstrip("/") == URL == os.environ["ANTHROPIC_BASE_URL"]


def _refusal(client: anthropic.Anthropic = sdk, **request: Any) -> Any:
    with Refused(anthropic.APIStatusError) as refusal:
        client.messages.create(**request)
    error = refusal.error
    assert set(error.body) >= {"type", "error"}, error.body
    assert error.body["type"] == "error"
    assert error.request_id
    return error
