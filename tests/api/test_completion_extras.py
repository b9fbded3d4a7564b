"""`POST /v1/completions`: the fields that vLLM added to OpenAI's, and those that are refused because ignoring them would mislead."""

import json
from dataclasses import replace

import httpx
import pytest
from fake_engine import VOCAB_SIZE, FakeEngineClient, fake_logprob, tiny_config, tokens_script
from fastapi import FastAPI
from tiny_tokenizer import tiny_tokenizer

from engine.types import FinishReason, TokenDelta
from server.app import create_app
from server.limits import Limits
from server.schemas.completions import CompletionRequest

pytestmark = pytest.mark.anyio

TOKENIZER = tiny_tokenizer()


async def complete(http: httpx.AsyncClient, **body: object) -> dict:
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(http: httpx.AsyncClient, **body: object) -> dict:
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


async def test_token_ids_come_with_each_choice_when_asked_for(http: httpx.AsyncClient):
    answer = await complete(http, prompt=[[5, 6], [7]], n=2, max_tokens=3, return_token_ids=True)

    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[5, 6], [5, 6], [7], [7]]
    assert all(len(choice["token_ids"]) == 3 for choice in answer["choices"])


async def test_token_ids_are_left_out_unless_asked_for(http: httpx.AsyncClient):
    (choice,) = (await complete(http, prompt=[5], max_tokens=1))["choices"]

    assert not {"token_ids", "prompt_token_ids", "prompt_logprobs"} & set(choice)


def test_streamed_token_ids_join_to_those_of_the_whole_answer_and_the_prompts_come_once(live_url: str):
    body = {"prompt": [5, 6], "max_tokens": 4, "n": 2, "seed": 1, "return_token_ids": True}
    whole = httpx.post(f"{live_url}/v1/completions", json=body).json()["choices"]

    text = httpx.post(f"{live_url}/v1/completions", json={**body, "stream": True}).text
    pieces = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]

    for index in (0, 1):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert [token for piece in mine for token in piece["token_ids"]] == whole[index]["token_ids"]
        assert [piece.get("prompt_token_ids") for piece in mine] == [[5, 6]] + [None] * (len(mine) - 1)


def test_token_ids_whose_text_is_held_back_are_streamed_all_the_same(engine: FakeEngineClient, live_url: str):
    held = TOKENIZER.encode_continuation(" sto")
    engine.script = tokens_script(*held, finish=FinishReason.LENGTH, pause_s=0.02)

    body = {"prompt": "x", "stream": True, "return_token_ids": True, "stop": [" stop"]}
    text = httpx.post(f"{live_url}/v1/completions", json=body).text
    pieces = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]

    assert [token for piece in pieces for token in piece["token_ids"]] == held
    assert "".join(piece["text"] for piece in pieces) == " sto"


async def test_a_prompt_is_cut_at_its_beginning(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt=[[5, 6, 7, 8], [9]], truncate_prompt_tokens=2, max_tokens=1)

    assert [request.prompt_token_ids for request in engine.submitted] == [(7, 8), (9,)]


async def test_a_prompt_that_is_too_long_may_be_cut_to_what_fits(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt=[5] * 400 + [6], truncate_prompt_tokens=-1, max_tokens=10)

    (request,) = engine.submitted
    assert request.prompt_token_ids == (5,) * 245 + (6,)


async def test_to_keep_nothing_of_the_prompt_is_refused(http: httpx.AsyncClient):
    assert (await refused(http, prompt=[5], truncate_prompt_tokens=0))["param"] == "truncate_prompt_tokens"
    assert (await refused(http, prompt=[5], truncate_prompt_tokens=-2))["param"] == "truncate_prompt_tokens"


async def test_allowed_tokens_reach_the_engine_once_each(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt=[5], allowed_token_ids=[9, 7, 9])

    assert engine.submitted[0].sampling.allowed_token_ids == (7, 9)


@pytest.mark.parametrize("ids", [[], [VOCAB_SIZE], [-1], ["5"], "5", [True]])
async def test_allowed_tokens_are_some_of_the_vocabulary(http: httpx.AsyncClient, ids: object):
    assert (await refused(http, prompt=[5], allowed_token_ids=ids))["param"] == "allowed_token_ids"


async def test_some_allowed_token_must_be_left_while_end_tokens_are_masked(http: httpx.AsyncClient):
    error = await refused(http, prompt=[5], allowed_token_ids=[2, 9], stop_token_ids=[9], min_tokens=1)

    assert error["param"] == "allowed_token_ids"


async def test_bad_words_reach_the_engine_as_they_are_written_inside_and_between_words(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt=[5], bad_words=["fox"])

    spellings = {tuple(TOKENIZER.encode("fox")), tuple(TOKENIZER.encode_continuation("fox"))}
    assert set(engine.submitted[0].sampling.bad_words) == spellings


