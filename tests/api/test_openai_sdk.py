"""The official OpenAI SDK against a real port: the real client is the specification."""

import threading
from collections.abc import Iterator

import openai
import pytest
from fake_engine import FakeEngineClient, tokens_script
from tiny_tokenizer import tiny_tokenizer

from engine.errors import EngineDiedError
from engine.types import FinishReason, TokenDelta


@pytest.fixture
def sdk(live_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live_url}/v1/", api_key="unused", max_retries=0) as client:
        yield client


def test_a_completion_reads_as_the_sdks_own_type(sdk: openai.OpenAI):
    answer = sdk.completions.create(model="tiny", prompt="Hello", max_tokens=5)

    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens_details is not None
    assert answer._request_id


def test_a_stream_joins_to_the_whole_text_and_ends_with_usage(sdk: openai.OpenAI):
    whole = sdk.completions.create(model="tiny", prompt="Hello", max_tokens=20, seed=4).choices[0].text

    chunks = list(
        sdk.completions.create(model="tiny", prompt="Hello", max_tokens=20, seed=4, stream=True, stream_options={"include_usage": True})
    )

    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_several_choices_of_several_prompts_come_in_order(sdk: openai.OpenAI):
    answer = sdk.completions.create(model="tiny", prompt=["Hello", "Once"], n=3, max_tokens=2)

    assert [choice.index for choice in answer.choices] == list(range(6))


def test_echo_with_logprobs_covers_the_prompt(sdk: openai.OpenAI):
    ids = tiny_tokenizer().encode("Once upon a time")

    (choice,) = sdk.completions.create(model="tiny", prompt=ids, max_tokens=1, logprobs=2, echo=True).choices

    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == len(ids) + 1
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.text.startswith("Once upon a time")


def test_the_model_is_listed_and_retrieved(sdk: openai.OpenAI):
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").owned_by == "grok-server"


def test_a_wrong_field_is_a_bad_request_error_with_its_parts(sdk: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.completions.create(model="tiny", prompt="Hello", temperature=3)

    assert refusal.value.param == "temperature"
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.code is None
    assert refusal.value.request_id


def test_too_long_a_prompt_carries_openais_code(sdk: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.completions.create(model="tiny", prompt=[5] * 300)

    assert refusal.value.code == "context_length_exceeded"


def test_an_unknown_model_is_a_not_found_error(sdk: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as refusal:
        sdk.completions.create(model="gpt-4", prompt="Hello")

    assert refusal.value.code == "model_not_found"


def test_a_server_that_is_not_ready_is_an_internal_server_error(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.info = None

    with pytest.raises(openai.InternalServerError) as refusal:
        sdk.completions.create(model="tiny", prompt="Hello")

    assert refusal.value.code == "model_loading"


def test_the_sdk_does_not_retry_what_a_retry_cannot_cure(live_url: str, engine: FakeEngineClient):
    engine.script = tokens_script(340, finish=FinishReason.ERROR)

    with openai.OpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=2) as sdk, pytest.raises(openai.InternalServerError):
        sdk.completions.create(model="tiny", prompt="Hello")

    assert len(engine.submitted) == 1


def test_the_sdk_comes_back_when_told_to(live_url: str, engine: FakeEngineClient):
    info, engine.info = engine.info, None
    engine.script = tokens_script(340)
    threading.Timer(0.3, lambda: setattr(engine, "info", info)).start()

    with openai.OpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=1) as sdk:
        answer = sdk.completions.create(model="tiny", prompt="Hello")

    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_that_breaks_raises_after_its_pieces(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), 0.05, EngineDiedError("gone")]
    stream = sdk.completions.create(model="tiny", prompt="Hello", stream=True)

    first = next(stream)
    with pytest.raises(openai.APIError) as failure:
        next(stream)

    assert first.choices[0].text
    assert failure.value.code == "internal_error"


@pytest.mark.anyio
async def test_the_async_client_completes_and_streams(live_url: str):
    async with openai.AsyncOpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=0) as sdk:
        whole = await sdk.completions.create(model="tiny", prompt="Hello", max_tokens=6, seed=2)
        stream = await sdk.completions.create(model="tiny", prompt="Hello", max_tokens=6, seed=2, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
        with pytest.raises(openai.BadRequestError):
            await sdk.completions.create(model="tiny", prompt="Hello", n=0)

    assert text == whole.choices[0].text
