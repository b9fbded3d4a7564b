"""LiteLLM with its `openai/` and `text-completion-openai/` providers, which read our address and key from OpenAI's variables."""

import json

import litellm
from litellm import acompletion, completion, responses, text_completion
from pets import Pet
from served import MODEL, QUESTION, STORY, WEATHER_SCHEMA, Refused, is_weather_call

litellm.telemetry = False
CHAT = {"model": f"openai/{MODEL}", "messages": QUESTION, "timeout": 60}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Tell the weather.", "parameters": WEATHER_SCHEMA}}


def check_a_chat_is_completed():
    answer = completion(**CHAT, max_tokens=8)

    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 8


def check_a_chat_streams():
    chunks = list(completion(**CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}))

    whole = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert len(chunks) > 3
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 12


def check_structured_output_by_a_pydantic_model():
    answer = completion(**CHAT, max_tokens=400, response_format=Pet)

    Pet.model_validate_json(answer.choices[0].message.content)


def check_a_tool_is_called():
    answer = completion(**CHAT, max_tokens=200, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)

    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert is_weather_call(json.loads(call.function.arguments))


def check_a_streamed_tool_call_joins():
    chunks = list(completion(**CHAT, max_tokens=200, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, stream=True))

    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert is_weather_call(json.loads(call.function.arguments))


def check_a_text_is_completed_and_streams():
    request = {"model": f"text-completion-openai/{MODEL}", "prompt": STORY, "max_tokens": 12, "temperature": 0, "timeout": 60}
    whole = text_completion(**request).choices[0].text

    assert whole
    assert "".join(chunk.choices[0].text or "" for chunk in text_completion(**request, stream=True)) == whole


def check_a_response_is_given_and_streams():
    request = {"model": f"openai/{MODEL}", "input": "Hello!", "max_output_tokens": 16, "timeout": 60}
    answer = responses(**request)

    kinds = [event.type for event in responses(**request, stream=True)]

    assert answer.output[0].content[0].text
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def check_errors_are_typed():
    cases = [
        (litellm.NotFoundError, CHAT | {"model": "openai/gpt-nowhere"}),
        (litellm.BadRequestError, CHAT | {"temperature": 3}),
        (litellm.ContextWindowExceededError, CHAT | {"messages": [{"role": "user", "content": "word " * 4000}]}),
    ]
    for kind, request in cases:
        with Refused(kind):
            completion(**request, max_retries=0)


async def check_it_completes_and_streams_asynchronously():
    answer = await acompletion(**CHAT, max_tokens=8)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in await acompletion(**CHAT, max_tokens=8, stream=True)])

    assert answer.choices[0].message.content
    assert text
