"""Streamed responses on a real port: the events, their order and their fields, failures, clients that leave."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import openai
import pytest
from chat_scripts import TIME_CALL, WEATHER_CALL, cut_script, turn_script
from fake_engine import HANG, FakeEngineClient, engine_info
from fastapi import FastAPI
from openai.types import responses as sdk_types
from pydantic import BaseModel

from engine.errors import EngineDiedError
from engine.types import FinishReason, GenerationRequest, TokenDelta

TOOLS = [{"type": "function", "name": "get_weather"}, {"type": "function", "name": "get_time"}]
TYPES: dict[str, type[BaseModel]] = {
    "response.created": sdk_types.ResponseCreatedEvent,
    "response.in_progress": sdk_types.ResponseInProgressEvent,
    "response.output_item.added": sdk_types.ResponseOutputItemAddedEvent,
    "response.content_part.added": sdk_types.ResponseContentPartAddedEvent,
    "response.output_text.delta": sdk_types.ResponseTextDeltaEvent,
    "response.output_text.done": sdk_types.ResponseTextDoneEvent,
    "response.content_part.done": sdk_types.ResponseContentPartDoneEvent,
    "response.function_call_arguments.delta": sdk_types.ResponseFunctionCallArgumentsDeltaEvent,
    "response.function_call_arguments.done": sdk_types.ResponseFunctionCallArgumentsDoneEvent,
    "response.output_item.done": sdk_types.ResponseOutputItemDoneEvent,
    "response.completed": sdk_types.ResponseCompletedEvent,
    "response.incomplete": sdk_types.ResponseIncompleteEvent,
    "response.failed": sdk_types.ResponseFailedEvent,
    "error": sdk_types.ResponseErrorEvent,
}


class Fact(BaseModel):
    city: str
    days: int


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(info=replace(engine_info(), max_model_len=2048), script=turn_script(" Hello world!"))


@pytest.fixture
def sdk(live_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live_url}/v1/", api_key="unused", max_retries=0) as client:
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
        TYPES[event["type"]].model_validate(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def stream(url: str, **body: object) -> list[dict]:
    response = httpx.post(f"{url}/v1/responses", json={"input": "Hello", "stream": True} | body)
    assert response.status_code == 200, response.text
    return events_of(response.text)


def without_repeats(names: list[str]) -> list[str]:
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


def eventually(condition: Callable[[], bool], *, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_text_begins_grows_and_ends_in_openais_order(live_url: str):
    events = stream(live_url)

    assert without_repeats([event["type"] for event in events]) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    created, added, part = events[0]["response"], events[2]["item"], events[3]["part"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert (added["status"], added["content"]) == ("in_progress", [])
    assert part == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == "Hello world!" == events[-4]["text"] == events[-3]["part"]["text"]
    assert len({event["item_id"] for event in events if "item_id" in event} | {events[-2]["item"]["id"]}) == 1
    assert all(event["logprobs"] == [] for event in events if event["type"].startswith("response.output_text"))


def test_the_last_event_is_the_whole_answer(live_url: str):
    body = {"seed": 1, "tools": TOOLS, "metadata": {"a": "b"}, "include": ["message.output_text.logprobs"]}
    whole = httpx.post(f"{live_url}/v1/responses", json={"input": "Hello"} | body).json()

    events = stream(live_url, **body)

    last = events[-1]["response"]
    for answer in (whole, last):
        for name in ("id", "created_at", "completed_at"):
            del answer[name]
        del answer["output"][0]["id"]
    assert last == whole


def test_calls_are_items_of_their_own_whose_arguments_grow(live_url: str, engine: FakeEngineClient):
    engine.script = turn_script(f" Let me see.\n{WEATHER_CALL}\n{TIME_CALL}")

    events = stream(live_url, tools=TOOLS)

    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["message", "function_call", "function_call"]
    assert done == events[-1]["response"]["output"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert [event["item"]["arguments"] for event in added[1:]] == ["", ""]
    assert [event["item"]["call_id"] for event in added[1:]] == [item["call_id"] for item in done[1:]]
    for index, item in enumerate(done[1:], start=1):
        of_call = [event for event in events if event.get("item_id") == item["id"]]
        assert all(event["output_index"] == index for event in of_call)
        assert "".join(event["delta"] for event in of_call[:-1]) == of_call[-1]["arguments"] == item["arguments"]
        assert len(of_call) > 2 if index == 1 else of_call[-1]["name"] == "get_time"


def test_logprobs_come_with_the_text_they_are_of(live_url: str, engine: FakeEngineClient):
    engine.script = turn_script(f" Hello world!\n{WEATHER_CALL}")

    events = stream(live_url, tools=TOOLS, include=["message.output_text.logprobs"], top_logprobs=1)

    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert [entry for event in deltas for entry in event["logprobs"]] == done["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in done["logprobs"]).decode().lstrip() == "Hello world!\n"


def test_a_stream_that_is_cut_for_its_length_ends_in_an_incomplete_response(live_url: str, engine: FakeEngineClient):
    engine.script = cut_script(" Hello wor")

    events = stream(live_url, max_output_tokens=20)

    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-2]["item"]["status"] == "incomplete"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello wor"


def test_a_refusal_has_its_status_and_not_a_stream(live_url: str):
    response = httpx.post(f"{live_url}/v1/responses", json={"input": "Hello", "stream": True, "temperature": 5})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


def test_a_failure_before_the_first_piece_has_its_status(live_url: str, engine: FakeEngineClient):
    engine.script = lambda _: [EngineDiedError("gone")]

    assert httpx.post(f"{live_url}/v1/responses", json={"input": "Hello", "stream": True}).status_code == 500


@pytest.mark.parametrize(
    ("failure", "code", "of_response"),
    [
        (EngineDiedError("gone"), "internal_error", "server_error"),
        (FinishReason.DEADLINE, "deadline_exceeded", "server_error"),
        (FinishReason.GRAMMAR, "grammar_limit", "invalid_prompt"),
    ],
)
def test_a_failure_in_mid_stream_is_an_error_and_a_failed_response(
    live_url: str, engine: FakeEngineClient, failure: Exception | FinishReason, code: str, of_response: str
):
    def script(request: GenerationRequest) -> list[TokenDelta | float | Exception]:
        last = failure if isinstance(failure, Exception) else TokenDelta(request_id=request.request_id, finish_reason=failure)
        return [TokenDelta(request_id=request.request_id, token_ids=(340,)), 0.1, last]

    engine.script = script

    *_, error, failed = stream(live_url)

    assert (error["type"], error["code"]) == ("error", code)
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": of_response, "message": error["message"]}


def test_a_failed_response_is_not_kept(live_url: str, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), 0.1, EngineDiedError("gone")]
    response_id = stream(live_url)[-1]["response"]["id"]

    assert httpx.get(f"{live_url}/v1/responses/{response_id}").status_code == 404


def test_silence_is_filled_with_comments(live_url: str, engine: FakeEngineClient):
    engine.pause_s = 0.12

    text = httpx.post(f"{live_url}/v1/responses", json={"input": "Hello", "stream": True}, timeout=20).text

    assert ": ping" in text
    assert events_of(text)[-1]["type"] == "response.completed"


def test_a_client_that_leaves_in_mid_stream_frees_everything_and_keeps_nothing(live_url: str, engine: FakeEngineClient, app: FastAPI):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), HANG]

    with openai.OpenAI(base_url=f"{live_url}/v1", api_key="unused") as sdk:
        events = sdk.responses.create(model="tiny", input="Hello", stream=True)
        assert next(events).type == "response.created"
        assert engine.num_open == 1
        events.close()

    assert eventually(lambda: engine.num_open == 0 and app.state.services.admission.num_open == 0)
    assert len(engine.aborted) == 1
    assert app.state.services.responses.num_responses == 0


def test_the_sdk_streams_typed_events(sdk: openai.OpenAI):
    events = list(sdk.responses.create(model="tiny", input="Hello", stream=True))

    assert all(isinstance(event, TYPES[event.type]) for event in events)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello world!"


def test_the_sdks_stream_helper_builds_the_response(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(f" Let me see.\n{WEATHER_CALL}\n{TIME_CALL}")

    with sdk.responses.stream(model="tiny", input="Weather?", tools=TOOLS) as events:  # pyright: ignore[reportArgumentType]
        snapshots = [event.snapshot for event in events if event.type == "response.function_call_arguments.delta"]
        final = events.get_final_response()

    assert snapshots[-1] == "{}"
    assert final.output_text == "Let me see.\n"
    assert [item.name for item in final.output if item.type == "function_call"] == ["get_weather", "get_time"]
    assert final.usage is not None
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens


def test_the_sdks_stream_helper_parses_into_a_pydantic_model(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script('{"city": "Rome", "days": 3}')

    with sdk.responses.stream(model="tiny", input="Weather?", text_format=Fact) as events:
        parsed = events.until_done().get_final_response().output_parsed

    assert parsed == Fact(city="Rome", days=3)


@pytest.mark.anyio
async def test_the_async_helper_does_the_same(live_url: str):
    sdk = openai.AsyncOpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=0)
    async with sdk, sdk.responses.stream(model="tiny", input="Hello") as events:
        final = await events.get_final_response()

    assert final.output_text == "Hello world!"
