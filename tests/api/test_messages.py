"""Anthropic's `POST /v1/messages` and `count_tokens`, whole answers: blocks, reasons, errors, and the SDK against a real port."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount
from anthropic.types.shared import ErrorResponse
from chat_scripts import TIME_CALL, WEATHER_CALL, cut_script, turn_script
from fake_engine import HANG, FakeEngineClient, counting_script, engine_info, tiny_config
from fastapi import FastAPI
from live_server import serve_in_thread
from pydantic import BaseModel
from tiny_tokenizer import tiny_tokenizer

from engine.errors import EngineDiedError
from engine.types import FinishReason, TokenDelta
from server.api_keys import ApiKey, ApiKeys
from server.app import create_app
from server.limits import Limits
from server.schemas.messages import MessagesRequest

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TIME = {"name": "get_time", "input_schema": {"type": "object"}}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(info=replace(engine_info(), max_model_len=2048), script=turn_script(" Hello world!"))


@pytest.fixture
def sdk(live_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live_url, api_key="unused", max_retries=0) as client:
        yield client


async def post(http: httpx.AsyncClient, **body: object) -> httpx.Response:
    return await http.post("/v1/messages", json={"max_tokens": 100, "messages": HELLO} | body)


async def message(http: httpx.AsyncClient, **body: object) -> dict:
    response = await post(http, **body)
    assert response.status_code == 200, response.text
    Message.model_validate(response.json())
    return response.json()


async def refusal(http: httpx.AsyncClient, *, status: int = 400, **body: object) -> dict:
    response = await post(http, **body)
    assert response.status_code == status, response.text
    return error_of(response)


def error_of(response: httpx.Response) -> dict:
    """The error of an answer in Anthropic's shape, which has nothing else."""
    body = response.json()
    if body["error"]["type"] != "request_too_large":  # in Anthropic's documents, but not among the SDK's types
        ErrorResponse.model_validate(body)
    assert set(body) == {"type", "error", "request_id"}
    assert set(body["error"]) == {"type", "message"}
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return body["error"]


def prompt_text(engine: FakeEngineClient) -> str:
    return tiny_tokenizer().decode(engine.submitted[-1].prompt_token_ids)


async def test_a_message_has_every_field_of_the_sdks_type(http: httpx.AsyncClient, engine: FakeEngineClient):
    response = await post(http, model="tiny")

    answer = response.json()
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello world!", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(engine.submitted[0].prompt_token_ids),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(tiny_tokenizer().encode_continuation(" Hello world!")) + 1,
        },
    }
    assert response.headers["request-id"] == response.headers["x-request-id"]


async def test_messages_are_turns_of_groks_format(http: httpx.AsyncClient, engine: FakeEngineClient):
    await message(
        http,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Be kind."}],
        messages=[
            {"role": "user", "content": "Who"},
            {"role": "user", "content": [{"type": "text", "text": "are you?"}]},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "Let me look."}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "t2", "name": "get_time", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                    {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "no clock"}], "is_error": True},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
    )

    assert prompt_text(engine) == (
        "System: Be brief.\nBe kind.<|separator|>\n\nHuman: Who\nare you?<|separator|>\n\n"
        'Assistant: Let me look.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>\n'
        '<tool_call>{"name": "get_time", "arguments": {}}</tool_call><|separator|>\n\n'
        "Tool get_weather: sunny<|separator|>\n\nTool get_time: Error: no clock<|separator|>\n\nHuman: Well?<|separator|>\n\nAssistant:"
    )


