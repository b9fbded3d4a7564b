"""`POST /v1/responses`, whole answers: what OpenAI's clients send, and each field that they read."""

import json
import time
from dataclasses import replace

import httpx
import openai
import pytest
from chat_scripts import TIME_CALL, WEATHER_CALL, cut_script, turn_script
from fake_engine import FakeEngineClient, engine_info
from fastapi import FastAPI
from openai.types.responses import Response
from pydantic import BaseModel
from tiny_tokenizer import tiny_tokenizer

from server.limits import Limits
from server.schemas.responses import ResponsesRequest

pytestmark = pytest.mark.anyio

WEATHER = {"type": "function", "name": "get_weather", "description": "The weather", "parameters": {"type": "object", "properties": {}}}
TIME = {"type": "function", "name": "get_time", "strict": True}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(info=replace(engine_info(), max_model_len=2048), script=turn_script(" Hello world!"))


@pytest.fixture
def sdk(live_url: str):
    with openai.OpenAI(base_url=f"{live_url}/v1/", api_key="unused", max_retries=0) as client:
        yield client


async def respond(http: httpx.AsyncClient, **body: object) -> dict:
    response = await http.post("/v1/responses", json={"input": "Hello"} | body)
    assert response.status_code == 200, response.text
    return response.json()


async def refusal(http: httpx.AsyncClient, *, status: int = 400, **body: object) -> dict:
    response = await http.post("/v1/responses", json={"input": "Hello"} | body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-should-retry"] == "false"
    return error


def prompt_text(engine: FakeEngineClient) -> str:
    return tiny_tokenizer().decode(engine.submitted[-1].prompt_token_ids)


async def test_a_response_has_every_field_of_the_sdks_type(http: httpx.AsyncClient, engine: FakeEngineClient):
    answer = await respond(http, model="tiny")

    Response.model_validate(answer)
    message = answer.pop("output")[0]
    assert message.pop("id").startswith("msg_")
    text = {"type": "output_text", "text": "Hello world!", "annotations": [], "logprobs": []}
    assert message == {"type": "message", "status": "completed", "role": "assistant", "content": [text]}
    assert answer.pop("id").startswith("resp_")
    assert abs(answer.pop("created_at") - time.time()) < 60
    assert abs(answer.pop("completed_at") - time.time()) < 60
    num_input = len(engine.submitted[0].prompt_token_ids)
    num_output = len(tiny_tokenizer().encode_continuation(" Hello world!")) + 1
    assert answer == {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "background": False,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": "tiny",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + num_output,
        },
        "user": None,
    }


async def test_what_was_asked_for_is_repeated(http: httpx.AsyncClient):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "metadata": {"team": "red"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "someone",
        "store": False,
        "temperature": 0.5,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True, "description": "d"}},
        "tool_choice": "none",
        "top_logprobs": 2,
        "top_p": 0.9,
        "truncation": "auto",
        "user": "u",
    }

    answer = await respond(http, **asked, tools=[WEATHER, TIME])

    Response.model_validate(answer)
    assert {name: answer[name] for name in asked} == asked
    assert answer["tools"] == [WEATHER | {"strict": False}, TIME | {"description": None, "parameters": None}]


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_time"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]},
    ],
    ids=str,
)
async def test_a_tool_choice_is_repeated_and_kept_to(http: httpx.AsyncClient, engine: FakeEngineClient, choice: str | dict):
    engine.script = turn_script(f" {TIME_CALL}")

    answer = await respond(http, tools=[WEATHER, TIME], tool_choice=choice)

    Response.model_validate(answer)
    assert answer["tool_choice"] == choice
    assert [tool["name"] for tool in answer["tools"]] == ["get_weather", "get_time"]
    grammar = engine.submitted[0].grammar
    assert grammar is not None
    assert ("get_weather" in grammar) == (choice == "required")


