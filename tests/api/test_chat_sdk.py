"""Chat by the official OpenAI SDK against a real port: its own types, streams, tools and `parse()`."""

import json
from collections.abc import Iterator
from typing import Any, cast

import openai
import pytest
from chat_scripts import TIME, TIME_CALL, WEATHER, WEATHER_CALL, cut_script, turn_script
from fake_engine import FakeEngineClient, engine_info, tokens_script
from pydantic import BaseModel

from engine.types import FinishReason

ASK: list[Any] = [{"role": "user", "content": "Is it warm in Rome?"}]
TOOLS: list[Any] = [WEATHER, TIME]


class Weather(BaseModel):
    """What the weather is like."""

    city: str
    days: int


@pytest.fixture
def engine() -> FakeEngineClient:
    """With room for descriptions of tools."""
    return FakeEngineClient(info=engine_info(max_model_len=16_384))


@pytest.fixture
def sdk(live_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live_url}/v1/", api_key="unused", max_retries=0) as client:
        yield client


def test_an_answer_reads_as_the_sdks_own_type(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(" Yes, it is.")

    answer = sdk.chat.completions.create(model="tiny", messages=ASK, logprobs=True, top_logprobs=2)

    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", "Yes, it is.", None)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert choice.logprobs.content[0].bytes
    assert answer.usage is not None
    assert answer._request_id


def test_a_stream_joins_to_the_whole_answer_and_ends_with_usage(sdk: openai.OpenAI):
    whole = sdk.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, seed=4).choices[0].message.content

    chunks = list(
        sdk.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, seed=4, stream=True, stream_options={"include_usage": True})
    )

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == whole
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_the_stream_helper_accumulates_text_and_logprobs(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(" Yes, it is warm.")

    with sdk.chat.completions.stream(model="tiny", messages=ASK, logprobs=True) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()

    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= {*kinds}
    assert final.choices[0].message.content == "Yes, it is warm."
    assert final.choices[0].finish_reason == "stop"


def test_the_stream_helper_accumulates_parallel_calls(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(f" Well.\n{WEATHER_CALL}\n{TIME_CALL}")

    with sdk.chat.completions.stream(model="tiny", messages=ASK, tools=TOOLS) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (choice,) = stream.get_final_completion().choices

    assert [call.function.name for call in choice.message.tool_calls or []] == ["get_weather", "get_time"]
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls or []] == [{"city": "Rome", "days": 3}, {}]
    assert choice.finish_reason == "tool_calls"
    assert "".join(delta.arguments_delta for delta in deltas if delta.index == 0) == '{"city": "Rome", "days": 3}'


def test_a_call_goes_round_with_its_result(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(f" {WEATHER_CALL}")
    message = sdk.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice="required").choices[0].message
    assert message.tool_calls
    engine.script = turn_script(" Yes, 21 degrees.")

    answer = sdk.chat.completions.create(
        model="tiny",
        messages=[*ASK, cast("Any", message), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21"}],
        tools=TOOLS,
    )

    assert answer.choices[0].message.content == "Yes, 21 degrees."


def test_parse_gives_a_pydantic_model(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script('{"city": "Rome", "days": 3}')

    message = sdk.chat.completions.parse(model="tiny", messages=ASK, response_format=Weather).choices[0].message

    assert message.parsed == Weather(city="Rome", days=3)
    assert '"city"' in (engine.submitted[0].grammar or "")


def test_parse_gives_the_arguments_of_a_pydantic_tool(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script('<tool_call>{"name": "Weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>')

    completion = sdk.chat.completions.parse(model="tiny", messages=ASK, tools=[openai.pydantic_function_tool(Weather)])

    (call,) = completion.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Rome", days=3)


def test_a_streamed_answer_is_parsed_at_its_end(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script('{"city": "Rome", "days": 3}')

    with sdk.chat.completions.stream(model="tiny", messages=ASK, response_format=Weather) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()

    assert final.choices[0].message.parsed == Weather(city="Rome", days=3)


def test_parse_says_when_an_answer_was_cut(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = cut_script('{"city": "Ro')

    with pytest.raises(openai.LengthFinishReasonError):
        sdk.chat.completions.parse(model="tiny", messages=ASK, response_format=Weather)


def test_a_wrong_field_is_a_bad_request_error_with_its_parts(sdk: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        )

    assert refusal.value.param == "messages"
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.request_id


def test_a_generation_that_fails_is_not_tried_again(live_url: str, engine: FakeEngineClient):
    engine.script = tokens_script(340, finish=FinishReason.ERROR)

    with openai.OpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=2) as sdk, pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model="tiny", messages=ASK)

    assert len(engine.submitted) == 1


def test_extra_fields_of_other_servers_go_through_extra_body(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(" fox.")

    answer = sdk.chat.completions.create(
        model="tiny",
        messages=[*ASK, {"role": "assistant", "content": "The little"}],
        extra_body={"continue_final_message": True, "add_generation_prompt": False, "top_k": 5},
    )

    assert answer.choices[0].message.content == " fox."
    assert engine.submitted[0].sampling.top_k == 5


@pytest.mark.anyio
async def test_the_async_client_chats_and_streams(live_url: str, engine: FakeEngineClient):
    engine.script = turn_script(" Yes, it is.")

    async with openai.AsyncOpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=0) as sdk:
        whole = await sdk.chat.completions.create(model="tiny", messages=ASK)
        stream = await sdk.chat.completions.create(model="tiny", messages=ASK, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert text == whole.choices[0].message.content == "Yes, it is."
