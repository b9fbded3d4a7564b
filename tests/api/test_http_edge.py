"""The edge of the server: ids, limits while reading, unknown routes, probes, metrics, unexpected failures."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from app_routes import routes_of
from fake_engine import FakeEngineClient
from fastapi import FastAPI
from live_server import serve_in_thread
from prometheus_client.parser import text_string_to_metric_families

from engine.types import Progress
from server.http_protocol import bounded_http
from server.limits import Limits

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


def checked_error(response: httpx.Response) -> dict:
    """The error of an answer in OpenAI's envelope."""
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"] in ("invalid_request_error", "server_error")
    assert error["code"] is None or isinstance(error["code"], str)
    return error


async def test_every_answer_has_an_id_of_the_servers_own(http: httpx.AsyncClient):
    answers = [
        await http.get("/livez", headers={"x-request-id": "mine"}),
        await http.get("/nowhere"),
        await http.post("/v1/completions", json={"n": 0}),
        await http.post("/v1/completions", json={"max_tokens": 1}),
        await http.get("/livez", headers={"x-big": "x" * 40_000}),
    ]

    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert "mine" not in ids


async def test_an_unknown_route_is_404_and_a_wrong_method_405_in_the_envelope(http: httpx.AsyncClient):
    unknown = await http.post("/v1/embeddings", content=b"anything")
    wrong = await http.put("/v1/completions")

    assert unknown.status_code == 404
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert checked_error(unknown)["type"] == "invalid_request_error"
    assert checked_error(wrong)["param"] is None


async def test_options_names_the_methods_and_grants_no_cross_origin(http: httpx.AsyncClient):
    answer = await http.options("/v1/completions", headers={"origin": "http://elsewhere", "access-control-request-method": "POST"})

    assert answer.status_code == 204
    assert answer.headers["allow"] == "POST, OPTIONS"
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics", "/v1/models", "/v1/models/tiny"])
async def test_allow_names_both_methods_of_what_can_be_read(http: httpx.AsyncClient, path: str):
    options = await http.options(path)
    refused = await http.post(path)

    assert options.status_code == 204
    assert set(options.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_every_route_answers_options_and_refuses_other_methods_in_the_envelope(http: httpx.AsyncClient, app: FastAPI):
    for template, methods in routes_of(app).items():
        path = re.sub(r"\{.*?\}", "tiny", template)
        options = await http.options(path)
        refused = await http.request("PROPFIND", path)

        assert options.status_code == 204, path
        assert methods < set(options.headers["allow"].split(", ")), path
        assert refused.status_code == 405, path
        assert refused.headers["x-should-retry"] == "false"
        assert refused.headers["x-request-id"]
        assert refused.json().get("type") == "error" if path.startswith("/v1/messages") else checked_error(refused)


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "/v1/models//"])
async def test_slashes_too_many_change_nothing(http: httpx.AsyncClient, path: str):
    assert (await http.get(path)).json()["object"] == "list"


async def test_the_model_is_listed_and_found_by_its_id(http: httpx.AsyncClient):
    listed = (await http.get("/v1/models")).json()
    found = (await http.get("/v1/models/tiny")).json()
    other = await http.get("/v1/models/xai/grok-9")

    assert listed["object"] == "list"
    assert listed["data"] == [found]
    assert found == {
        "id": "tiny",
        "object": "model",
        "created": found["created"],
        "owned_by": "grok-server",
        "max_model_len": 256,
    }
    assert other.status_code == 404
    assert checked_error(other)["code"] == "model_not_found"


async def test_probes_answer_head_as_well(http: httpx.AsyncClient):
    for path in ("/livez", "/readyz", "/health", "/v1/models", "/metrics"):
        assert (await http.head(path)).status_code == 200


async def test_readiness_follows_the_engine_and_liveness_does_not(http: httpx.AsyncClient, engine: FakeEngineClient):
    ready = await http.get("/readyz")
    info, engine.info, engine.is_ready = engine.info, None, False
    engine.progress = Progress(phase="load", done=3, total=4, unit="bytes", tensors_done=1, tensors_total=2, elapsed_s=1.5)
    loading = await http.get("/readyz")
    engine.info, engine.progress = info, None
    restarting = await http.get("/health")

    assert ready.status_code == 200
    assert loading.status_code == 503
    assert loading.json() == {
        "status": "model_loading",
        "phase": "load",
        "percent": 75.0,
        "done": 3,
        "total": 4,
        "unit": "bytes",
        "tensors_done": 1,
        "tensors_total": 2,
        "per_second": 2,
        "left_s": 0.5,
    }
    assert restarting.status_code == 503
    assert restarting.json()["status"] == "engine_restarting"
    assert (await http.get("/livez")).status_code == 200


