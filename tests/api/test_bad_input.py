"""A zoo of bad input: whatever is sent, the answer is a 200 or a 4xx in the envelope, the field is named, and the next request works."""

import json
import string
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from fake_engine import VOCAB_SIZE, FakeEngineClient, engine_info, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from server.answers.answer import as_json
from server.app import create_app
from server.limits import Limits
from server.preprocess import read_body
from server.schemas.completions import Completion, CompletionChoice, CompletionRequest, Logprobs

JSON = {"content-type": "application/json"}
INT64 = 2**63

# (body, the field that is named)
REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": True}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [None]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [[1, "2"]]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": [VOCAB_SIZE]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": [1] * 257}, "prompt"),
    ({"prompt": [1] * 256}, "max_tokens"),
    ({"prompt": [1] * 250, "max_tokens": 7}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 256}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 16.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"suffix": "end"}, "suffix"),
    ({"suffix": 1}, "suffix"),
    ({"model": "gpt-4"}, "model"),
    ({"model": 4}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": False}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.0}, "n"),
    ({"prompt": ["a"] * 3, "n": 86}, "n"),
    ({"best_of": 21}, "best_of"),
    ({"best_of": -1}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 2, "n": 2, "stream": True}, "best_of"),
    ({"prompt": ["a"] * 20, "best_of": 20}, "best_of"),
    ({"stream": 1}, "stream"),
    ({"stream": "true"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    ({"stream_options": {"include_usage": "yes"}, "stream": True}, "stream_options"),
    ({"stream_options": [], "stream": True}, "stream_options"),
    ({"stream_options": "a", "stream": True}, "stream_options"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"seed": INT64}, "seed"),
    ({"seed": -INT64 - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"5": 100.5}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"5": True}}, "logit_bias"),
    ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
    ({"logit_bias": {"5": None}}, "logit_bias"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"user": 5}, "user"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 0.009}, "repetition_penalty"),
    ({"repetition_penalty": 1e-320}, "repetition_penalty"),
    ({"repetition_penalty": 100.1}, "repetition_penalty"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
    ({"min_tokens": 256}, "max_tokens"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": ["5"]}, "stop_token_ids"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": -1}, "timeout"),
    ({"timeout": 3601}, "timeout"),
    ({"timeout": "5"}, "timeout"),
    ({"priority": 1001}, "priority"),
    ({"priority": -1001}, "priority"),
    ({"priority": 10**30}, "priority"),
    ({"priority": 1.0}, "priority"),
    ({"priority": True}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"cache_salt": ["a"]}, "cache_salt"),
]

ACCEPTED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 2},
    {"top_p": 0},
    {"n": 128, "max_tokens": 1},
    {"best_of": 20, "max_tokens": 1},
    {"best_of": 0},
    {"best_of": 1, "stream": True},
    {"best_of": 2, "n": 2},
    {"min_tokens": 20},
    {"temperature": 0, "n": 2},
    {"logprobs": 20},
    {"stop": ["x"] * 16},
    {"stop": "x" * 256},
    {"stop": []},
    {"seed": INT64 - 1},
    {"seed": -INT64},
    {"logit_bias": {"0": 100, str(VOCAB_SIZE - 1): -100}},
    {"prompt": ["a"] * 128, "max_tokens": 1},
    {"prompt": ["a"] * 2, "n": 128, "max_tokens": 1},
    {"prompt": [1] * 255, "max_tokens": 1},
    {"prompt": [1] * 256, "max_tokens": 0},
    {"prompt": "\x00\r\n\u2028\U0001f600"},
    {"top_k": INT64 - 1},
    {"stop_token_ids": []},
    {"stop_token_ids": [1] * 128},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100},
    {"timeout": 3600},
    {"priority": 1000},
    {"priority": -1000},
    {"cache_salt": "x"},
    {"cache_salt": "x" * 256},
    {"user": ""},
    {"user": "x" * 100_000},
    {"suffix": ""},
    {"stream": True, "stream_options": {"unknown": 1}},
]

