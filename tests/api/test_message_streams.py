"""Streamed messages on a real port: Anthropic's events, their order and fields, failures, clients that leave."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import anthropic
import httpx
import pytest
from anthropic.types import (
    RawContentBlockDeltaEvent,
    RawContentBlockStartEvent,
    RawContentBlockStopEvent,
    RawMessageDeltaEvent,
    RawMessageStartEvent,
    RawMessageStopEvent,
)
from chat_scripts import TIME_CALL, WEATHER_CALL, cut_script, turn_script
from fake_engine import HANG, FakeEngineClient, engine_info
from fastapi import FastAPI
from pydantic import BaseModel

from engine.errors import EngineDiedError
from engine.types import TokenDelta

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [{"name": "get_weather", "input_schema": {"type": "object"}}, {"name": "get_time", "input_schema": {"type": "object"}}]
OPTIONS = {"model": "tiny", "max_tokens": 100, "messages": HELLO}
TYPES: dict[str, type[BaseModel]] = {
    "message_start": RawMessageStartEvent,
    "content_block_start": RawContentBlockStartEvent,
    "content_block_delta": RawContentBlockDeltaEvent,
    "content_block_stop": RawContentBlockStopEvent,
    "message_delta": RawMessageDeltaEvent,
    "message_stop": RawMessageStopEvent,
}


class Fact(BaseModel):
    city: str
    days: int


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(info=replace(engine_info(), max_model_len=2048), script=turn_script(" Hello world!"))


@pytest.fixture
def sdk(live_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live_url, api_key="unused", max_retries=0) as client:
        yield client


def events_of(text: str) -> list[dict]:
    """The events of a stream, each checked against the SDK's type of its name; comments are left out."""
    assert text.endswith("\n\n")
    events = []
    for frame in text[:-2].split("\n\n"):
        if frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] in TYPES:
            TYPES[event["type"]].model_validate(event)
        events.append(event)
    return events


def stream(url: str, **body: object) -> list[dict]:
    response = httpx.post(f"{url}/v1/messages", json=OPTIONS | {"stream": True} | body)
    assert response.status_code == 200, response.text
    assert response.headers["request-id"]
    return events_of(response.text)


def without_repeats(names: list[str]) -> list[str]:
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


def eventually(condition: Callable[[], bool], *, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_text_begins_grows_and_ends_in_anthropics_order(live_url: str, engine: FakeEngineClient):
    events = stream(live_url)

    assert without_repeats([event["type"] for event in events]) == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    started, block, ended = events[0]["message"], events[2], events[-2]
    assert (started["content"], started["stop_reason"], started["stop_sequence"]) == ([], None, None)
    assert block == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "", "citations": None}}
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"text_delta"}
    assert "".join(delta["text"] for delta in deltas) == "Hello world!"
    assert ended["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert ended["usage"]["input_tokens"] == started["usage"]["input_tokens"] == len(engine.submitted[0].prompt_token_ids)
    assert ended["usage"]["output_tokens"] > len(deltas)


def test_tool_uses_are_blocks_whose_json_grows(live_url: str, engine: FakeEngineClient):
    engine.script = turn_script(f" Let me see.\n{WEATHER_CALL}\n{TIME_CALL}")

    events = stream(live_url, tools=TOOLS)

    begun = [event for event in events if event["type"] == "content_block_start"]
    assert [event["index"] for event in begun] == [0, 1, 2]
    assert [event["content_block"].get("name") for event in begun] == [None, "get_weather", "get_time"]
    assert all(event["content_block"]["input"] == {} for event in begun[1:])
    for index, expected in ((1, {"city": "Rome", "days": 3}), (2, {})):
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta" and event["index"] == index]
        assert {delta["type"] for delta in deltas} == {"input_json_delta"}
        assert json.loads("".join(delta["partial_json"] for delta in deltas)) == expected
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_what_was_found_in_the_cache_is_told_at_the_end(live_url: str, engine: FakeEngineClient):
    script = engine.script
    engine.script = lambda request: [delta._replace(num_cached_tokens=16) for delta in script(request)]  # pyright: ignore

    usage = stream(live_url)[-2]["usage"]

    assert usage["cache_read_input_tokens"] == 16
    assert usage["input_tokens"] == len(engine.submitted[0].prompt_token_ids) - 16


def test_a_stop_sequence_is_named_at_the_end(live_url: str, engine: FakeEngineClient):
    engine.script = turn_script(" Hello world! Say hello.")

    assert stream(live_url, stop_sequences=["Say"])[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "Say"}


def test_a_stream_that_is_cut_for_its_length_says_so(live_url: str, engine: FakeEngineClient):
    engine.script = cut_script(" Hello wor")

    assert stream(live_url, max_tokens=2)[-2]["delta"]["stop_reason"] == "max_tokens"


def test_a_refusal_has_its_status_and_not_a_stream(live_url: str):
    response = httpx.post(f"{live_url}/v1/messages", json=OPTIONS | {"stream": True, "temperature": 2})

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_failure_in_mid_stream_is_one_error_event_and_the_end(live_url: str, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), 0.1, EngineDiedError("gone")]

    *_, before, error = stream(live_url)

    assert before["type"] == "content_block_delta"
    assert (error["type"], error["error"]["type"]) == ("error", "api_error")
    assert error["request_id"]


