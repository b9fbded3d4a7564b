"""`openai`: every refusal is the typed exception that OpenAI's own server would raise, with its parts, and none is tried again in vain."""

from typing import Any

import openai
from served import HAS_KEYS, KEY, MODEL, QUESTION, Refused

sdk = openai.OpenAI(timeout=60, max_retries=0)


def _refusal(call: Any, **request: Any) -> Any:
    with Refused(openai.APIStatusError) as refusal:
        call(**request)
    error = refusal.error
    assert isinstance(error.message, str)
    assert error.message
    assert error.request_id
    assert set(error.body) == {"message", "type", "param", "code"}, error.body
    return error


def check_a_wrong_value_names_its_field_on_completions():
    error = _refusal(sdk.completions.create, model=MODEL, prompt="Hello", temperature=3)

    assert isinstance(error, openai.BadRequestError)
    assert (error.type, error.param, error.code) == ("invalid_request_error", "temperature", None)


def check_a_wrong_value_names_its_field_on_chat():
    error = _refusal(sdk.chat.completions.create, model=MODEL, messages=QUESTION, top_logprobs=99, logprobs=True)

    assert isinstance(error, openai.BadRequestError)
    assert (error.type, error.param) == ("invalid_request_error", "top_logprobs")


def check_a_wrong_value_names_its_field_on_responses():
    error = _refusal(sdk.responses.create, model=MODEL, input="Hello", temperature=-1)

    assert isinstance(error, openai.BadRequestError)
    assert (error.type, error.param) == ("invalid_request_error", "temperature")


def check_a_message_with_an_unknown_role_is_a_bad_request():
    error = _refusal(sdk.chat.completions.create, model=MODEL, messages=[{"role": "king", "content": "Hello"}])

    assert isinstance(error, openai.BadRequestError)
    assert error.param.startswith("messages")


def check_an_unknown_model_is_not_found_everywhere():
    calls = [
        (sdk.completions.create, {"prompt": "Hello"}),
        (sdk.chat.completions.create, {"messages": QUESTION}),
        (sdk.responses.create, {"input": "Hello"}),
    ]
    for call, request in calls:
        error = _refusal(call, model="gpt-4", **request)

        assert isinstance(error, openai.NotFoundError)
        assert (error.type, error.code) == ("invalid_request_error", "model_not_found")


def check_a_model_that_is_not_there_cannot_be_retrieved():
    assert isinstance(_refusal(sdk.models.retrieve, model="gpt-4"), openai.NotFoundError)


def check_too_long_a_prompt_carries_openais_code_everywhere():
    long = "word " * 4000
    calls = [
        (sdk.completions.create, {"prompt": long}),
        (sdk.chat.completions.create, {"messages": [{"role": "user", "content": long}]}),
        (sdk.responses.create, {"input": long}),
    ]
    for call, request in calls:
        error = _refusal(call, model=MODEL, **request)

        assert isinstance(error, openai.BadRequestError)
        assert error.code == "context_length_exceeded"


def check_embeddings_are_not_offered():
    assert isinstance(_refusal(sdk.embeddings.create, model=MODEL, input="Hello"), openai.NotFoundError)


def check_a_schema_that_cannot_be_is_a_bad_request():
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/nowhere"}}, "required": ["a"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "broken", "schema": schema}}

    error = _refusal(sdk.chat.completions.create, model=MODEL, messages=QUESTION, response_format=response_format)

    assert isinstance(error, openai.BadRequestError)
    assert error.param.startswith("response_format")


def check_a_wrong_key_is_an_authentication_error():
    if not HAS_KEYS:
        return
    with openai.OpenAI(api_key=f"{KEY}-not", max_retries=0) as stranger:
        error = _refusal(stranger.completions.create, model=MODEL, prompt="Hello")

    assert isinstance(error, openai.AuthenticationError)
    assert (error.type, error.code) == ("invalid_request_error", "invalid_api_key")


async def check_the_async_client_raises_the_same():
    async with openai.AsyncOpenAI(max_retries=0) as client:
        with Refused(openai.BadRequestError) as refusal:
            await client.completions.create(model=MODEL, prompt="Hello", n=0)

    assert refusal.error.param == "n"