MALFORMED: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"5",
    b"\xff\xfe",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a",}',
    b"{'prompt': 'a'}",
    b'{"seed": ' + b"9" * 100_000 + b"}",
    b"[" * 100_000,
    b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}",
    b'{"prompt": "a"} {"prompt": "b"}',
    '{"prompt": "a"}'.encode("utf-16"),
]


class Server:
    """The application in process, asked from synchronous tests."""

    def __init__(self, engine: FakeEngineClient, *, limits: Limits | None = None) -> None:
        self.engine = engine
        limits = limits or replace(Limits(), keep_alive_s=5.0)
        self.app = create_app(client=self.engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny", limits=limits)

    def post(self, content: bytes) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                return await http.post("/v1/completions", content=content, headers=JSON)

        return anyio.run(ask)


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(FakeEngineClient(info=engine_info(max_num_seqs=300)))


def assert_sane(response: httpx.Response, server: Server) -> None:
    """A 200 or a refusal in OpenAI's envelope, of bounded size, with nothing left running."""
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] is None or isinstance(error["param"], str)
        assert response.headers["x-should-retry"] == "false"
        assert len(response.content) < 1500
    assert server.engine.num_open == 0
    assert server.app.state.services.admission.num_open == 0


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_field_out_of_range_is_refused_by_name(server: Server, body: dict[str, Any], param: str):
    response = server.post(json.dumps(body).encode())

    assert_sane(response, server)
    assert response.status_code == (404 if body.get("model") == "gpt-4" else 400)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("body", ACCEPTED, ids=lambda value: str(value)[:40])
def test_a_field_at_the_edge_of_its_range_is_taken(server: Server, body: dict[str, Any]):
    response = server.post(json.dumps({"prompt": "Hello"} | body).encode())

    assert_sane(response, server)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("content", MALFORMED, ids=lambda value: repr(value)[:40])
def test_a_body_that_is_no_json_object_is_refused(server: Server, content: bytes):
    response = server.post(content)

    assert_sane(response, server)
    assert response.status_code == 400


@pytest.mark.parametrize("body", [{"prompt": [1] * 250, "max_tokens": 7}, {"prompt": [1] * 257}, {"prompt": "word " * 400}])
def test_what_cannot_fit_the_context_is_refused_with_the_counts(server: Server, body: dict[str, Any]):
    error = server.post(json.dumps(body).encode()).json()["error"]

    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("the prompt is too long: this model's maximum context length is 256 tokens, the prompt has ")


@pytest.mark.parametrize(("prompt", "max_tokens"), [([1] * 60, 5), ([1] * 65, 0), ([1] * 65, None), ("word " * 100, 4)])
def test_what_the_whole_cache_could_never_hold_is_refused_with_the_counts(prompt: object, max_tokens: int | None):
    server = Server(FakeEngineClient(info=replace(engine_info(), num_blocks=4, block_size=16)))

    refused = server.post(json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode())
    at_the_edge = server.post(json.dumps({"prompt": [1] * 60, "max_tokens": 4}).encode())

    assert_sane(refused, server)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "the whole cache holds 64" in refused.json()["error"]["message"]
    assert [len(request.prompt_token_ids) for request in server.engine.submitted] == [60]
    assert at_the_edge.status_code == 200


def test_what_is_no_object_is_called_by_its_name(server: Server):
    field = server.post(b'{"stream_options": "a", "stream": true}').json()["error"]
    body = server.post(b'"a"').json()["error"]

    assert field["message"] == "stream_options: must be an object, found 'a'"
    assert body["message"] == "the body must be a JSON object"


def test_end_tokens_that_leave_nothing_to_choose_are_refused_with_min_tokens():
    server = Server(FakeEngineClient(info=engine_info(vocab_size=8)))
    others = [token for token in range(8) if token != tiny_config().eos_token]

    def status(**fields: Any) -> tuple[int, str | None]:
        response = server.post(json.dumps({"prompt": [7], "min_tokens": 1, "stop_token_ids": others} | fields).encode())
        return response.status_code, response.json()["error"]["param"] if response.status_code != 200 else None

    assert status() == (400, "min_tokens")
    assert status(stop_token_ids=[*range(8)], ignore_eos=True) == (400, "min_tokens")
    assert status(ignore_eos=True) == (200, None)
    assert status(stop_token_ids=others[1:]) == (200, None)
    assert status(min_tokens=0) == (200, None)


