"""`openai`: tools on chat completions. A call is required where one is expected: the default model would hardly make one of itself."""

import json
from typing import Literal

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field
from served import MODEL, QUESTION, WEATHER_SCHEMA, is_weather_call

sdk = openai.OpenAI(timeout=60)
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tell the weather.", "parameters": WEATHER_SCHEMA, "strict": True},
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "Tell the time."}}


class GetWeather(BaseModel):
    """Arguments as a pydantic model."""

    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=7)


def check_a_required_call_has_arguments_that_fit():
    answer = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )

    ChatCompletion.model_validate(answer.to_dict())
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.id
    assert call.function.name == "get_weather"
    assert is_weather_call(json.loads(call.function.arguments))


def check_a_named_tool_is_the_one_called():
    named = {"type": "function", "function": {"name": "get_weather"}}

    answer = sdk.chat.completions.create(model=MODEL, messages=QUESTION, tools=[CLOCK, WEATHER], tool_choice=named, max_tokens=200)

    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert is_weather_call(json.loads(call.function.arguments))


def check_no_tool_is_called_when_none_may_be():
    answer = sdk.chat.completions.create(model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="none", max_tokens=10)

    assert not answer.choices[0].message.tool_calls
    assert answer.choices[0].message.content


def check_tools_may_be_left_alone():
    answer = sdk.chat.completions.create(model=MODEL, messages=QUESTION, tools=[WEATHER], max_tokens=30, seed=1)

    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def check_streamed_arguments_join_to_json():
    request = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200, "seed": 6}
    request["parallel_tool_calls"] = False
    whole = sdk.chat.completions.create(**request)

    chunks = [choice for chunk in sdk.chat.completions.create(**request, stream=True) for choice in chunk.choices]

    deltas = [call for choice in chunks for call in choice.delta.tool_calls or []]
    assert {delta.index for delta in deltas} == {0}
    assert deltas[0].function.name == "get_weather"
    assert deltas[0].id
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert len(deltas) > 2
    assert "".join(delta.function.arguments or "" for delta in deltas) == whole.choices[0].message.tool_calls[0].function.arguments
    assert chunks[-1].finish_reason == "tool_calls"


def check_the_stream_helper_tells_when_a_call_is_complete():
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")

    with sdk.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()

    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    (call,) = final.choices[0].message.tool_calls
    assert isinstance(done.parsed_arguments, GetWeather)
    assert call.function.parsed_arguments == done.parsed_arguments


def check_parse_gives_arguments_as_the_model_asked_for():
    tool = openai.pydantic_function_tool(GetWeather)

    answer = sdk.chat.completions.parse(model=MODEL, messages=QUESTION, tools=[tool], tool_choice="required", max_tokens=300)

    assert all(isinstance(call.function.parsed_arguments, GetWeather) for call in answer.choices[0].message.tool_calls)


def check_a_tool_that_takes_nothing_is_called_with_nothing():
    answer = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[CLOCK], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )

    if answer.choices[0].finish_reason == "tool_calls":  # its arguments may be any object, so the length may end it
        assert isinstance(json.loads(answer.choices[0].message.tool_calls[0].function.arguments), dict)


def check_a_result_goes_back_in():
    first = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    message = first.choices[0].message
    messages = [*QUESTION, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny, 21 degrees."}]

    second = sdk.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=10)
    without = sdk.chat.completions.create(model=MODEL, messages=messages[:-1], tools=[WEATHER], tool_choice="none", max_tokens=1)

    assert second.usage.prompt_tokens > without.usage.prompt_tokens
    assert second.choices[0].message.content