async def test_a_last_message_of_the_assistants_is_gone_on_from(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(" world!")

    answer = await message(http, messages=[*HELLO, {"role": "assistant", "content": "Hello"}])

    assert prompt_text(engine).endswith("Assistant: Hello")
    assert answer["content"][0]["text"] == " world!"


async def test_very_many_blocks_are_one_turn_and_hold_nobody_up(http: httpx.AsyncClient):
    blocks = [{"type": "text", "text": "word"}] * 20_000
    started_s = time.process_time()

    counted = await http.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": blocks}]})

    assert counted.json()["input_tokens"] > 40_000
    assert time.process_time() - started_s < 10


async def test_an_empty_last_message_of_the_assistants_is_as_good_as_none(http: httpx.AsyncClient, engine: FakeEngineClient):
    await message(http, messages=[*HELLO, {"role": "assistant", "content": ""}])

    assert prompt_text(engine).endswith("Human: Hello<|separator|>\n\nAssistant:")


async def test_tool_uses_are_blocks_with_their_input_as_an_object(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(f" Let me see.\n{WEATHER_CALL}\n{TIME_CALL}")

    answer = await message(http, tools=[WEATHER, TIME])

    text, weather, clock = answer["content"]
    assert text["text"] == "Let me see.\n"
    assert (weather["type"], weather["name"], weather["input"]) == ("tool_use", "get_weather", {"city": "Rome", "days": 3})
    assert (clock["name"], clock["input"]) == ("get_time", {})
    assert weather["id"].startswith("toolu_")
    assert weather["id"] != clock["id"]
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "offered", "must_call"),
    [
        ({"type": "auto"}, ["get_time", "get_weather"], False),
        ({"type": "any"}, ["get_time", "get_weather"], True),
        ({"type": "tool", "name": "get_time"}, ["get_time"], True),
        ({"type": "any", "disable_parallel_tool_use": True}, ["get_time", "get_weather"], True),
    ],
    ids=str,
)
async def test_a_tool_choice_is_kept_to(
    http: httpx.AsyncClient, engine: FakeEngineClient, choice: dict, offered: list[str], must_call: bool
):
    engine.script = turn_script(f" {TIME_CALL}")

    await message(http, tools=[WEATHER, TIME], tool_choice=choice)

    grammar = engine.submitted[0].grammar
    assert grammar is not None
    assert [name for name in ("get_time", "get_weather") if name in grammar] == offered
    assert ("TEXT" not in grammar) == must_call
    assert ("call)*" not in grammar) == ("disable_parallel_tool_use" in choice or choice["type"] == "tool")


async def test_tool_choice_none_leaves_no_tools(http: httpx.AsyncClient, engine: FakeEngineClient):
    await message(http, tools=[WEATHER], tool_choice={"type": "none"})

    assert engine.submitted[0].grammar is None
    assert "get_weather" not in prompt_text(engine)


async def test_a_stop_sequence_ends_the_message_and_is_named(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(" Hello world! Say hello.")

    answer = await message(http, stop_sequences=["x", "Say"])

    assert answer["content"][0]["text"] == "Hello world! "
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "Say")