async def test_a_body_of_another_type_or_encoding_is_415(http: httpx.AsyncClient):
    for headers in (
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {},
    ):
        answer = await http.post("/v1/completions", content=b"{}", headers=headers)
        assert answer.status_code == 415, headers
        assert checked_error(answer)["code"] == "unsupported_body"


async def test_json_in_utf8_is_accepted_however_it_is_declared(http: httpx.AsyncClient):
    for content_type in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
        answer = await http.post("/v1/completions", content=b'{"max_tokens": 1}', headers={"content-type": content_type})
        assert answer.status_code == 200, content_type


@pytest.mark.parametrize("limits", [replace(Limits(), max_body_bytes=1000)])
@pytest.mark.usefixtures("limits")
async def test_a_body_is_taken_at_the_limit_and_refused_past_it(http: httpx.AsyncClient):
    def body(size: int) -> bytes:
        start = b'{"max_tokens": 1, "user": "'
        return start + b"x" * (size - len(start) - 2) + b'"}'

    async def in_pieces(content: bytes):
        for start in range(0, len(content), 100):
            yield content[start : start + 100]

    at_limit = await http.post("/v1/completions", content=body(1000), headers=JSON)
    past_it = await http.post("/v1/completions", content=body(1001), headers=JSON)
    past_it_undeclared = await http.post("/v1/completions", content=in_pieces(body(1001)), headers=JSON)

    assert at_limit.status_code == 200
    assert past_it.status_code == past_it_undeclared.status_code == 413
    assert checked_error(past_it)["code"] == checked_error(past_it_undeclared)["code"] == "body_too_large"


def test_the_documented_sizes_are_the_limits():
    limits = Limits()
    document = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()

    assert f"| 413 | `body_too_large` | more than {limits.max_body_bytes / 2**20:g} MiB |" in document
    assert f"| 431 | `headers_too_large` | more than {limits.max_header_bytes / 2**10:g} KiB |" in document
    assert f"a body of more than {Limits().max_fields} fields is 400" in document
    assert f"are at most {Limits().max_answer_logprobs:,}." in document


def test_a_client_that_sends_too_much_still_reads_why(live_url: str):
    answer = httpx.post(f"{live_url}/v1/completions", content=b" " * 8_000_000, headers=JSON)

    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("limits", [replace(Limits(), max_header_bytes=2000)])
@pytest.mark.usefixtures("limits")
async def test_headers_are_taken_below_the_limit_and_refused_past_it(http: httpx.AsyncClient):
    below = await http.get("/livez", headers={"x-big": "x" * 1500})
    past_it = await http.get("/livez", headers={"x-big": "x" * 2000})

    assert below.status_code == 200
    assert past_it.status_code == 431
    assert checked_error(past_it)["code"] == "headers_too_large"


def test_a_body_that_comes_too_slowly_is_408(live_url: str):
    port = httpx.URL(live_url).port or 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"max')
        connection.settimeout(20)  # less than the limit where nobody lowered it
        answer = b""
        while piece := connection.recv(65536):
            answer += piece

    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"


@pytest.fixture
def bounded_address(app: FastAPI, limits: Limits) -> Iterator[tuple[str, int]]:
    """Host and port of a server whose connections are bounded before a request exists."""
    with serve_in_thread(app, http=bounded_http(limits)) as url:
        yield "127.0.0.1", httpx.URL(url).port or 0


def answer_to(address: tuple[str, int], *pieces: bytes) -> tuple[int, dict]:
    """Send raw bytes, read until the server closes: status and error."""
    with socket.create_connection(address, timeout=5) as connection:
        with contextlib.suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: " in head
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("limits", [replace(Limits(), max_header_bytes=2000)])
def test_headers_without_end_are_refused_while_they_come(bounded_address: tuple[str, int]):
    one_value = answer_to(bounded_address, b"GET /livez HTTP/1.1\r\nx-big: ", b"x" * 5000)
    many_values = answer_to(bounded_address, b"GET /livez HTTP/1.1\r\n", b"x-a: b\r\n" * 1000)

    for status, error in (one_value, many_values):
        assert status == 431
        assert error["code"] == "headers_too_large"