def test_the_sdk_raises_what_breaks_a_stream(sdk: anthropic.Anthropic, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), 0.1, EngineDiedError("gone")]

    with pytest.raises(anthropic.APIStatusError) as failure:
        list(sdk.messages.create(**OPTIONS, stream=True))  # pyright: ignore

    assert failure.value.type == "api_error"


def test_silence_is_filled_with_comments(live_url: str, engine: FakeEngineClient):
    engine.pause_s = 0.12

    text = httpx.post(f"{live_url}/v1/messages", json=OPTIONS | {"stream": True}, timeout=20).text

    assert ": ping" in text
    assert events_of(text)[-1]["type"] == "message_stop"


def test_a_client_that_leaves_in_mid_stream_frees_everything(live_url: str, engine: FakeEngineClient, app: FastAPI):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), HANG]

    with anthropic.Anthropic(base_url=live_url, api_key="unused") as sdk:
        events = sdk.messages.create(**OPTIONS, stream=True)  # pyright: ignore
        assert next(iter(events)).type == "message_start"
        assert engine.num_open == 1
        events.close()

    assert eventually(lambda: engine.num_open == 0 and app.state.services.admission.num_open == 0)
    assert len(engine.aborted) == 1


def test_the_sdk_streams_typed_events(sdk: anthropic.Anthropic):
    events = list(sdk.messages.create(**OPTIONS, stream=True))  # pyright: ignore

    assert all(isinstance(event, TYPES[event.type]) for event in events)


def test_the_sdks_stream_helper_builds_the_message(sdk: anthropic.Anthropic, engine: FakeEngineClient):
    engine.script = turn_script(f" Let me see.\n{WEATHER_CALL}")

    with sdk.messages.stream(**OPTIONS, tools=TOOLS) as events:  # pyright: ignore
        text = "".join(events.text_stream)
        final = events.get_final_message()

    assert text == "Let me see.\n"
    assert final.content[1].type == "tool_use"
    assert final.content[1].input == {"city": "Rome", "days": 3}
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens > 10
    assert events.request_id


def test_the_sdks_stream_helper_parses_into_a_pydantic_model(sdk: anthropic.Anthropic, engine: FakeEngineClient):
    engine.script = turn_script('{"city": "Rome", "days": 3}')

    with sdk.messages.stream(**OPTIONS, output_format=Fact) as events:  # pyright: ignore
        parsed = events.get_final_message().parsed_output

    assert parsed == Fact(city="Rome", days=3)


@pytest.mark.anyio
async def test_the_async_helper_does_the_same(live_url: str):
    sdk = anthropic.AsyncAnthropic(base_url=live_url, api_key="unused", max_retries=0)
    async with sdk, sdk.messages.stream(**OPTIONS) as events:  # pyright: ignore
        assert await events.get_final_text() == "Hello world!"
