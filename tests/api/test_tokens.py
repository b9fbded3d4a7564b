"""The tokenizer over HTTP: the ids that completions compute, their inverse, and what lm-eval's remote tokenizer reads."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fake_engine import VOCAB_SIZE, FakeEngineClient, engine_info, tiny_config
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import FIRST_BYTE_ID, byte_ids, tiny_tokenizer

from server.app import create_app
from server.limits import Limits
from server.preprocess import INLINE_CHARS

pytestmark = pytest.mark.anyio

TEXTS = [
    "",
    " ",
    "   three spaces",
    "Once upon a time",
    "two\n\nlines\r\n",
    "\ta\t\tb",
    "déjà vu 🎉 中文\u200d\u0301",
    "<|separator|> and <|control3|>",
    "[EOS] [BOS] [UNK] <0x41>",
    "a\u0000b\u2028c\ufeff",
]
HELLO = [{"role": "user", "content": "Hello"}]
SAID = {"role": "assistant", "content": "Well"}
TOOLS = [{"type": "function", "function": {"name": "now"}}]

# SentencePiece writes a space as U+2581 and cannot tell the two apart; half a surrogate pair is no text.
any_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",)))


async def tokenized(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def detokenized(http: httpx.AsyncClient, tokens: list[int]) -> str:
    response = await http.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 200, response.text
    return response.json()["prompt"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("flags", [{}, {"add_special_tokens": True}, {"add_special_tokens": False, "parse_special_tokens": True}])
async def test_the_ids_are_those_that_completions_compute(
    http: httpx.AsyncClient, engine: FakeEngineClient, text: str, flags: dict[str, bool]
):
    answer = await tokenized(http, prompt=text, **flags)
    await http.post("/v1/completions", json={"prompt": text, "max_tokens": 1, **flags})

    assert answer["tokens"] == list(engine.submitted[-1].prompt_token_ids)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert answer["token_strs"] is None


@pytest.mark.parametrize(
    ("conversation", "num_separators"),
    [
        ({"messages": HELLO}, 1),
        ({"messages": [{"role": "system", "content": "Be brief."}, *HELLO], "add_special_tokens": True}, 2),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Hi <|separator|>"}], "add_generation_prompt": False}, 2),
        ({"messages": [*HELLO, SAID], "add_generation_prompt": False, "continue_final_message": True}, 1),
        ({"messages": HELLO, "tools": TOOLS}, 2),
        ({"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}, 1),
    ],
)
async def test_the_ids_of_a_conversation_are_those_of_chat(
    http: httpx.AsyncClient, engine: FakeEngineClient, conversation: dict[str, Any], num_separators: int
):
    engine.info = engine_info(max_model_len=4096)  # room for tools

    answer = await tokenized(http, **conversation)
    response = await http.post("/v1/chat/completions", json=conversation | {"max_tokens": 1})

    assert response.status_code == 200, response.text
    assert answer["tokens"] == list(engine.submitted[-1].prompt_token_ids)
    separators = answer["tokens"].count(tiny_tokenizer().special_tokens["<|separator|>"])
    assert separators == num_separators


async def test_the_limit_of_messages_is_that_of_chat(engine: FakeEngineClient):
    limits = replace(Limits(), max_messages=2)
    app = create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", limits=limits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        statuses = [(await http.post("/tokenize", json={"messages": HELLO * count})).status_code for count in (2, 3)]

    assert statuses == [200, 400]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(text=any_text, add_special_tokens=st.booleans(), parse_special_tokens=st.booleans())
async def test_detokenizing_gives_back_every_text(http: httpx.AsyncClient, text: str, add_special_tokens: bool, parse_special_tokens: bool):
    answer = await tokenized(http, prompt=text, add_special_tokens=add_special_tokens, parse_special_tokens=parse_special_tokens)

    assert await detokenized(http, answer["tokens"]) == text


async def test_what_no_tokenizer_of_this_kind_can_give_back_is_as_in_completions(http: httpx.AsyncClient):
    response = await http.post("/tokenize", content=rb'{"prompt": "\ud83d"}', headers={"content-type": "application/json"})
    word_mark = await tokenized(http, prompt="a\u2581b")

    assert response.status_code in (200, 400)
    assert await detokenized(http, word_mark["tokens"]) == "a b"


async def test_pieces_of_bytes_join_to_characters_and_broken_ones_are_replaced(http: httpx.AsyncClient):
    assert await detokenized(http, byte_ids("é".encode())) == "é"
    assert await detokenized(http, [FIRST_BYTE_ID + 0xC3, FIRST_BYTE_ID + 0x41]) == "\ufffdA"


@pytest.mark.parametrize(("tokens", "text"), [([], ""), ([0], ""), ([1], ""), ([2], ""), ([3], "[UNK]"), ([47], "<|separator|>")])
async def test_control_tokens_have_no_text_and_markers_are_spelled_out(http: httpx.AsyncClient, tokens: list[int], text: str):
    assert await detokenized(http, tokens) == text


async def test_the_name_of_each_token_is_its_own(http: httpx.AsyncClient):
    answer = await tokenized(
        http, prompt="é the\n<|separator|>", parse_special_tokens=True, add_special_tokens=True, return_token_strs=True
    )

    assert answer["token_strs"][:4] == ["[BOS]", " ", "<0xC3>", "<0xA9>"]
    assert answer["token_strs"][-2:] == ["\n", "<|separator|>"]
    assert len(answer["token_strs"]) == answer["count"]


async def test_tokenizer_info_is_what_lm_eval_reads(http: httpx.AsyncClient):
    response = await http.get("/tokenizer_info")

    info = response.json()
    assert (info["eos_token"], info["pad_token"]) == ("[EOS]", "[PAD]")
    assert (info["bos_token_id"], info["eos_token_id"], info["pad_token_id"]) == (1, 2, 0)
    assert "<|separator|>" in info["additional_special_tokens"]
    assert "add_generation_prompt" in info["chat_template"]
    assert (info["vocab_size"], info["model_max_length"]) == (VOCAB_SIZE, 256)
    assert (await http.head("/tokenizer_info")).status_code == 200


async def test_the_start_token_that_lm_eval_asks_for_by_its_text_is_the_start_token(http: httpx.AsyncClient):
    info = (await http.get("/tokenizer_info")).json()

    answer = await tokenized(http, prompt=info["bos_token"], add_special_tokens=False)

    assert answer["tokens"][0] == info["bos_token_id"]


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": None}, "prompt"),
        ("tokenize", {"prompt": ["a"]}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"messages": "hello"}, "messages"),
        ("tokenize", {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ("tokenize", {"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        ("tokenize", {"messages": HELLO, "parse_special_tokens": True}, "parse_special_tokens"),
        ("tokenize", {"messages": HELLO, "chat_template": "{{ messages }}"}, "chat_template"),
        ("tokenize", {"prompt": [1]}, "prompt"),
        ("tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("tokenize", {"prompt": "a", "return_token_strs": "true"}, "return_token_strs"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": 5}, "tokens"),
        ("detokenize", {"tokens": "5"}, "tokens"),
        ("detokenize", {"tokens": [True]}, "tokens"),
        ("detokenize", {"tokens": [1.0]}, "tokens"),
        ("detokenize", {"tokens": [[1]]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("detokenize", {"tokens": [10**30]}, "tokens"),
    ],
)
async def test_what_is_no_text_and_no_token_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, route: str, body: dict[str, Any], param: str
):
    response = await http.post(f"/{route}", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("route", "body"), [("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [VOCAB_SIZE - 1]})])
async def test_another_model_is_not_found_and_unknown_fields_are_named(http: httpx.AsyncClient, route: str, body: dict[str, Any]):
    wrong = await http.post(f"/{route}", json=body | {"model": "gpt-4"})
    right = await http.post(f"/{route}", json=body | {"model": "tiny", "truncation": False})

    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
    assert right.status_code == 200
    assert right.headers["x-ignored-fields"] == "truncation"


async def test_ids_that_the_model_has_and_the_tokenizer_has_not_give_no_text():
    model = replace(tiny_config(), vocab_size=VOCAB_SIZE + 8)
    app = create_app(client=FakeEngineClient(), tokenizer=tiny_tokenizer(), model=model, model_name="tiny")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert await detokenized(http, [*tiny_tokenizer().encode("hello"), VOCAB_SIZE + 7]) == "hello"
        assert (await http.post("/detokenize", json={"tokens": [VOCAB_SIZE + 8]})).status_code == 400


async def test_they_answer_while_the_model_loads_and_while_the_server_drains(
    http: httpx.AsyncClient, app: FastAPI, engine: FakeEngineClient
):
    engine.is_ready, engine.info = False, None
    app.state.services.admission.drain()

    answer = await tokenized(http, prompt="hello")

    assert answer["max_model_len"] is None
    assert await detokenized(http, answer["tokens"]) == "hello"
    assert (await http.get("/tokenizer_info")).status_code == 200


@pytest.mark.parametrize(
    ("method", "route", "body"),
    [("POST", "tokenize", {"prompt": "a"}), ("POST", "detokenize", {"tokens": [5]}), ("GET", "tokenizer_info", None)],
)
async def test_without_a_tokenizer_they_say_so(idless_app: FastAPI, method: str, route: str, body: Any):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(idless_app), base_url="http://test") as http:
        response = await http.request(method, f"/{route}", json=body)

    assert response.status_code == 400
    assert "without a tokenizer" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"


async def test_the_limit_of_bodies_holds_at_the_cap_and_past_it(engine: FakeEngineClient):
    limits = replace(Limits(), max_body_bytes=1000)
    app = create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", limits=limits)
    around = len('{"prompt":""}')
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        statuses = [(await http.post("/tokenize", json={"prompt": "a" * (1000 - around + more)})).status_code for more in (0, 1)]

    assert statuses == [200, 413]


async def test_a_long_text_does_not_keep_others_waiting(http: httpx.AsyncClient):
    text = "The quick brown fox é " * 20_000
    long = asyncio.create_task(http.post("/tokenize", json={"prompt": text, "return_token_strs": True}))
    num_answered = 0
    while not long.done():
        assert (await http.post("/tokenize", json={"prompt": "short"})).status_code == 200
        num_answered += 1
        await asyncio.sleep(0.01)

    answer = (await long).json()
    assert len(text) > INLINE_CHARS
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert num_answered >= 5, "the short ones waited for the long one"


async def test_a_route_that_is_not_offered_is_a_404_that_names_those_that_are(http: httpx.AsyncClient):
    response = await http.post("/v1/embeddings", json={"model": "tiny", "input": "a"})

    assert response.status_code == 404
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "there is no route '/v1/embeddings'" in error["message"]
    for route in ("/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/tokenizer_info"):
        assert route in error["message"]
