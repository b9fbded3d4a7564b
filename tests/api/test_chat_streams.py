"""Streamed chat on a real port: chunks as OpenAI's clients join them, log-probabilities, usage, ends and failures."""

import json
import threading
import time

import httpx
from chat_scripts import SEPARATOR, turn_script
from fake_engine import HANG, FakeEngineClient, tokens_script
from tiny_tokenizer import byte_ids, tiny_tokenizer

from engine.errors import EngineDiedError
from engine.types import FinishReason, GenerationRequest, TokenDelta

HELLO = [{"role": "user", "content": "Hello"}]


def stream(url: str, **body: object) -> str:
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "stream": True} | body)
    assert response.status_code == 200, response.text
    return response.text


def chunks(text: str) -> list[dict]:
    """The JSON objects of a stream that ended normally."""
    assert text.endswith("\n\n")
    *events, last = text[:-2].split("\n\n")
    assert last == "data: [DONE]"
    assert all("\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


def pieces(text: str, *, index: int = 0) -> list[dict]:
    """The pieces of one choice."""
    return [choice for chunk in chunks(text) for choice in chunk["choices"] if choice["index"] == index]


def content(found: list[dict]) -> str:
    return "".join(piece["delta"].get("content") or "" for piece in found)


def test_the_role_comes_first_and_every_chunk_has_one_identity(live_url: str, engine: FakeEngineClient):
    engine.script = turn_script(" Hello world!")

    answers = chunks(stream(live_url))

    assert len({(answer["id"], answer["created"], answer["model"], answer["object"]) for answer in answers}) == 1
    assert answers[0]["id"].startswith("chatcmpl-")
    assert answers[0]["object"] == "chat.completion.chunk"
    assert all(set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices"} for answer in answers)
    first, *others = (answer["choices"][0] for answer in answers)
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(set(piece) == {"index", "delta", "logprobs", "finish_reason", "stop_reason"} for piece in [first, *others])
    assert all("role" not in piece["delta"] for piece in others)
    assert content(others) == "Hello world!"
    assert [piece["finish_reason"] for piece in [first, *others]] == [None] * len(others) + ["stop"]
    assert all(piece["stop_reason"] is None for piece in others), "the end of a turn is not one the client named"


def test_joined_pieces_are_the_whole_answer(live_url: str):
    body = {"max_tokens": 40, "seed": 3, "logprobs": True, "top_logprobs": 2}
    whole = httpx.post(f"{live_url}/v1/chat/completions", json={"messages": HELLO} | body).json()["choices"][0]

    found = pieces(stream(live_url, **body))

    assert content(found) == whole["message"]["content"]
    assert [entry for piece in found if piece["logprobs"] for entry in piece["logprobs"]["content"]] == whole["logprobs"]["content"]
    assert found[-1]["finish_reason"] == whole["finish_reason"] == "length"


def test_choices_interleave_and_each_begins_with_its_role(live_url: str):
    text = stream(live_url, n=3, max_tokens=5, seed=1)

    assert all(len(chunk["choices"]) == 1 for chunk in chunks(text))
    for index in range(3):
        found = pieces(text, index=index)
        assert found[0]["delta"]["role"] == "assistant"
        assert [piece["finish_reason"] for piece in found if piece["finish_reason"]] == ["length"]
    assert len({content(pieces(text, index=index)) for index in range(3)}) == 3
    assert text.count("[DONE]") == 1


def test_usage_comes_in_a_chunk_of_its_own(live_url: str, engine: FakeEngineClient):
    *others, last = chunks(stream(live_url, n=2, max_tokens=3, stream_options={"include_usage": True, "include_obfuscation": True}))

    num_prompt = len(engine.submitted[0].prompt_token_ids)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (num_prompt, 6)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_stream_options_without_a_stream_are_refused(live_url: str):
    body = {"messages": HELLO, "stream_options": {"include_usage": True}}

    error = httpx.post(f"{live_url}/v1/chat/completions", json=body).json()["error"]

    assert error["param"] == "stream_options"


def test_the_space_before_an_answer_is_dropped_however_it_comes(live_url: str, engine: FakeEngineClient):
    engine.script = tokens_script(*byte_ids(b" \n Yes \n"), SEPARATOR)

    assert content(pieces(stream(live_url))) == "Yes \n"


def test_characters_are_streamed_whole(live_url: str, engine: FakeEngineClient):
    engine.script = tokens_script(*byte_ids("Köln 🦊".encode()), *byte_ids("é".encode())[:1], SEPARATOR)

    found = pieces(stream(live_url))

    assert content(found) == "Köln 🦊�"
    assert [piece["delta"].get("content") for piece in found].count("🦊") == 1


def test_a_stop_string_across_tokens_is_held_back_and_never_shown(live_url: str, engine: FakeEngineClient):
    engine.script = tokens_script(*byte_ids(b"One. Human Human: more"), SEPARATOR)

    found = pieces(stream(live_url, stop=["Human:"]))

    assert content(found) == "One. Human "
    assert (found[-1]["finish_reason"], found[-1]["stop_reason"]) == ("stop", "Human:")


def test_token_ids_come_with_their_pieces_and_the_prompts_once(live_url: str, engine: FakeEngineClient):
    engine.script = turn_script(" Hello")

    answers = chunks(stream(live_url, return_token_ids=True, n=2))

    told = [answer["prompt_token_ids"] for answer in answers if "prompt_token_ids" in answer]
    first_choice = [piece for answer in answers for piece in answer["choices"] if piece["index"] == 0]
    assert told == [list(engine.submitted[0].prompt_token_ids)]
    assert [token for piece in first_choice for token in piece.get("token_ids", [])] == [
        *tiny_tokenizer().encode_continuation(" Hello"),
        SEPARATOR,
    ]


def test_what_is_wrong_with_a_request_has_its_status_before_any_event(live_url: str):
    response = httpx.post(f"{live_url}/v1/chat/completions", json={"messages": [], "stream": True})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_an_engine_that_dies_ends_the_stream_with_an_error_and_without_a_reason(live_url: str, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), 0.02, EngineDiedError("gone")]

    *events, last = stream(live_url)[:-2].split("\n\n")

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert all("[DONE]" not in event and '"finish_reason":null' in event for event in events)


def test_silence_before_the_first_token_is_kept_alive_behind_the_role(live_url: str, engine: FakeEngineClient):
    engine.script = lambda request: [0.2, *turn_script(" Yes")(request)]

    text = stream(live_url)

    assert ": ping" in text
    assert text.index('"role":"assistant"') < text.index(": ping")
    assert content(pieces(text)) == "Yes"


def test_a_client_that_leaves_ends_the_work(live_url: str, engine: FakeEngineClient):
    engine.script = lambda request: [TokenDelta(request_id=request.request_id, token_ids=(340,)), HANG]

    with httpx.stream("POST", f"{live_url}/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
        next(response.iter_lines())

    deadline_s = time.monotonic() + 2
    while not engine.aborted and time.monotonic() < deadline_s:
        threading.Event().wait(0.005)
    assert engine.aborted == [engine.submitted[0].request_id]


def test_the_pieces_do_not_depend_on_how_tokens_arrive(live_url: str, engine: FakeEngineClient):
    ids = tiny_tokenizer().encode_continuation(" Once upon a time. Human: no")

    def in_one(request: GenerationRequest) -> list[TokenDelta]:
        return [TokenDelta(request_id=request.request_id, token_ids=(*ids, SEPARATOR), finish_reason=FinishReason.STOP)]

    engine.script = in_one
    whole = content(pieces(stream(live_url, stop="Human:")))
    engine.script = tokens_script(*ids, SEPARATOR)
    single = content(pieces(stream(live_url, stop="Human:")))

    assert whole == single == "Once upon a time. "