async def test_input_items_are_turns_of_groks_format(http: httpx.AsyncClient, engine: FakeEngineClient):
    await respond(
        http,
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Talk like a fox."},
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Who"}, {"type": "input_text", "text": "are you?"}],
            },
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "A fox."}],
            },
            {"role": "assistant", "content": "Let me look."},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "user", "content": "Well?"},
        ],
    )

    assert prompt_text(engine) == (
        "System: Be brief.<|separator|>\n\nSystem: Talk like a fox.<|separator|>\n\nHuman: Who\nare you?<|separator|>\n\n"
        "Assistant: A fox.<|separator|>\n\n"
        'Assistant: Let me look.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>\n'
        '<tool_call>{"name": "get_time", "arguments": {}}</tool_call><|separator|>\n\n'
        "Tool get_weather: sunny<|separator|>\n\nTool get_time: noon<|separator|>\n\nHuman: Well?<|separator|>\n\nAssistant:"
    )


async def test_very_many_parts_are_one_turn(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info = replace(engine_info(), max_model_len=100_000, num_blocks=100_000)
    parts = [{"type": "input_text", "text": "x"}] * 10_000

    await respond(http, input=[{"role": "user", "content": parts}], max_output_tokens=5)

    assert prompt_text(engine).count("x\n") == 9_999


async def test_text_and_calls_are_items_in_the_order_they_came(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(f" Let me see.\n{WEATHER_CALL}\n{TIME_CALL}")

    answer = await respond(http, tools=[WEATHER, TIME])

    Response.model_validate(answer)
    text, weather, clock = answer["output"]
    assert text["content"][0]["text"] == "Let me see.\n"
    assert (weather["type"], weather["name"], weather["status"]) == ("function_call", "get_weather", "completed")
    assert json.loads(weather["arguments"]) == {"city": "Rome", "days": 3}
    assert (clock["name"], clock["arguments"]) == ("get_time", "{}")
    ids = [item["id"] for item in answer["output"]] + [weather["call_id"], clock["call_id"]]
    assert len(set(ids)) == 5
    assert weather["id"].startswith("fc_")
    assert weather["call_id"].startswith("call_")


async def test_a_response_that_is_only_a_call_has_no_message(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(f" {WEATHER_CALL}")

    answer = await respond(http, tools=[WEATHER])

    assert [item["type"] for item in answer["output"]] == ["function_call"]
    assert answer["status"] == "completed"


async def test_without_tools_what_looks_like_a_call_is_text(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(f" {WEATHER_CALL}")

    (message,) = (await respond(http))["output"]

    assert message["content"][0]["text"] == WEATHER_CALL


async def test_a_generation_that_says_nothing_is_one_empty_message(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script("")

    (message,) = (await respond(http))["output"]

    assert message["content"][0]["text"] == ""
    assert message["status"] == "completed"


async def test_a_response_cut_for_its_length_is_incomplete_and_so_is_its_last_item(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = cut_script(' Let me see.<tool_call>{"name": "get_weather", "arguments": {"city": "Ro')

    answer = await respond(http, tools=[WEATHER], max_output_tokens=30)

    Response.model_validate(answer)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["completed_at"] is None
    assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]
    assert answer["output"][1]["arguments"] == '{"city": "Ro'


async def test_max_output_tokens_reaches_the_engine_and_without_it_all_the_room_there_is(http: httpx.AsyncClient, engine: FakeEngineClient):
    await respond(http, max_output_tokens=7)
    await respond(http)

    first, second = engine.submitted
    assert first.sampling.max_tokens == 7
    assert second.sampling.max_tokens == 2048 - len(second.prompt_token_ids)


async def test_a_call_that_a_stop_string_cuts_off_is_incomplete(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(WEATHER_CALL)

    (call,) = (await respond(http, tools=[WEATHER], stop=["}"]))["output"]

    assert (call["status"], call["arguments"]) == ("incomplete", '{"city": "Rome", "days": 3')


async def test_logprobs_come_with_the_text_where_they_are_included(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = turn_script(f" Hello world!\n{WEATHER_CALL}")

    answer = await respond(http, tools=[WEATHER], include=["message.output_text.logprobs"], top_logprobs=2)

    Response.model_validate(answer)
    (part,) = answer["output"][0]["content"]
    assert part["text"] == "Hello world!\n"
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode().lstrip() == "Hello world!\n"
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    assert part["logprobs"][1]["logprob"] == part["logprobs"][1]["top_logprobs"][0]["logprob"] < 0


async def test_logprobs_that_are_not_included_are_not_computed(http: httpx.AsyncClient, engine: FakeEngineClient):
    answer = await respond(http, top_logprobs=2)

    assert answer["output"][0]["content"][0]["logprobs"] == []
    assert engine.submitted[0].sampling.logprobs is None


@pytest.mark.parametrize(
    "text_format", [{"type": "json_object"}, {"type": "json_schema", "name": "a", "schema": {"type": "object"}}], ids=str
)
async def test_a_text_format_is_a_grammar_for_the_engine(http: httpx.AsyncClient, engine: FakeEngineClient, text_format: dict):
    await respond(http, text={"format": text_format, "verbosity": "low"})

    assert engine.submitted[0].grammar is not None


async def test_a_schema_that_does_not_compile_is_refused_by_its_field(http: httpx.AsyncClient):
    text_format = {"type": "json_schema", "name": "a", "schema": {"type": "no such type"}}

    error = await refusal(http, text={"format": text_format})

    assert error["param"] == "text"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input"),
        ({"input": [{"type": "web_search_call", "id": "ws"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input"),
        ({"input": [{}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "tools": [WEATHER]}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["everything"]}, "include"),
        ({"truncation": "some"}, "truncation"),
        ({"n": 2}, "n"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"parse_special_tokens": True}, "parse_special_tokens"),
        ({"store": "yes"}, "store"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"temperature": 2.1}, "temperature"),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused_by_its_field(http: httpx.AsyncClient, engine: FakeEngineClient, body: dict, param: str):
    error = await refusal(http, **body)

    assert error["param"] == param
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("at_the_cap", "past_it"),
    [
        ({str(number): "v" for number in range(16)}, {str(number): "v" for number in range(17)}),
        ({"k" * 64: "v"}, {"k" * 65: "v"}),
        ({"k": "v" * 512}, {"k": "v" * 513}),
    ],
    ids=["pairs", "key", "value"],
)
async def test_metadata_is_bounded_as_openai_bounds_it(http: httpx.AsyncClient, at_the_cap: dict, past_it: dict):
    assert (await respond(http, metadata=at_the_cap))["metadata"] == at_the_cap

    assert (await refusal(http, metadata=past_it))["param"] == "metadata"


@pytest.mark.parametrize("name", sorted(ResponsesRequest.refused_fields))
async def test_what_would_change_the_meaning_is_refused_by_name(http: httpx.AsyncClient, name: str):
    error = await refusal(http, **{name: "x"})

    assert error["param"] == name
    assert error["message"].startswith(f"{name} is not supported: ")


@pytest.mark.parametrize("limits", [replace(Limits(), max_messages=3)])
async def test_as_many_items_as_the_limit_are_taken_and_one_more_is_refused_earlier_ones_included(http: httpx.AsyncClient):
    first = await respond(http, input=[{"role": "user", "content": "x"}] * 3)

    error = await refusal(http, input=[{"role": "user", "content": "x"}] * 4)
    assert "4 items in the conversation, the limit is 3" in error["message"]
    assert "5 items" in (await refusal(http, input="more", previous_response_id=first["id"]))["message"]


async def test_ignored_fields_are_named_and_accepted_ones_are_not(http: httpx.AsyncClient):
    body = {"input": "Hello", "reasoning": {"effort": "high"}, "max_tool_calls": 3, "prompt_cache_retention": "24h", "frobnicate": 1}

    response = await http.post("/v1/responses", json=body)

    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "frobnicate"


async def test_too_long_an_input_is_refused_unless_the_oldest_items_may_go(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info = replace(engine_info(), max_model_len=256)
    items = [{"role": "user", "content": f"item {number} " + "of a long story " * 3} for number in range(10)]
    body = {"input": items, "instructions": "Be brief."}

    refused = await refusal(http, **body)
    answer = await respond(http, **body, truncation="auto")

    assert refused["code"] == "context_length_exceeded"
    prompt = prompt_text(engine)
    assert prompt.startswith("System: Be brief.<|separator|>\n\nHuman: item ")
    assert "item 9" in prompt
    assert "item 0" not in prompt
    num_left = 256 - answer["usage"]["input_tokens"]
    assert num_left >= 256 // 8
    one_more = len(tiny_tokenizer().encode("Human: item 1 " + "of a long story " * 3)) + 5
    assert num_left < 256 // 8 + one_more, "one more item would have fitted"


async def test_too_many_output_tokens_are_refused_by_their_field(http: httpx.AsyncClient):
    error = await refusal(http, max_output_tokens=5000)

    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_output_tokens")
    assert "lower max_output_tokens" in error["message"]


async def test_truncation_never_leaves_a_result_without_its_call(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info = replace(engine_info(), max_model_len=256)
    long = "a long story " * 20
    items = [
        {"role": "user", "content": long},
        {"type": "function_call", "call_id": "c", "name": "get_time", "arguments": json.dumps({"why": long})},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
        {"role": "user", "content": "And now?"},
    ]

    await respond(http, input=items, truncation="auto")

    assert prompt_text(engine) == "Human: And now?<|separator|>\n\nAssistant:"


async def test_an_item_that_does_not_fit_alone_is_refused_though_others_may_go(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info = replace(engine_info(), max_model_len=256)

    error = await refusal(http, input="a long story " * 100, truncation="auto")

    assert error["code"] == "context_length_exceeded"


async def test_without_a_tokenizer_the_endpoint_says_what_to_use(idless_app: FastAPI):
    transport = httpx.ASGITransport(idless_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        error = await refusal(http)

    assert "/v1/completions" in error["message"]


async def test_the_user_is_the_tenant_and_so_is_who_is_identified_for_safety(http: httpx.AsyncClient, engine: FakeEngineClient):
    await respond(http, user="ann")
    await respond(http, safety_identifier="ann")
    await respond(http)

    first, second, third = (request.tenant for request in engine.submitted)
    assert first == second != third


def test_the_sdk_parses_into_a_pydantic_model(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script('{"name": "Ann", "age": 7}')

    answer = sdk.responses.parse(model="tiny", input="Who?", text_format=Person)

    assert answer.output_parsed == Person(name="Ann", age=7)
    grammar = engine.submitted[0].grammar
    assert grammar is not None
    assert '"age"' in grammar


def test_the_sdk_parses_the_arguments_of_a_tool_that_is_a_pydantic_model(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(' <tool_call>{"name": "Person", "arguments": {"name": "Ann", "age": 7}}</tool_call>')

    answer = sdk.responses.parse(
        model="tiny", input="Who?", tools=[openai.pydantic_function_tool(Person)["function"] | {"type": "function"}]
    )

    (call,) = answer.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"name": "Ann", "age": 7}


def test_the_sdk_raises_typed_errors(sdk: openai.OpenAI, engine: FakeEngineClient):
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.responses.create(model="tiny", input="Hello", temperature=3)
    assert (refusal.value.param, refusal.value.code) == ("temperature", None)

    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.responses.create(model="gpt", input="Hello")
    assert unknown.value.code == "model_not_found"

    engine.info = None
    with pytest.raises(openai.InternalServerError) as too_early:
        sdk.responses.create(model="tiny", input="Hello")
    assert too_early.value.code == "model_loading"


def test_output_goes_back_in_as_the_sdk_gives_it(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(f" {WEATHER_CALL}")
    first = sdk.responses.create(model="tiny", input="Weather?", tools=[WEATHER])  # pyright: ignore[reportArgumentType]
    (call,) = first.output
    assert call.type == "function_call"

    items = [
        {"role": "user", "content": "Weather?"},
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    sdk.responses.create(model="tiny", input=items)  # pyright: ignore[reportArgumentType]

    assert prompt_text(engine).endswith(f"Assistant: {WEATHER_CALL}<|separator|>\n\nTool get_weather: sunny<|separator|>\n\nAssistant:")


@pytest.mark.anyio
async def test_the_async_client_does_the_same(live_url: str):
    async with openai.AsyncOpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=0) as sdk:
        answer = await sdk.responses.create(model="tiny", input="Hello")

    assert answer.output_text == "Hello world!"
