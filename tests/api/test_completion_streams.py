"""Streamed completions on a real port: frames byte by byte, interleaved choices, silence, failures, clients that leave."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest
from fake_engine import HANG, FakeEngineClient, counting_script, tokens_script
from fastapi import FastAPI
from live_server import serve_in_thread
from tiny_tokenizer import tiny_tokenizer

from engine.errors import EngineDiedError
from engine.types import FinishReason, GenerationRequest, TokenDelta


def frames(text: str) -> list[str]:
    """The events of a stream, each without its blank line."""
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def chunks(text: str) -> list[dict]:
    """The JSON objects of a stream that ended normally."""
    *events, last = frames(text)
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


def stream(url: str, **body: object) -> str:
    response = httpx.post(f"{url}/v1/completions", json={"stream": True} | body)
    assert response.status_code == 200, response.text
    return response.text


def eventually(condition: Callable[[], bool], *, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def one_token_then(*steps: float | Exception):
    """A script that gives one token and then does `steps`."""

    def script(request: GenerationRequest) -> list[TokenDelta | float | Exception]:
        return [TokenDelta(request_id=request.request_id, token_ids=(340,)), *steps]

    return script


def test_every_event_is_one_data_line_and_the_last_says_done(live_url: str):
    response = httpx.post(f"{live_url}/v1/completions", json={"prompt": [7], "max_tokens": 3, "stream": True})

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames(response.text))
    assert frames(response.text)[-1] == "data: [DONE]"


def test_chunks_have_the_shape_of_the_whole_answer_and_one_identity(live_url: str):
    answers = chunks(stream(live_url, prompt=[7], max_tokens=3))

    assert len({(answer["id"], answer["created"], answer["model"], answer["object"]) for answer in answers}) == 1
    assert answers[0]["id"].startswith("cmpl-")
    assert answers[0]["object"] == "text_completion"
    assert all(set(answer["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"} for answer in answers)
    assert all("usage" not in answer for answer in answers)
    assert [answer["choices"][0]["finish_reason"] for answer in answers][-1] == "length"
    assert all(answer["choices"][0]["finish_reason"] is None for answer in answers[:-1])


def test_joined_pieces_equal_the_whole_answer(live_url: str):
    body = {"prompt": "Once upon", "max_tokens": 40, "seed": 3, "logprobs": 2, "echo": True}
    whole = httpx.post(f"{live_url}/v1/completions", json=body).json()["choices"][0]

    pieces = [answer["choices"][0] for answer in chunks(stream(live_url, **body))]

    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for column, values in whole["logprobs"].items():
        assert [value for piece in pieces if piece["logprobs"] for value in piece["logprobs"][column]] == values


def test_choices_interleave_under_prompt_major_indexes_with_one_done(live_url: str, engine: FakeEngineClient):
    engine.pause_s = 0.002
    body = {"prompt": [[7], [8]], "n": 2, "max_tokens": 5, "seed": 1}
    whole = httpx.post(f"{live_url}/v1/completions", json=body).json()["choices"]

    answers = chunks(stream(live_url, **body))

    assert all(len(answer["choices"]) == 1 for answer in answers)
    texts = ["", "", "", ""]
    for answer in answers:
        texts[answer["choices"][0]["index"]] += answer["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole]
    ends = [answer["choices"][0]["index"] for answer in answers if answer["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


def test_usage_comes_in_one_last_chunk_without_choices(live_url: str):
    *answers, last = chunks(stream(live_url, prompt=[[7, 8], [9]], n=2, max_tokens=3, stream_options={"include_usage": True}))

    assert all(answer["usage"] is None for answer in answers)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 3
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_usage_of_a_stream_tells_what_was_cached_of_each_prompt(live_url: str, engine: FakeEngineClient):
    def script(request: GenerationRequest) -> list[TokenDelta]:
        num_cached = 32 if request.choice else 16
        return [delta._replace(num_cached_tokens=num_cached) for delta in counting_script(request)]

    engine.script = script

    answers = chunks(stream(live_url, prompt=[[7] * 40, [8] * 40], n=2, max_tokens=3, stream_options={"include_usage": True}))

    assert answers[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


def test_obfuscation_is_accepted_and_left_out(live_url: str):
    answers = chunks(stream(live_url, prompt=[7], max_tokens=1, stream_options={"include_obfuscation": True}))

    assert all(set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices"} for answer in answers)


def test_a_stop_string_across_tokens_never_shows_in_part(live_url: str, engine: FakeEngineClient):
    engine.script = tokens_script(*tiny_tokenizer().encode_continuation(" Stop here. Do not stop there."), pause_s=0.001)

    answers = chunks(stream(live_url, prompt="Hello", stop="here. Do", max_tokens=50))

    assert "".join(answer["choices"][0]["text"] for answer in answers) == " Stop "
    assert answers[-1]["choices"][0]["finish_reason"] == "stop"
    assert answers[-1]["choices"][0]["stop_reason"] == "here. Do"
    assert engine.num_open == 0


def test_silence_is_filled_with_comments(live_url: str, engine: FakeEngineClient):
    engine.script = tokens_script(340, 341, pause_s=0.2)

    events = frames(stream(live_url, prompt=[7]))

    assert events[0] == ": ping"
    assert ": ping" in events[events.index(": ping") + 1 : -1]
    assert events[-1] == "data: [DONE]"


def test_silence_without_text_is_filled_with_comments_too(idless_app: FastAPI, engine: FakeEngineClient):
    engine.script = tokens_script(*range(340, 360), pause_s=0.01)
    with serve_in_thread(idless_app) as url:
        events = frames(stream(url, prompt=[7]))

    assert events.count(": ping") >= 2


def test_the_first_piece_arrives_before_the_last_is_made(live_url: str, engine: FakeEngineClient):
    engine.script = one_token_then(HANG)

    with httpx.stream("POST", f"{live_url}/v1/completions", json={"prompt": [7], "stream": True}) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: "))

    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_ends_the_work_in_the_engine(live_url: str, engine: FakeEngineClient, app: FastAPI, is_streamed: bool):
    engine.script = one_token_then(HANG)
    body = json.dumps({"prompt": [[7], [8]], "n": 2, "stream": is_streamed})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    with socket.create_connection(("127.0.0.1", httpx.URL(live_url).port or 0)) as connection:
        connection.sendall(f"{head}{body}".encode())
        assert eventually(lambda: engine.num_open == 4)

    assert eventually(lambda: len(engine.aborted) == 4)
    assert engine.num_open == 0
    assert eventually(lambda: app.state.services.admission.num_open == 0)


def test_a_client_that_leaves_in_the_middle_of_a_stream_is_no_error_in_the_log(
    live_url: str, engine: FakeEngineClient, app: FastAPI, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    engine.script = one_token_then(HANG)

    with httpx.stream("POST", f"{live_url}/v1/completions", json={"prompt": [7], "n": 2, "stream": True}) as response:
        next(response.iter_bytes())

    assert eventually(lambda: len(engine.aborted) == 2)
    assert eventually(lambda: app.state.services.admission.num_open == 0)
    assert eventually(lambda: any("/v1/completions" in record.getMessage() for record in caplog.records))  # the access log: it is over
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_many_streams_opened_and_dropped_leave_nothing_behind(live_url: str, engine: FakeEngineClient, app: FastAPI):
    engine.script = one_token_then(HANG)

    def open_and_drop() -> None:
        with httpx.stream("POST", f"{live_url}/v1/completions", json={"prompt": [7], "stream": True}) as response:
            next(response.iter_bytes())

    threads = [threading.Thread(target=open_and_drop) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert eventually(lambda: engine.num_open == 0)
    assert len(engine.aborted) == 40
    assert eventually(lambda: app.state.services.admission.num_open == 0)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineDiedError("the engine process ended"), "internal_error"),
        (RuntimeError("a secret path /root/x"), "internal_error"),
    ],
)
def test_a_failure_after_the_first_piece_is_one_error_event_and_the_end(
    live_url: str, engine: FakeEngineClient, failure: Exception, code: str
):
    engine.script = one_token_then(0.05, failure)

    *pieces, last = frames(stream(live_url, prompt=[7]))

    error = json.loads(last.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "secret" not in error["message"]
    assert "[DONE]" not in "".join(pieces)
    assert '"finish_reason":"' not in "".join(pieces)


def test_a_deadline_after_the_first_piece_is_an_error_event(live_url: str, engine: FakeEngineClient):
    engine.script = one_token_then(HANG)

    last = frames(stream(live_url, prompt=[7], timeout=1))[-1]

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def test_a_failure_before_the_first_piece_keeps_its_own_status(live_url: str, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, finish_reason=FinishReason.DEADLINE)]
    late = httpx.post(f"{live_url}/v1/completions", json={"prompt": [7], "stream": True})
    engine.script = lambda _: [EngineDiedError("the engine process ended")]
    died = httpx.post(f"{live_url}/v1/completions", json={"prompt": [7], "stream": True})

    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert (died.status_code, died.json()["error"]["code"]) == (500, "internal_error")


def test_a_stream_outlives_the_engine_with_comments_while_it_waits(live_url: str, engine: FakeEngineClient):
    body = {"prompt": [7], "max_tokens": 6, "seed": 1, "stream": True}
    undisturbed = [answer["choices"] for answer in chunks(stream(live_url, **body))]
    engine.pause_s = 0.02

    with httpx.stream("POST", f"{live_url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        seen = [next(lines)]
        engine.die()
        seen += [line for line in iter(lines.__next__, ": ping") if line]
        engine.revive()
        seen += [line for line in lines if line]

    *events, last = (line for line in seen if not line.startswith(":"))
    assert [json.loads(event.removeprefix("data: "))["choices"] for event in events] == undisturbed
    assert last == "data: [DONE]"


def test_a_request_of_the_time_without_an_engine_is_answered_after_it(live_url: str, engine: FakeEngineClient):
    engine.die()
    threading.Timer(0.2, engine.revive).start()

    answers = chunks(stream(live_url, prompt=[7], max_tokens=2))

    assert answers[-1]["choices"][0]["finish_reason"] == "length"


def test_a_timeout_ends_a_stream_on_time_though_no_engine_runs(live_url: str, engine: FakeEngineClient, app: FastAPI):
    engine.script = one_token_then(0.1, 0.1, HANG)
    started = time.monotonic()

    with httpx.stream("POST", f"{live_url}/v1/completions", json={"stream": True, "prompt": [7], "timeout": 1}) as response:
        lines = response.iter_lines()
        next(lines)
        engine.die()
        *_, last = (line for line in lines if line)

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert 0.9 < time.monotonic() - started < 10
    assert eventually(lambda: app.state.services.admission.num_open == 0)


def test_open_streams_are_told_when_there_will_be_no_engine(live_url: str, engine: FakeEngineClient):
    engine.script = one_token_then(HANG)

    with httpx.stream("POST", f"{live_url}/v1/completions", json={"stream": True, "prompt": [7]}) as response:
        lines = response.iter_lines()
        first = next(lines)
        engine.give_up()
        *_, last = (line for line in lines if line)

    assert json.loads(first.removeprefix("data: "))["choices"]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_stream_is_not_disturbed_by_one_that_fails(live_url: str, engine: FakeEngineClient):
    engine.pause_s = 0.003

    def script(request: GenerationRequest):
        return one_token_then(RuntimeError("bad row"))(request) if request.prompt_token_ids == (9,) else counting_script(request)

    engine.script = script
    body = {"prompt": [7], "max_tokens": 30, "seed": 1}
    alone = chunks(stream(live_url, **body))

    failing = threading.Thread(target=lambda: httpx.post(f"{live_url}/v1/completions", json={"prompt": [9], "stream": True}))
    failing.start()
    beside = chunks(stream(live_url, **body))
    failing.join()

    def text(answers: list[dict]) -> str:
        return "".join(answer["choices"][0]["text"] for answer in answers)

    assert text(beside) == text(alone)