async def test_a_message_that_is_as_long_as_it_may_be_says_so(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = cut_script(" Hello wor")
    num_tokens = len(tiny_tokenizer().encode_continuation(" Hello wor"))

    answer = await message(http, max_tokens=num_tokens)

    assert engine.submitted[0].sampling.max_tokens == num_tokens
    assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", num_tokens)


async def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = cut_script(" Hello wor")

    answer = await message(http, max_tokens=100_000)

    assert engine.submitted[0].sampling.max_tokens == 2048 - len(engine.submitted[0].prompt_token_ids)
    assert answer["stop_reason"] == "model_context_window_exceeded"


async def test_a_tool_use_that_is_cut_short_has_what_there_is_of_its_input(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = cut_script(' <tool_call>{"name": "get_weather", "arguments": {"city": "Ro')

    answer = await message(http, tools=[WEATHER], max_tokens=20)

    assert answer["content"][0]["input"] == {"city": "Ro"}
    assert answer["stop_reason"] == "max_tokens"


async def test_zero_tokens_only_compute_the_prompt(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = counting_script

    answer = await message(http, max_tokens=0)

    assert engine.submitted[0].sampling.max_tokens == 0
    assert (answer["content"], answer["stop_reason"], answer["usage"]["output_tokens"]) == ([], "max_tokens", 0)


async def test_what_was_found_in_the_cache_is_told_apart(http: httpx.AsyncClient, engine: FakeEngineClient):
    script = engine.script
    engine.script = lambda request: [delta._replace(num_cached_tokens=16) for delta in script(request)]  # pyright: ignore

    usage = (await message(http))["usage"]

    assert usage["cache_read_input_tokens"] == 16
    assert usage["input_tokens"] == len(engine.submitted[0].prompt_token_ids) - 16


async def test_sampling_fields_reach_the_engine(http: httpx.AsyncClient, engine: FakeEngineClient):
    await message(http, temperature=0.5, top_p=0.9, top_k=7, seed=3)

    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)


async def test_the_user_id_is_the_tenant(http: httpx.AsyncClient, engine: FakeEngineClient):
    await message(http, metadata={"user_id": "ann"})
    await message(http, metadata={"user_id": "bob"})
    await message(http)

    assert len({request.tenant for request in engine.submitted}) == 3


async def test_ignored_fields_are_named(http: httpx.AsyncClient):
    response = await post(http, thinking={"type": "adaptive"}, output_config={"effort": "high"}, frobnicate=1)

    assert response.headers["x-ignored-fields"] == "frobnicate"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "Hello"},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}]}]},
        {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
        {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]}, *HELLO]},
        {"messages": [*HELLO, {"role": "assistant", "content": "x"}], "tools": [TIME], "tool_choice": {"type": "any"}},
        {"system": [{"type": "image"}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": "f"}]},
        {"tools": [TIME, TIME]},
        {"tools": [TIME], "tool_choice": {"type": "tool", "name": "other"}},
        {"tools": [TIME], "tool_choice": {"type": "tool"}},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": "auto"},
        {"max_tokens": -1},
        {"max_tokens": None},
        {"temperature": 1.1},
        {"stop_sequences": [""]},
        {"stop_sequences": ["x"] * 17},
        {"metadata": {"user_id": 5}},
        {"mcp_servers": [{"url": "x"}]},
        {"container": "c"},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "no such type"}}}},
        {"n": 2},
        {"return_token_ids": True},
        {"parse_special_tokens": True},
        {"stream": "yes"},
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused_in_anthropics_shape(http: httpx.AsyncClient, engine: FakeEngineClient, body: dict):
    error = await refusal(http, **body)

    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


async def test_the_form_of_the_text_goes_by_its_older_name_too(http: httpx.AsyncClient, engine: FakeEngineClient):
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {}}}

    await message(http, output_format=form)
    await message(http, output_config={"format": form})

    older, newer = (request.grammar for request in engine.submitted)
    assert older == newer is not None
    assert "send only one" in (await refusal(http, output_format=form, output_config={"format": form}))["message"]


@pytest.mark.parametrize("name", sorted(MessagesRequest.refused_fields))
async def test_what_would_change_the_meaning_is_refused_by_name(http: httpx.AsyncClient, name: str):
    assert (await refusal(http, **{name: "x"}))["message"].startswith(f"{name} is not supported: ")


async def test_too_many_stop_sequences_are_refused_by_anthropics_name_of_them(http: httpx.AsyncClient):
    await message(http, stop_sequences=["x"] * 16)

    assert "17 strings in stop_sequences" in (await refusal(http, stop_sequences=["x"] * 17))["message"]


@pytest.mark.parametrize("limits", [replace(Limits(), max_messages=3)])
async def test_as_many_messages_as_the_limit_are_taken_and_one_more_is_refused(http: httpx.AsyncClient):
    await message(http, messages=HELLO * 3)

    assert "4 messages, the limit is 3" in (await refusal(http, messages=HELLO * 4))["message"]
    counted = await http.post("/v1/messages/count_tokens", json={"messages": HELLO * 4})
    assert "4 messages" in error_of(counted)["message"]


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "kind"),
    [
        ("POST", "/v1/messages", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "invalid_request_error"),
        ("POST", "/v1/messages", {"json": {"messages": HELLO, "max_tokens": 1, "x": "y" * 2_000_000}}, 413, "request_too_large"),
        ("POST", "/v1/messages", {"json": {}, "headers": {"x": "y" * 40_000}}, 431, "request_too_large"),
        ("POST", "/v1/messages", {"json": {"messages": HELLO, "max_tokens": 1, "model": "claude"}}, 404, "not_found_error"),
        ("POST", "/v1/messages/count_tokens", {"json": {"messages": HELLO, "model": "claude"}}, 404, "not_found_error"),
        ("POST", "/v1/messages/batches", {"json": {}}, 404, "not_found_error"),
        ("GET", "/v1/messages", {}, 405, "invalid_request_error"),
        ("GET", "/v1//messages/", {}, 405, "invalid_request_error"),
    ],
)
async def test_every_refusal_on_the_path_has_anthropics_shape(
    http: httpx.AsyncClient, method: str, path: str, options: dict, status: int, kind: str
):
    response = await http.request(method, path, **options)

    assert response.status_code == status
    assert error_of(response)["type"] == kind


