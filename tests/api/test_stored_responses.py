"""What is kept of responses over HTTP: going on from one, reading, listing, deleting, and whose they are."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest
from chat_scripts import WEATHER_CALL, turn_script
from fake_engine import FakeEngineClient, engine_info, tiny_config
from live_server import serve_in_thread
from openai.types.responses import ResponseItemList
from tiny_tokenizer import tiny_tokenizer

from server.api_keys import ApiKey, ApiKeys
from server.app import create_app
from server.limits import Limits

pytestmark = pytest.mark.anyio

WEATHER = {"type": "function", "name": "get_weather"}


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(info=replace(engine_info(), max_model_len=2048), script=turn_script(" Hello world!"))


@pytest.fixture
def sdk(live_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live_url}/v1/", api_key="unused", max_retries=0) as client:
        yield client


async def respond(http: httpx.AsyncClient, **body: object) -> dict:
    response = await http.post("/v1/responses", json={"input": "Hello"} | body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_text(engine: FakeEngineClient) -> str:
    return tiny_tokenizer().decode(engine.submitted[-1].prompt_token_ids)


def test_a_response_goes_on_from_an_earlier_one_without_its_instructions(sdk: openai.OpenAI, engine: FakeEngineClient):
    first = sdk.responses.create(model="tiny", input="Hi", instructions="Be brief.")
    second = sdk.responses.create(model="tiny", input="Again", previous_response_id=first.id)
    third = sdk.responses.create(model="tiny", input="More", previous_response_id=second.id, instructions="Be long.")

    assert third.previous_response_id == second.id
    assert prompt_text(engine) == (
        "System: Be long.<|separator|>\n\nHuman: Hi<|separator|>\n\nAssistant: Hello world!<|separator|>\n\n"
        "Human: Again<|separator|>\n\nAssistant: Hello world!<|separator|>\n\nHuman: More<|separator|>\n\nAssistant:"
    )


def test_a_streamed_response_can_be_gone_on_from_at_once(sdk: openai.OpenAI, engine: FakeEngineClient):
    with sdk.responses.stream(model="tiny", input="Hi") as events:
        first = events.get_final_response()

    sdk.responses.create(model="tiny", input="Again", previous_response_id=first.id)

    assert "Human: Hi<|separator|>\n\nAssistant: Hello world!<|separator|>\n\nHuman: Again" in prompt_text(engine)


def test_the_result_of_a_call_goes_on_from_the_response_that_made_it(sdk: openai.OpenAI, engine: FakeEngineClient):
    engine.script = turn_script(f" {WEATHER_CALL}")
    first = sdk.responses.create(model="tiny", input="Weather?", tools=[WEATHER])  # pyright: ignore[reportArgumentType]
    (call,) = first.output
    assert call.type == "function_call"

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    sdk.responses.create(model="tiny", previous_response_id=first.id, input=[result])  # pyright: ignore[reportArgumentType]

    assert prompt_text(engine).endswith(f"Assistant: {WEATHER_CALL}<|separator|>\n\nTool get_weather: sunny<|separator|>\n\nAssistant:")


def test_an_earlier_response_can_be_gone_on_from_without_new_input(sdk: openai.OpenAI, engine: FakeEngineClient):
    first = sdk.responses.create(model="tiny", input="Hi")

    sdk.responses.create(model="tiny", previous_response_id=first.id)

    assert prompt_text(engine).endswith("Assistant: Hello world!<|separator|>\n\nAssistant:")


async def test_a_long_conversation_is_gone_on_from(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.info = replace(engine_info(), max_model_len=200_000, num_blocks=100_000)
    first = await respond(http, input="x" * 100_000)

    await respond(http, input="Again", previous_response_id=first["id"])

    assert prompt_text(engine).startswith(f"Human: {'x' * 100_000}<|separator|>\n\nAssistant: Hello world!<|separator|>")


def test_two_responses_may_go_on_from_the_same_one(sdk: openai.OpenAI, engine: FakeEngineClient):
    first = sdk.responses.create(model="tiny", input="Hi")
    sdk.responses.create(model="tiny", input="Left", previous_response_id=first.id)
    sdk.responses.create(model="tiny", input="Right", previous_response_id=first.id)

    assert "Left" not in prompt_text(engine)


def test_what_is_referred_to_stands_where_the_reference_is(sdk: openai.OpenAI, engine: FakeEngineClient):
    first = sdk.responses.create(model="tiny", input="Hi")
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "item_reference", "id": first.output[0].id},
        {"id": first.output[0].id},
        {"role": "user", "content": "Again"},
    ]

    sdk.responses.create(model="tiny", input=items)  # pyright: ignore[reportArgumentType]

    said = "Assistant: Hello world!<|separator|>\n\n"
    assert f"Human: Hi<|separator|>\n\n{said}{said}Human: Again" in prompt_text(engine)


def test_a_reference_to_nothing_is_not_found(sdk: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as refusal:
        sdk.responses.create(model="tiny", input=[{"type": "item_reference", "id": "msg_nothing"}])

    assert refusal.value.param == "input"


def test_an_unknown_previous_response_is_refused_in_openais_words(sdk: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.responses.create(model="tiny", input="Hi", previous_response_id="resp_nothing")

    assert (refusal.value.code, refusal.value.param) == ("previous_response_not_found", "previous_response_id")
    assert "Previous response with id 'resp_nothing' not found." in refusal.value.message


def test_a_response_is_read_as_it_was_answered(sdk: openai.OpenAI):
    answered = sdk.responses.create(model="tiny", input="Hi", metadata={"team": "red"})

    assert sdk.responses.retrieve(answered.id).to_dict() == answered.to_dict()


def test_a_streamed_response_is_read_as_its_last_event_told_it(sdk: openai.OpenAI):
    *_, last = sdk.responses.create(model="tiny", input="Hi", stream=True)
    assert last.type == "response.completed"

    assert sdk.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()


def test_a_deleted_response_is_gone_and_what_went_on_from_it_is_not(sdk: openai.OpenAI, engine: FakeEngineClient):
    first = sdk.responses.create(model="tiny", input="Hi")
    second = sdk.responses.create(model="tiny", input="Again", previous_response_id=first.id)

    sdk.responses.delete(first.id)

    for gone in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel, sdk.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="not found"):
            gone(first.id)
    sdk.responses.create(model="tiny", input="More", previous_response_id=second.id)
    assert prompt_text(engine).startswith("Human: Hi<|separator|>")


async def test_deleting_says_what_was_deleted(http: httpx.AsyncClient):
    response_id = (await respond(http))["id"]

    answer = await http.delete(f"/v1/responses/{response_id}")

    assert answer.json() == {"id": response_id, "object": "response", "deleted": True}


def test_a_response_that_is_not_to_be_stored_is_not(sdk: openai.OpenAI):
    answered = sdk.responses.create(model="tiny", input="Hi", store=False)

    assert answered.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(answered.id)


def test_a_response_that_is_over_cannot_be_cancelled(sdk: openai.OpenAI):
    answered = sdk.responses.create(model="tiny", input="Hi")

    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        sdk.responses.cancel(answered.id)


async def test_a_kept_response_is_not_streamed_again(http: httpx.AsyncClient):
    response_id = (await respond(http))["id"]

    answer = await http.get(f"/v1/responses/{response_id}?stream=true")

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")


def test_the_input_items_of_a_response_are_all_that_it_came_from(sdk: openai.OpenAI):
    first = sdk.responses.create(model="tiny", input="Hi", instructions="Be brief.")
    second = sdk.responses.create(model="tiny", input="Again", previous_response_id=first.id)

    items = list(sdk.responses.input_items.list(second.id))

    assert [(item.role, item.content[0].text) for item in reversed(items)] == [
        ("user", "Hi"),
        ("assistant", "Hello world!"),
        ("user", "Again"),
    ]
    assert items[1].id == first.output[0].id


async def test_input_items_come_in_pages_either_way(http: httpx.AsyncClient):
    sent = [{"role": "user", "content": f"{number}"} for number in range(5)]
    response_id = (await respond(http, input=sent))["id"]

    async def page(**query: object) -> tuple[str, dict]:
        answer = await http.get(f"/v1/responses/{response_id}/input_items", params=query)
        assert answer.status_code == 200, answer.text
        ResponseItemList.model_validate(answer.json())
        return "".join(item["content"][0]["text"] for item in answer.json()["data"]), answer.json()

    newest, first_page = await page(limit=2)
    older, second_page = await page(limit=3, after=first_page["last_id"])
    oldest, _ = await page(order="asc", limit=1)
    nothing, last_page = await page(after=second_page["last_id"])

    assert (newest, older, oldest, nothing) == ("43", "210", "0", "")
    assert (first_page["has_more"], second_page["has_more"], last_page["has_more"]) == (True, False, False)
    assert first_page["first_id"] == first_page["data"][0]["id"]


@pytest.mark.parametrize(
    ("query", "param"), [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after")]
)
async def test_a_wrong_query_is_refused_by_its_field(http: httpx.AsyncClient, query: str, param: str):
    response_id = (await respond(http))["id"]

    answer = await http.get(f"/v1/responses/{response_id}/input_items?{query}")

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("limits", [replace(Limits(), max_stored_responses=2)])
async def test_as_many_responses_as_the_limit_are_kept_and_one_more_drops_the_one_not_asked_for_the_longest(http: httpx.AsyncClient):
    first, second = [(await respond(http))["id"] for _ in range(2)]
    assert (await http.get(f"/v1/responses/{first}")).status_code == 200

    third = (await respond(http))["id"]

    found = [(await http.get(f"/v1/responses/{name}")).status_code for name in (first, second, third)]
    assert found == [200, 404, 200]


async def test_a_response_as_large_as_the_store_is_kept_and_a_byte_larger_is_not(engine: FakeEngineClient):
    async def is_kept(max_stored_bytes: int) -> tuple[bool, int]:
        limits = replace(Limits(), max_stored_bytes=max_stored_bytes)
        app = create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", limits=limits)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            answer = await respond(http)
            found = await http.get(f"/v1/responses/{answer['id']}")
            return found.status_code == 200, app.state.services.responses.num_bytes

    _, num_bytes = await is_kept(1_000_000)

    assert await is_kept(num_bytes) == (True, num_bytes)
    assert await is_kept(num_bytes - 1) == (False, 0)


def test_another_keys_responses_do_not_exist(engine: FakeEngineClient):
    keys = ApiKeys([ApiKey.of("sk-ann-0123456789"), ApiKey.of("sk-bob-0123456789")])
    app = create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", keys=keys)
    with serve_in_thread(app) as url:
        ann, bob = (openai.OpenAI(base_url=f"{url}/v1", api_key=f"sk-{name}-0123456789", max_retries=0) for name in ("ann", "bob"))
        with ann, bob:
            first = ann.responses.create(model="tiny", input="Hi", user="same")

            for ask in (bob.responses.retrieve, bob.responses.delete, bob.responses.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    ask(first.id)
            with pytest.raises(openai.BadRequestError) as refusal:
                bob.responses.create(model="tiny", input="Hi", previous_response_id=first.id, user="same")
            with pytest.raises(openai.NotFoundError):
                bob.responses.create(model="tiny", input=[{"type": "item_reference", "id": str(first.output[0].id)}])

            assert refusal.value.code == "previous_response_not_found"
            assert ann.responses.retrieve(first.id).id == first.id
