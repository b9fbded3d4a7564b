"""`POST /v1/completions`, whole answers: each detail of OpenAI's legacy endpoint that clients rely on."""

import asyncio
import json
import math
import time
from collections.abc import Callable

import httpx
import pytest
from fake_engine import VOCAB_SIZE, FakeEngineClient, counting_script, fake_logprob, tokens_script
from fastapi import FastAPI
from tiny_tokenizer import tiny_tokenizer

from engine.errors import EngineDiedError
from engine.types import FinishReason, GenerationRequest, TokenDelta, TokenLogprob
from server.schemas.completions import CompletionRequest

pytestmark = pytest.mark.anyio


async def complete(http: httpx.AsyncClient, **body: object) -> dict:
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def cached_script(num_cached: Callable[[GenerationRequest], int]):
    """The usual tokens, by an engine that found so many of the prompt's in its cache."""

    def script(request: GenerationRequest) -> list[TokenDelta]:
        return [delta._replace(num_cached_tokens=num_cached(request)) for delta in counting_script(request)]

    return script


def text_script(text: str):
    return tokens_script(*tiny_tokenizer().encode_continuation(text))


async def test_an_answer_has_exactly_the_fields_openai_documents(http: httpx.AsyncClient):
    answer = await complete(http, model="tiny", prompt="Hello", max_tokens=3)

    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert isinstance(answer["created"], int)
    assert abs(answer["created"] - time.time()) < 60
    assert answer["model"] == "tiny"
    assert isinstance(answer["system_fingerprint"], str)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": choice["text"], "logprobs": None, "finish_reason": "length", "stop_reason": None}
    num_prompt = len(tiny_tokenizer().encode("Hello"))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 3,
        "total_tokens": num_prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_sixteen_tokens_are_made_when_nobody_says_how_many(http: httpx.AsyncClient):
    assert (await complete(http, prompt=[1, 2]))["usage"]["completion_tokens"] == 16


async def test_the_default_length_shrinks_to_the_room_the_prompt_leaves(http: httpx.AsyncClient):
    answer = await complete(http, prompt=[5] * 251)

    assert answer["usage"]["completion_tokens"] == 5


async def test_null_means_the_default_for_every_field(http: httpx.AsyncClient, engine: FakeEngineClient):
    fields = [name for name in CompletionRequest.model_fields if name not in ("metadata", "store", "service_tier")]

    answer = await complete(http, **dict.fromkeys(fields))

    (request,) = engine.submitted
    assert request.prompt_token_ids == (1,)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.max_tokens) == (1.0, 1.0, 16)
    assert answer["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("prompt", ["", None, [""]])
async def test_an_empty_prompt_is_the_document_start(http: httpx.AsyncClient, engine: FakeEngineClient, prompt: object):
    await complete(http, prompt=prompt, max_tokens=1)

    assert engine.submitted[0].prompt_token_ids == (1,)


async def test_a_text_prompt_gets_no_start_token_unless_asked_for(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt="Hello", max_tokens=1)
    await complete(http, prompt="Hello", max_tokens=1, add_special_tokens=True)

    plain, started = (request.prompt_token_ids for request in engine.submitted)
    assert plain == tuple(tiny_tokenizer().encode("Hello"))
    assert started == (1, *plain)


async def test_the_four_forms_of_a_prompt_reach_the_engine_as_ids(http: httpx.AsyncClient, engine: FakeEngineClient):
    ids = tiny_tokenizer().encode("Hello")
    for prompt in ("Hello", ["Hello"], ids, [ids]):
        await complete(http, prompt=prompt, max_tokens=1)

    assert {request.prompt_token_ids for request in engine.submitted} == {tuple(ids)}


async def test_special_tokens_in_text_stay_text_unless_asked_for(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt="a<|separator|>", max_tokens=1)
    await complete(http, prompt="a<|separator|>", max_tokens=1, parse_special_tokens=True)

    assert [47 in request.prompt_token_ids for request in engine.submitted] == [False, True]


async def test_every_sampling_field_reaches_the_engine(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(
        http,
        prompt=[7],
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=-(2**63),
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3, 47],
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "6": 1.5},
    )

    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (0.5, 0.9, 40, 0.05, -(2**63))
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (9, 2, True, (3, 47))
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-2, 2, 1.1)
    assert sampling.logit_bias == {5: -100.0, 6: 1.5}