@pytest.mark.parametrize("limits", [replace(Limits(), max_header_bytes=2000)])
@pytest.mark.parametrize("more", [b"x-big: " + b"x" * 5000, b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_what_is_refused_while_it_comes_has_anthropics_shape_on_its_path(bounded_address: tuple[str, int], more: bytes):
    with socket.create_connection(bounded_address, timeout=5) as connection:
        connection.sendall(b"POST /v1/messages?beta=true HTTP/1.1\r\nContent-Type: application/json\r\n" + more)
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")

    answer = json.loads(body)
    assert (answer["type"], answer["error"]["type"]) == ("error", "request_too_large" if b"431" in head[:12] else "invalid_request_error")
    assert f"\r\nrequest-id: {answer['request_id']}" in head.decode()


def test_headers_that_come_too_slowly_are_408(bounded_address: tuple[str, int]):
    status, error = answer_to(bounded_address, b"GET /livez HTTP/1.1\r\nx-slow: ")

    assert (status, error["code"]) == (408, "body_timeout")


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"BREW /livez HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET livez HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"GET http:///livez HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT /livez HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nx: \x00\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        CHUNKED + b"zz\r\n\r\n",
        CHUNKED + b"2\r\n{}zz\r\n",
    ],
    ids=lambda content: repr(content)[:50],
)
def test_bytes_that_are_no_http_are_refused_in_the_envelope(bounded_address: tuple[str, int], content: bytes):
    status, error = answer_to(bounded_address, content)

    assert status == 400
    assert error == {"message": error["message"], "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize("around", [b"1;" + b"x" * 1000 + b"\r\n \r\n", b"0\r\n" + b"x-a: " + b"b" * 1_000_000])
def test_a_body_that_is_mostly_not_body_is_not_read_on(bounded_address: tuple[str, int], around: bytes):
    with socket.create_connection(bounded_address, timeout=5) as connection:
        connection.sendall(CHUNKED)
        with pytest.raises(ConnectionError):
            connection.sendall(around * (20_000_000 // len(around)))

    assert httpx.get(f"http://127.0.0.1:{bounded_address[1]}/livez").status_code == 200


def test_a_body_in_the_smallest_chunks_is_taken_and_its_trailers_are_dropped(bounded_address: tuple[str, int]):
    body = json.dumps({"prompt": [7], "max_tokens": 1, "user": "x" * 20_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with socket.create_connection(bounded_address, timeout=5) as connection:
        connection.sendall(CHUNKED + chunks + b"0\r\n" + b"x-trailer: 1\r\n" * 500 + b"\r\n")

        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_body_that_goes_wrong_after_its_answer_gets_no_second_one(bounded_address: tuple[str, int]):
    with socket.create_connection(bounded_address, timeout=5) as connection:
        connection.sendall(CHUNKED.replace(b"/v1/completions", b"/nowhere"))
        answer = connection.recv(65536)
        connection.sendall(b"zz\r\n\r\n")
        while piece := connection.recv(65536):
            answer += piece

    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_bounded_connection_serves_one_request_after_the_other(bounded_address: tuple[str, int]):
    host, port = bounded_address
    with httpx.Client(base_url=f"http://{host}:{port}") as http:
        for _ in range(3):
            assert http.post("/v1/completions", json={"prompt": [7], "max_tokens": 2}).status_code == 200
        time.sleep(0.5)  # longer than a head may take: an idle connection is not a slow one
        assert http.get("/livez").status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(live_url: str, app: FastAPI):
    port = httpx.URL(live_url).port or 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")

    assert httpx.get(f"{live_url}/livez").status_code == 200
    assert app.state.services.admission.num_open == 0


async def test_an_unexpected_failure_is_a_generic_500_with_an_id(http: httpx.AsyncClient, engine: FakeEngineClient):
    def script(_: object):
        raise RuntimeError("secret /root/path")

    engine.script = script

    answer = await http.post("/v1/completions", json={"prompt": [7]})

    assert answer.status_code == 500
    error = checked_error(answer)
    assert error["code"] == "internal_error"
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" not in answer.text
    assert (await http.get("/livez")).status_code == 200


async def test_an_unexpected_failure_reaches_the_servers_log(app: FastAPI, engine: FakeEngineClient):
    def script(_: object):
        raise RuntimeError("for the log")

    engine.script = script

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        with pytest.raises(RuntimeError, match="for the log"):
            await http.post("/v1/completions", json={"prompt": [7]})


async def test_metrics_count_tokens_times_and_ends(http: httpx.AsyncClient, engine: FakeEngineClient):
    await http.post("/v1/completions", json={"prompt": [[7, 8], [9]], "max_tokens": 4})
    engine.pause_s = 0.1
    await http.post("/v1/completions", json={"prompt": [7], "timeout": 0.01})

    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families((await http.get("/metrics")).text)
        for sample in family.samples
    }
    assert samples["grok:prompt_tokens_total",] == 4
    assert samples["grok:generation_tokens_total",] == 8
    assert samples["grok:sequences_finished_total", "length"] == 2
    assert samples["grok:sequences_finished_total", "deadline"] == 1
    assert samples["grok:time_to_first_token_seconds_count",] == 2
    assert samples["grok:inter_token_latency_seconds_count",] == 6
    assert samples["grok:e2e_request_latency_seconds_count",] == 3
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert samples[f"grok:{name}",] == samples[f"vllm:{name}", "tiny"] == 0