async def test_other_paths_keep_openais_shape(http: httpx.AsyncClient):
    assert set((await http.post("/v1/messagesx", json={})).json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (EngineDiedError("gone"), 500, "api_error"),
        (RuntimeError("a bug"), 500, "api_error"),
        (FinishReason.DEADLINE, 504, "timeout_error"),
        (FinishReason.GRAMMAR, 400, "invalid_request_error"),
    ],
    ids=repr,
)
async def test_failures_have_anthropics_shape(
    http: httpx.AsyncClient, engine: FakeEngineClient, failure: Exception | FinishReason, status: int, kind: str
):
    engine.script = lambda request: [
        failure if isinstance(failure, Exception) else TokenDelta(request_id=request.request_id, finish_reason=failure)
    ]

    assert (await refusal(http, status=status))["type"] == kind


async def test_a_server_that_is_not_ready_is_overloaded_and_says_when_to_come_back(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info = None

    response = await post(http)

    assert response.status_code == 503
    assert error_of(response)["type"] == "overloaded_error"
    assert response.headers["retry-after"]


@pytest.mark.parametrize("limits", [replace(Limits(), max_tenant_sequences=1)])
async def test_a_tenant_over_its_quota_is_rate_limited(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = lambda _: [HANG]
    first = asyncio.create_task(post(http, timeout=1))
    while not engine.num_open:
        await asyncio.sleep(0.001)

    response = await post(http)

    assert response.status_code == 429
    assert error_of(response)["type"] == "rate_limit_error"
    assert response.headers["retry-after"]
    assert (await first).status_code == 504


async def test_counting_tokens_counts_the_prompt_of_the_same_message(http: httpx.AsyncClient, engine: FakeEngineClient):
    body = {"system": "Be brief.", "messages": HELLO, "tools": [WEATHER], "tool_choice": {"type": "any"}, "model": "tiny"}
    engine.script = turn_script(f" {WEATHER_CALL}")

    counted = await http.post("/v1/messages/count_tokens", json=body)
    usage = (await message(http, **body))["usage"]

    assert counted.json() == {"input_tokens": usage["input_tokens"]}
    MessageTokensCount.model_validate(counted.json())
    assert counted.headers["request-id"]


async def test_counting_tokens_needs_no_engine_and_counts_what_would_not_fit(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info = None

    counted = await http.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": "a long story " * 5000}]})

    assert counted.json()["input_tokens"] > 15_000


async def test_counting_tokens_names_what_it_ignores(http: httpx.AsyncClient):
    counted = await http.post("/v1/messages/count_tokens", json={"messages": HELLO, "frobnicate": 1})

    assert counted.headers["x-ignored-fields"] == "frobnicate"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_without_a_tokenizer_the_endpoints_say_so(idless_app: FastAPI, path: str):
    transport = httpx.ASGITransport(idless_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        response = await http.post(path, json={"max_tokens": 5, "messages": HELLO})

    assert response.status_code == 400
    assert "without a tokenizer" in error_of(response)["message"]


def test_the_sdk_reads_a_message_and_its_request_id(sdk: anthropic.Anthropic):
    answer = sdk.messages.create(model="tiny", max_tokens=100, messages=HELLO)  # pyright: ignore[reportArgumentType]

    assert answer.content[0].type == "text"
    assert answer.content[0].text == "Hello world!"
    assert answer._request_id


def test_the_sdk_counts_tokens(sdk: anthropic.Anthropic):
    assert sdk.messages.count_tokens(model="tiny", messages=HELLO).input_tokens > 5  # pyright: ignore[reportArgumentType]


def test_the_sdk_parses_into_a_pydantic_model(sdk: anthropic.Anthropic, engine: FakeEngineClient):
    engine.script = turn_script('{"name": "Ann", "age": 7}')

    answer = sdk.messages.parse(model="tiny", max_tokens=100, messages=HELLO, output_format=Person)  # pyright: ignore[reportArgumentType]

    assert answer.parsed_output == Person(name="Ann", age=7)
    grammar = engine.submitted[0].grammar
    assert grammar is not None
    assert '"age"' in grammar


def test_a_tool_use_and_its_result_go_back_in_as_the_sdk_gives_them(sdk: anthropic.Anthropic, engine: FakeEngineClient):
    engine.script = turn_script(f" Let me see.\n{TIME_CALL}")
    options = {"model": "tiny", "max_tokens": 100, "tools": [TIME]}
    first = sdk.messages.create(messages=HELLO, **options)  # pyright: ignore
    use = first.content[1]
    assert use.type == "tool_use"

    result = {"type": "tool_result", "tool_use_id": use.id, "content": "noon"}
    messages = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    sdk.messages.create(messages=messages, **options)  # pyright: ignore

    assert prompt_text(engine).endswith(f"Let me see.\n{TIME_CALL}<|separator|>\n\nTool get_time: noon<|separator|>\n\nAssistant:")


def test_the_sdk_raises_typed_errors(sdk: anthropic.Anthropic, engine: FakeEngineClient):
    options = {"model": "tiny", "max_tokens": 5, "messages": HELLO}
    with pytest.raises(anthropic.BadRequestError) as refusal:
        sdk.messages.create(**options | {"messages": []})  # pyright: ignore
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.request_id

    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(**options | {"model": "claude"})  # pyright: ignore

    engine.info = None
    with pytest.raises(anthropic.InternalServerError) as too_early:
        sdk.messages.create(**options)  # pyright: ignore
    assert too_early.value.type == "overloaded_error"


def test_the_sdk_does_not_retry_what_a_retry_cannot_cure(live_url: str, engine: FakeEngineClient):
    engine.script = lambda _: [EngineDiedError("gone")]

    with anthropic.Anthropic(base_url=live_url, api_key="unused", max_retries=2) as sdk, pytest.raises(anthropic.InternalServerError):
        sdk.messages.create(model="tiny", max_tokens=5, messages=HELLO)  # pyright: ignore[reportArgumentType]

    assert len(engine.submitted) == 1


@pytest.mark.parametrize(
    "options", [{"api_key": "sk-ann-0123456789"}, {"api_key": "x", "default_headers": {"x-api-key": "sk-ann-0123456789"}}]
)
def test_the_sdks_key_is_taken_in_either_header_and_a_wrong_one_is_an_authentication_error(engine: FakeEngineClient, options: dict):
    keys = ApiKeys([ApiKey.of("sk-ann-0123456789")])
    app = create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", keys=keys)
    body = {"model": "tiny", "max_tokens": 5, "messages": HELLO}
    with serve_in_thread(app) as url:
        with anthropic.Anthropic(base_url=url, max_retries=0, **options) as sdk:
            assert sdk.messages.create(**body).content  # pyright: ignore
        stranger = anthropic.Anthropic(base_url=url, max_retries=0, api_key="wrong")
        with stranger, pytest.raises(anthropic.AuthenticationError) as refusal:
            stranger.messages.create(**body)  # pyright: ignore

    assert refusal.value.type == "authentication_error"


async def test_the_async_client_does_the_same(live_url: str):
    async with anthropic.AsyncAnthropic(base_url=live_url, api_key="unused", max_retries=0) as sdk:
        answer = await sdk.messages.create(model="tiny", max_tokens=100, messages=HELLO)  # pyright: ignore[reportArgumentType]

    assert json.loads(answer.to_json())["content"][0]["text"] == "Hello world!"