async def test_all_top_k_and_zero_top_p_are_put_in_the_engines_words(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt=[7], top_k=-1, max_tokens=1)
    await complete(http, prompt=[7], top_p=0, max_tokens=1)

    everything, likeliest = (request.sampling for request in engine.submitted)
    assert everything.top_k == 0
    assert (likeliest.top_k, likeliest.top_p) == (1, 1.0)


async def test_choices_are_numbered_prompt_by_prompt(http: httpx.AsyncClient, engine: FakeEngineClient):
    answer = await complete(http, prompt=[[7], [8, 9], [10]], n=2, max_tokens=1, seed=5)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    asked = [(request.prompt_token_ids, request.choice) for request in engine.submitted]
    assert asked == [((7,), 0), ((7,), 1), ((8, 9), 0), ((8, 9), 1), ((10,), 0), ((10,), 1)]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 6


async def test_choices_share_a_seed_and_prompts_without_one_do_not(http: httpx.AsyncClient, engine: FakeEngineClient):
    await complete(http, prompt=[[7], [7]], n=2, max_tokens=1)

    first, second, third, fourth = (request.sampling.seed for request in engine.submitted)
    assert first == second
    assert third == fourth
    assert first != third


async def test_best_of_answers_with_the_choices_of_highest_mean_logprob(http: httpx.AsyncClient, engine: FakeEngineClient):
    def script(request: GenerationRequest) -> list[TokenDelta]:
        logprob = (-3.0, -1.0, -2.0)[request.choice]
        entry = TokenLogprob(token_id=330 + request.choice, logprob=logprob)
        delta = TokenDelta(
            request_id=request.request_id, token_ids=(330 + request.choice,), logprobs=(entry,), finish_reason=FinishReason.STOP
        )
        return [delta]

    engine.script = script

    answer = await complete(http, prompt=[7], n=2, best_of=3, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)

    names = [choice["logprobs"]["tokens"] for choice in answer["choices"]]
    assert names == [["token_id:331"], ["token_id:332"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 3


async def test_best_of_shows_no_logprobs_that_were_not_asked_for(http: httpx.AsyncClient, engine: FakeEngineClient):
    answer = await complete(http, prompt=[7], best_of=3, max_tokens=2)

    assert [request.sampling.logprobs for request in engine.submitted] == [0, 0, 0]
    assert answer["choices"][0]["logprobs"] is None


async def test_logprobs_are_four_parallel_lists(http: httpx.AsyncClient):
    answer = await complete(http, prompt="Hello", max_tokens=4, logprobs=3)

    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {4}
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    assert logprobs["token_logprobs"] == [max(top.values()) for top in logprobs["top_logprobs"]]
    assert logprobs["text_offset"][0] == 0


async def test_zero_logprobs_name_the_chosen_token_alone(http: httpx.AsyncClient):
    answer = await complete(http, prompt="Hello", max_tokens=1, logprobs=0)

    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{logprobs["tokens"][0]: logprobs["token_logprobs"][0]}]


async def test_a_chosen_token_outside_the_top_is_listed_beside_it(http: httpx.AsyncClient, engine: FakeEngineClient):
    def script(request: GenerationRequest) -> list[TokenDelta]:
        entry = TokenLogprob(token_id=331, logprob=-7.0, top=((340, -0.1), (341, -math.inf)))
        return [TokenDelta(request_id=request.request_id, token_ids=(331,), logprobs=(entry,), finish_reason=FinishReason.STOP)]

    engine.script = script

    answer = await complete(http, prompt=[7], max_tokens=1, logprobs=2)

    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert list(top.values()) == [-0.1, -9999.0, -7.0]


async def test_echo_with_logprobs_covers_prompt_and_completion(http: httpx.AsyncClient):
    ids = tiny_tokenizer().encode("Once upon")

    answer = await complete(http, prompt=ids, max_tokens=2, logprobs=1, echo=True)

    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {len(ids) + 2}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][0] == 0
    assert choice["text"].startswith("Once upon")
    expected = [fake_logprob(token, top=1, vocab_size=VOCAB_SIZE).logprob for token in ids[1:]]
    assert logprobs["token_logprobs"][1 : len(ids)] == expected