@pytest.mark.parametrize("words", [["a", ""], "a", [5]])
async def test_bad_words_are_strings_with_something_in_them(http: httpx.AsyncClient, words: object):
    assert (await refused(http, prompt=[5], bad_words=words))["param"] == "bad_words"


async def test_bad_words_are_bounded_in_number_and_length(engine: FakeEngineClient):
    limits = replace(Limits(), max_bad_words=2, max_stop_chars=3)
    app = create_app(client=engine, tokenizer=TOKENIZER, model=tiny_config(), model_name="tiny", limits=limits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        await complete(http, prompt=[5], bad_words=["abc", "b"])
        assert "limit is 2" in (await refused(http, prompt=[5], bad_words=["a", "b", "c"]))["message"]
        assert "more than 3 characters" in (await refused(http, prompt=[5], bad_words=["abcd"]))["message"]


async def test_bad_words_need_a_tokenizer(idless_app: FastAPI):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(idless_app), base_url="http://test") as http:
        assert (await refused(http, prompt=[5], bad_words=["a"]))["param"] == "bad_words"


async def test_the_prompts_logprobs_come_by_id_with_rank_and_name(http: httpx.AsyncClient):
    answer = await complete(http, prompt=[5, 330], prompt_logprobs=2, max_tokens=1)

    (choice,) = answer["choices"]
    best = fake_logprob(330, top=2, vocab_size=VOCAB_SIZE)
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": TOKENIZER.token_name(token)}
            for rank, (token, logprob) in enumerate(best.top, start=1)
        },
    ]


async def test_a_prompt_token_that_is_not_among_the_likeliest_is_listed_without_a_rank(http: httpx.AsyncClient, engine: FakeEngineClient):
    entry = replace(fake_logprob(330, top=1, vocab_size=VOCAB_SIZE), token_id=400, logprob=float("-inf"))
    engine.script = lambda request: [
        TokenDelta(request_id=request.request_id, token_ids=(340,), prompt_logprobs=(entry,), finish_reason=FinishReason.LENGTH)
    ]

    (choice,) = (await complete(http, prompt=[5, 400], prompt_logprobs=1))["choices"]

    assert choice["prompt_logprobs"][1]["400"] == {"logprob": -9999.0, "rank": None, "decoded_token": TOKENIZER.token_name(400)}


async def test_echoed_and_separate_prompt_logprobs_each_have_the_number_asked_for(http: httpx.AsyncClient, engine: FakeEngineClient):
    (choice,) = (await complete(http, prompt=[5, 330], echo=True, logprobs=1, prompt_logprobs=3, max_tokens=0))["choices"]

    assert engine.submitted[0].sampling.prompt_logprobs == 3
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1]
    assert [len(place) for place in choice["prompt_logprobs"][1:]] == [3]


async def test_separate_prompt_logprobs_add_none_to_the_echo(http: httpx.AsyncClient):
    (choice,) = (await complete(http, prompt=[5, 330], echo=True, prompt_logprobs=1, max_tokens=1))["choices"]

    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] is not None


async def test_prompt_logprobs_are_bounded_and_not_streamed(http: httpx.AsyncClient):
    await complete(http, prompt=[5], prompt_logprobs=20, max_tokens=1)
    assert (await refused(http, prompt=[5], prompt_logprobs=21))["param"] == "prompt_logprobs"
    assert (await refused(http, prompt=[5], prompt_logprobs=1, stream=True))["param"] == "prompt_logprobs"


async def test_prompt_logprobs_count_against_the_size_of_the_answer(engine: FakeEngineClient):
    limits = replace(Limits(), max_answer_logprobs=20)
    app = create_app(client=engine, tokenizer=TOKENIZER, model=tiny_config(), model_name="tiny", limits=limits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        await complete(http, prompt=[5] * 10, prompt_logprobs=1, max_tokens=1)
        assert (await refused(http, prompt=[5] * 11, prompt_logprobs=1, max_tokens=1))["param"] == "prompt_logprobs"


@pytest.mark.parametrize("name", CompletionRequest.refused_fields)
async def test_a_field_that_would_change_the_meaning_is_refused_with_the_reason(http: httpx.AsyncClient, name: str):
    error = await refused(http, prompt=[5], **{name: 1.5})

    assert error["param"] == name
    assert CompletionRequest.refused_fields[name] in error["message"]


@pytest.mark.parametrize("nothing", [None, False, 0, []])
async def test_a_refused_field_that_says_nothing_is_let_pass(http: httpx.AsyncClient, nothing: object):
    await complete(http, prompt=[5], max_tokens=1, use_beam_search=nothing)


async def test_a_generation_whose_grammar_costs_too_much_is_the_clients_mistake(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = tokens_script(340, finish=FinishReason.GRAMMAR)

    assert (await refused(http, prompt=[5]))["code"] == "grammar_limit"
