"""`openai` on /v1/responses: answers, their stream of events, tools, parse(), the store."""

import json

import openai
from openai.types.responses import Response
from pets import Pet
from served import MODEL, WEATHER_SCHEMA, Refused, is_weather_call

sdk = openai.OpenAI(timeout=60)
WEATHER = {"type": "function", "name": "get_weather", "description": "Tell the weather.", "parameters": WEATHER_SCHEMA, "strict": True}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "response.completed",
]


def check_a_response_has_every_field_that_its_type_requires():
    answer = sdk.responses.create(model=MODEL, input="Hello!", instructions="Be brief.", max_output_tokens=400, metadata={"a": "b"})

    Response.model_validate(answer.to_dict())
    assert answer.id.startswith("resp_")
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text
    assert answer.output[0].role == "assistant"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be brief.", {"a": "b"}, 400)


def check_a_response_that_is_cut_says_so():
    answer = sdk.responses.create(model=MODEL, input="Tell me a long story.", max_output_tokens=16, extra_body={"ignore_eos": True})

    assert answer.usage.output_tokens <= 16
    if answer.usage.output_tokens == 16:
        assert answer.status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"


def check_items_of_every_kind_are_an_input():
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi!", "annotations": []}]},
        {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "Sunny."},
        {"role": "user", "content": "Thank you"},
    ]

    answer = sdk.responses.create(model=MODEL, input=items, tools=[WEATHER], tool_choice="none", max_output_tokens=16)

    assert answer.output_text


def check_a_stream_tells_its_events_in_order():
    request = {"model": MODEL, "input": "Hello!", "max_output_tokens": 24, "temperature": 0}
    whole = sdk.responses.create(**request)

    events = list(sdk.responses.create(**request, stream=True))

    for event in events:
        type(event).model_validate(event.to_dict())
    kinds = [event.type for event in events]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == [
        *TEXT_EVENTS,
        f"response.{whole.status}",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    last = events[-1].response
    assert text == done.text == last.output_text == whole.output_text
    assert last.id == events[0].response.id
    assert last.usage == whole.usage


def check_the_stream_helper_parses_a_model():
    with sdk.responses.stream(model=MODEL, input="Tell me of a pet.", text_format=Pet, max_output_tokens=400) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()

    assert isinstance(final.output_parsed, Pet)


def check_parse_gives_an_object_of_the_model_asked_for():
    answer = sdk.responses.parse(model=MODEL, input="Tell me of a pet.", text_format=Pet, max_output_tokens=400)

    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, Pet)


def check_a_required_call_has_arguments_that_fit():
    request = {"model": MODEL, "input": "Hello!", "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}

    answer = sdk.responses.create(**request, max_output_tokens=200)

    Response.model_validate(answer.to_dict())
    (call,) = answer.output
    assert answer.status == "completed"
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert call.call_id
    assert is_weather_call(json.loads(call.arguments))


def check_streamed_arguments_join_to_json():
    request = {"model": MODEL, "input": "Hello!", "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}

    events = list(sdk.responses.create(**request, max_output_tokens=200, stream=True))

    for event in events:
        type(event).model_validate(event.to_dict())
    kinds = [event.type for event in events]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == CALL_EVENTS
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (call,) = events[-1].response.output
    assert arguments == call.arguments
    assert is_weather_call(json.loads(arguments))


def check_a_stored_response_goes_on_comes_back_and_is_deleted():
    first = sdk.responses.create(model=MODEL, input="My name is Ann.", max_output_tokens=16)

    second = sdk.responses.create(model=MODEL, input="What is my name?", previous_response_id=first.id, max_output_tokens=16)
    again = sdk.responses.retrieve(first.id)
    sdk.responses.delete(first.id)

    alone = sdk.responses.create(model=MODEL, input="What is my name?", max_output_tokens=16)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > alone.usage.input_tokens
    assert again.output_text == first.output_text
    with Refused(openai.NotFoundError) as refusal:
        sdk.responses.retrieve(first.id)
    assert refusal.error.type == "invalid_request_error"


def check_a_response_that_is_not_to_be_stored_is_not():
    answer = sdk.responses.create(model=MODEL, input="Hello!", store=False, max_output_tokens=16)

    with Refused(openai.NotFoundError):
        sdk.responses.retrieve(answer.id)


def check_a_previous_response_that_is_not_there_is_told():
    with Refused(openai.APIStatusError) as refusal:
        sdk.responses.create(model=MODEL, input="Hello!", previous_response_id="resp_nowhere", max_output_tokens=16)

    assert refusal.error.status_code in (400, 404)
    assert refusal.error.param == "previous_response_id"


async def check_the_async_client_answers_and_streams():
    request = {"model": MODEL, "input": "Hello!", "max_output_tokens": 16, "temperature": 0}
    async with openai.AsyncOpenAI(timeout=60) as client:
        whole = await client.responses.create(**request)
        stream = await client.responses.create(**request, stream=True)
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert text == whole.output_text