def test_a_hostile_list_makes_a_short_message(server: Server):
    for name in ("prompt", "stop", "stop_token_ids", "logit_bias", "stream_options", "user", "n"):
        response = server.post(json.dumps({name: [{"a": [1.5]}] * 20_000}).encode())

        assert_sane(response, server)
        assert response.json()["error"]["param"] == name


def test_fields_are_taken_up_to_the_limit_and_refused_past_it(server: Server):
    def body(num_fields: int) -> bytes:
        return json.dumps({"prompt": [7]} | {f"unknown{number}": 1 for number in range(num_fields - 1)}).encode()

    at_limit = server.post(body(Limits().max_fields))
    past_it = server.post(body(Limits().max_fields + 1))
    the_same_again = server.post(b'{"prompt": [7]' + b', "n": 1' * Limits().max_fields + b"}")

    assert at_limit.status_code == 200
    assert at_limit.headers["x-ignored-fields"].endswith("unknown15, ...")
    assert past_it.status_code == the_same_again.status_code == 400
    assert "256 fields" in past_it.json()["error"]["message"]


def test_biases_are_taken_up_to_the_limit_and_refused_past_it():
    server = Server(FakeEngineClient(), limits=Limits(max_logit_bias=3))

    def answer(num_entries: int) -> httpx.Response:
        return server.post(json.dumps({"prompt": [7], "logit_bias": {str(token): 1 for token in range(num_entries)}}).encode())

    assert answer(3).status_code == 200
    assert answer(4).status_code == 400
    assert answer(4).json()["error"]["message"] == "logit_bias has 4 entries, the limit is 3"


def test_a_nested_object_is_not_counted_as_fields(server: Server):
    assert server.post(json.dumps({"prompt": [7], "metadata": {str(key): 1 for key in range(500)}}).encode()).status_code == 200


@pytest.mark.parametrize(
    ("body", "num_logprobs"),
    [
        ({"prompt": [[7] * 20] * 4, "n": 2, "max_tokens": 5, "logprobs": 3}, 4 * 2 * 5 * 4),
        ({"prompt": [[7] * 20] * 4, "n": 2, "max_tokens": 5, "logprobs": 3, "echo": True}, 4 * 2 * 25 * 4),
        ({"prompt": [7] * 20, "n": 1, "best_of": 3, "max_tokens": 5, "logprobs": 0}, 3 * 5),
    ],
)
def test_log_probabilities_are_given_up_to_the_limit_and_refused_past_it(body: dict[str, Any], num_logprobs: int):
    at_limit = Limits(max_answer_logprobs=num_logprobs)
    past_it = Limits(max_answer_logprobs=num_logprobs - 1)

    taken = Server(FakeEngineClient(), limits=at_limit).post(json.dumps(body).encode())
    refused = Server(FakeEngineClient(), limits=past_it).post(json.dumps(body).encode())

    assert taken.status_code == 200
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "logprobs"
    assert f"{num_logprobs:,}" in refused.json()["error"]["message"]


def test_what_evaluations_ask_for_is_below_the_limit_of_log_probabilities():
    server = Server(FakeEngineClient(info=engine_info(max_model_len=1024)))
    body = {"prompt": [7] * 1000, "n": 8, "max_tokens": 1, "logprobs": 20, "echo": True}

    response = server.post(json.dumps(body).encode())

    assert response.status_code == 200
    assert [len(choice["logprobs"]["tokens"]) for choice in response.json()["choices"]] == [1001] * 8
    assert list(response.json()) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]


def test_large_bodies_that_mean_little_are_refused(server: Server):
    many_fields = {f"unknown{number}": 1 for number in range(50_000)}

    for body in (many_fields, {"prompt": [1] * 340_000}, {"prompt": "a" * 1_000_000}):
        response = server.post(json.dumps(body).encode())

        assert_sane(response, server)
        assert response.status_code == 400