async def test_what_lm_eval_asks_for_scores_each_context_by_index(http: httpx.AsyncClient):
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]

    answer = await complete(http, model="tiny", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)

    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for prompt, choice in zip(prompts, choices, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + 1
        continuation = logprobs["token_logprobs"][1:-1]
        tops = logprobs["top_logprobs"][1:-1]
        assert [max(top.values()) for top in tops] == continuation


async def test_zero_max_tokens_score_the_prompt_and_end_there(http: httpx.AsyncClient):
    answer = await complete(http, prompt=[5, 6, 7], max_tokens=0, logprobs=10, echo=True)

    (choice,) = answer["choices"]
    assert len(choice["logprobs"]["tokens"]) == 3
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


async def test_a_stop_string_ends_the_text_before_it_and_the_work_in_the_engine(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = text_script(" Stop here. Do not stop there.")

    answer = await complete(http, prompt="Hello", stop=[" Do", "zzz"], max_tokens=50)

    (choice,) = answer["choices"]
    assert choice["text"] == " Stop here."
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " Do")
    assert engine.aborted == [engine.submitted[0].request_id]


async def test_a_stop_string_may_stay_in_the_text(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = text_script(" Stop here. Do not stop there.")

    answer = await complete(http, prompt="Hello", stop=" Do", include_stop_str_in_output=True)

    assert answer["choices"][0]["text"] == " Stop here. Do"


async def test_tokens_can_be_named_by_their_ids(http: httpx.AsyncClient):
    answer = await complete(http, prompt=[7], max_tokens=2, logprobs=1, return_tokens_as_token_ids=True)

    logprobs = answer["choices"][0]["logprobs"]
    assert all(name.startswith("token_id:") for name in logprobs["tokens"])
    assert all(name.startswith("token_id:") for top in logprobs["top_logprobs"] for name in top)


async def test_cached_tokens_are_reported_once_per_prompt(http: httpx.AsyncClient, engine: FakeEngineClient):
    def script(request: GenerationRequest) -> list[TokenDelta]:
        return [TokenDelta(request_id=request.request_id, token_ids=(340,), finish_reason=FinishReason.STOP, num_cached_tokens=16)]

    engine.script = script

    answer = await complete(http, prompt=[[7] * 20, [8] * 20], n=2, max_tokens=1)

    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


@pytest.mark.parametrize("fields", [{"n": 3}, {"best_of": 3}])
async def test_what_one_candidate_computes_for_the_next_does_not_count_as_cached(
    http: httpx.AsyncClient, engine: FakeEngineClient, fields: dict
):
    engine.script = cached_script(lambda request: 32 if request.choice else 16)

    answer = await complete(http, prompt=[[7] * 40, [7] * 40], max_tokens=2, **fields)

    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    assert answer["usage"]["prompt_tokens"] == 80


async def test_cached_tokens_are_those_of_the_first_run_also_where_an_engine_without_a_cache_went_on(
    http: httpx.AsyncClient, engine: FakeEngineClient
):
    def script(request: GenerationRequest) -> list[TokenDelta]:
        first, *others = cached_script(lambda _: 16)(request)
        return [first, *(delta._replace(num_cached_tokens=0) for delta in others)]

    engine.script = script

    answer = await complete(http, prompt=[7] * 20, max_tokens=3)

    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_unknown_fields_are_ignored_and_named_in_a_header(http: httpx.AsyncClient):
    names = ["frobnicate", "with\r\nbreak", "x" * 500]

    response = await http.post("/v1/completions", json={"prompt": [7], "max_tokens": 1} | dict.fromkeys(names, 1))

    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == f"frobnicate, with??break, {'x' * 64}"


async def test_fields_that_carry_no_meaning_here_are_accepted_in_silence(http: httpx.AsyncClient):
    body = {"prompt": [7], "max_tokens": 1, "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}

    response = await http.post("/v1/completions", json=body)

    assert response.status_code == 200
    assert "x-ignored-fields" not in response.headers


async def test_without_a_tokenizer_ids_go_in_and_come_out_by_name(idless_app: FastAPI):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(idless_app), base_url="http://test") as http:
        answer = await complete(http, prompt=[7, 8], max_tokens=2, logprobs=1, echo=True)
        refused = await http.post("/v1/completions", json={"prompt": "Hello"})

    (choice,) = answer["choices"]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"][:2] == ["token_id:7", "token_id:8"]
    assert refused.status_code == 400
    assert "tokenizer" in refused.json()["error"]["message"]


async def test_without_a_tokenizer_a_stop_string_is_refused_and_a_stop_id_is_not(idless_app: FastAPI):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(idless_app), base_url="http://test") as http:
        refused = await http.post("/v1/completions", json={"prompt": [7], "stop": "."})
        taken = await http.post("/v1/completions", json={"prompt": [7], "stop": [], "stop_token_ids": [3]})

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "stop"
    assert taken.status_code == 200


async def test_a_timeout_becomes_the_engines_deadline(http: httpx.AsyncClient, engine: FakeEngineClient):
    before = time.monotonic()

    await complete(http, prompt=[7], max_tokens=1, timeout=5)

    assert engine.submitted[0].deadline_s == pytest.approx(before + 5, abs=1)


async def test_a_passed_deadline_is_a_504_that_is_not_to_be_retried(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.pause_s = 0.2

    response = await http.post("/v1/completions", json={"prompt": [7], "timeout": 0.02})

    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"


async def test_one_failed_generation_is_a_500_that_tells_nothing_of_the_inside(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.script = tokens_script(330, finish=FinishReason.ERROR)

    response = await http.post("/v1/completions", json={"prompt": [7]})

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["x-request-id"] in response.json()["error"]["message"], "what to look for in the log"


async def test_what_the_engine_refuses_is_the_clients_mistake(http: httpx.AsyncClient, engine: FakeEngineClient):
    engine.refusal = "the prompt needs 9 blocks, the cache has 8"

    response = await http.post("/v1/completions", json={"prompt": [7]})

    assert response.status_code == 400
    assert response.json()["error"]["message"] == engine.refusal


async def test_a_generation_that_the_engine_does_not_survive_is_a_500_that_is_not_to_be_retried(
    http: httpx.AsyncClient, engine: FakeEngineClient
):
    engine.script = lambda _: [EngineDiedError("the engine process ended each time")]

    response = await http.post("/v1/completions", json={"prompt": [7]})

    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert response.headers["x-should-retry"] == "false"


async def test_what_no_engine_survives_is_told_so_also_while_the_server_is_shutting_down(
    http: httpx.AsyncClient, engine: FakeEngineClient, app: FastAPI
):
    engine.script = lambda _: [0.05, EngineDiedError("the engine process ended each time")]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(http.post("/v1/completions", json={"prompt": [7]}))
        while not engine.num_open:
            await asyncio.sleep(0.001)
        app.state.services.admission.drain()

    response = running.result()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


async def test_the_openapi_document_describes_the_endpoint(http: httpx.AsyncClient):
    document = (await http.get("/openapi.json")).json()

    post = document["paths"]["/v1/completions"]["post"]
    properties = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "max_tokens", "logprobs", "stop_token_ids"} <= properties.keys()
    assert "$ref" not in json.dumps(post)


async def test_the_openapi_document_names_each_readable_path_once(http: httpx.AsyncClient):
    paths = (await http.get("/openapi.json")).json()["paths"]

    for path in ("/livez", "/readyz", "/health", "/metrics", "/v1/models", "/v1/models/{model_id}"):
        assert set(paths[path]) == {"get"}