def turns_during(work: Callable[[], Coroutine[Any, Any, object]]) -> int:
    """How often others had their turn on the event loop while `work` ran."""

    async def count() -> int:
        num_turns = 0

        async def others() -> None:
            nonlocal num_turns
            while True:
                await anyio.sleep(0)
                num_turns += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(others)
            await anyio.sleep(0)
            before = num_turns
            await work()
            during = num_turns - before
            tasks.cancel_scope.cancel()
        return during

    return anyio.run(count)


def test_a_large_body_is_read_beside_the_event_loop_and_a_small_one_on_it():
    def reading(num_ids: int) -> Callable[[], Coroutine[Any, Any, object]]:
        return lambda: read_body(json.dumps({"prompt": [1] * num_ids}).encode(), CompletionRequest, limits=Limits())

    assert turns_during(reading(340_000)) > 0
    assert turns_during(reading(100)) == 0


def test_a_large_answer_is_encoded_beside_the_event_loop_and_reads_the_same():
    def making(num_tokens: int) -> Callable[[], Coroutine[Any, Any, bytes]]:
        return lambda: as_json(lambda: answer(num_tokens), num_logprobs=num_tokens)

    def answer(num_tokens: int) -> Completion:
        logprobs = Logprobs(
            tokens=["a"] * num_tokens,
            token_logprobs=[-0.5] * num_tokens,
            top_logprobs=[{"a": -0.5}] * num_tokens,
            text_offset=[0] * num_tokens,
        )
        choice = CompletionChoice(index=0, text="é", logprobs=logprobs, finish_reason="stop", stop_reason=None)
        return Completion(id="cmpl-1", created=1, model="tiny", system_fingerprint="f", choices=[choice, choice])

    assert turns_during(making(2000)) > 0
    assert turns_during(making(5)) == 0
    assert anyio.run(making(2000)) == msgspec.json.encode(answer(2000))


def test_a_secret_prompt_is_not_in_the_error(server: Server):
    for body in ({"prompt": "my secret " * 300}, {"prompt": ["my secret", 5]}, {"prompt": {"my secret": 1}}):
        assert "secret" not in server.post(json.dumps(body).encode()).text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": "my secret"}),
        ("/v1/chat/completions", {"messages": ["my secret"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ["my secret"]}]}),
        ("/v1/responses", {"input": ["my secret"]}),
        ("/v1/responses", {"input": [{"role": "user", "content": ["my secret"]}]}),
        ("/v1/messages", {"max_tokens": 1, "messages": "my secret"}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "system": ["my secret"]}),
        ("/tokenize", {"messages": "my secret"}),
    ],
)
async def test_nor_is_what_somebody_says(http: httpx.AsyncClient, path: str, body: dict):
    response = await http.post(path, json=body)

    assert response.status_code == 400
    assert "secret" not in response.text


@pytest.mark.anyio
async def test_a_wrong_role_is_told(http: httpx.AsyncClient):
    response = await http.post("/v1/chat/completions", json={"messages": [{"role": "critic", "content": "x"}]})

    assert "'critic'" in response.json()["error"]["message"]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 30)
    | st.floats()
    | st.text(max_size=20)
    | st.text(string.digits, max_size=5)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8
)
FIELDS = st.sampled_from(sorted(CompletionRequest.model_fields)) | st.text(max_size=8)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(FIELDS, VALUES, max_size=6))
def test_no_body_is_an_error_of_the_server(server: Server, body: dict[str, Any]):
    server.engine.submitted.clear()
    if isinstance(body.get("timeout"), float) and 0 < body["timeout"] < 10:
        body["timeout"] = 10.0  # a shorter one may really pass, which is a 504 and no error

    assert_sane(server.post(json.dumps(body).encode()), server)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_no_bytes_are_an_error_of_the_server(server: Server, content: bytes):
    assert_sane(server.post(content), server)


def test_bad_input_leaves_the_next_answer_as_it_was(server: Server):
    canary = json.dumps({"prompt": "Hello", "max_tokens": 8, "seed": 1}).encode()
    before = server.post(canary).json()["choices"]

    for body, _ in REFUSED[::7]:
        server.post(json.dumps(body).encode())

    assert server.post(canary).json()["choices"] == before
