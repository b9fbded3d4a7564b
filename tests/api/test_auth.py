"""API keys at the edge: with one set, liveness and readiness alone answer without it, however the path is written."""

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from app_routes import routes_of
from fake_engine import FakeEngineClient, tiny_config
from fastapi import FastAPI
from live_server import serve_in_thread
from tiny_tokenizer import tiny_tokenizer

from engine.errors import ConfigError
from server.api_keys import ApiKey, ApiKeys, is_open_to_others, read_key_file
from server.app import create_app, create_metrics_app
from server.http_protocol import bounded_http
from server.limits import Limits

pytestmark = pytest.mark.anyio

KEY, OTHER_KEY = "sk-test-0123456789", "sk-other-0123456789"
BEARER = {"authorization": f"Bearer {KEY}"}
OPEN = {("GET", "/livez"), ("HEAD", "/livez"), ("GET", "/readyz"), ("HEAD", "/readyz"), ("GET", "/health"), ("HEAD", "/health")}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE")


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys([ApiKey.of(KEY, name="ann"), ApiKey.of(OTHER_KEY)])


@pytest.fixture
def allowed_origins() -> tuple[str, ...]:
    return ()


@pytest.fixture
def app(engine: FakeEngineClient, limits: Limits, keys: ApiKeys, allowed_origins: tuple[str, ...]) -> FastAPI:
    return create_app(
        client=engine,
        tokenizer=tiny_tokenizer(),
        model=tiny_config(),
        model_name="tiny",
        limits=limits,
        keys=keys,
        allowed_origins=allowed_origins,
    )


@pytest.fixture
def address(app: FastAPI, limits: Limits) -> Iterator[tuple[str, int]]:
    """Host and port of the server as it really runs."""
    with serve_in_thread(app, http=bounded_http(limits)) as url:
        yield "127.0.0.1", httpx.URL(url).port or 0


def is_refused_for_its_key(response: httpx.Response) -> bool:
    assert (response.status_code == 401) == (response.headers.get("www-authenticate") == "Bearer")
    return response.status_code == 401


async def test_of_all_routes_only_liveness_and_readiness_answer_without_a_key(http: httpx.AsyncClient, app: FastAPI):
    paths = set(routes_of(app))
    assert {"/v1/completions", "/v1/models", "/v1/models/{model_id:path}", "/metrics", "/livez", "/openapi.json"} <= paths

    open_ones = set()
    for path in sorted(paths):
        for method in METHODS:
            for headers in ({}, {"authorization": "Bearer wrong"}):
                answer = await http.request(method, re.sub(r"\{.*?\}", "tiny", path), headers=headers)
                if not is_refused_for_its_key(answer):
                    open_ones.add((method, path))

    assert open_ones == OPEN


async def test_what_does_not_exist_is_refused_for_the_missing_key_first(http: httpx.AsyncClient):
    for path in ("/", "/nowhere", "/v1/embeddings", "/v1", "/docs", "/redoc", "/admin", "/v2/models"):
        assert is_refused_for_its_key(await http.get(path)), path
        assert (await http.get(path, headers=BEARER)).status_code == 404, path


async def test_a_refusal_is_openais_and_says_nothing_of_the_key(http: httpx.AsyncClient):
    missing = await http.post("/v1/completions", json={"prompt": "secret"})
    wrong = await http.post("/v1/completions", json={"prompt": "secret"}, headers={"authorization": "Bearer sk-guess"})

    for answer in (missing, wrong):
        error = answer.json()["error"]
        assert error == {"message": error["message"], "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"]
        assert answer.headers["content-type"] == "application/json"
    assert "Authorization: Bearer" in missing.json()["error"]["message"]
    assert "sk-guess" not in wrong.text


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/"])
async def test_anthropics_endpoints_refuse_in_anthropics_shape(http: httpx.AsyncClient, path: str):
    answer = await http.post(path, json={}, headers={"x-api-key": "wrong"})

    body = answer.json()
    assert body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": body["error"]["message"]},
        "request_id": answer.headers["x-request-id"],
    }
    assert answer.headers["request-id"] == body["request_id"]


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY} "},
        {"authorization": f"Bearer {OTHER_KEY}"},
        {"x-api-key": KEY},
        {"X-Api-Key": OTHER_KEY, "authorization": "Basic abc"},
        {"x-api-key": KEY, "authorization": "Bearer wrong"},
    ],
)
async def test_every_key_opens_by_either_header(http: httpx.AsyncClient, headers: dict[str, str]):
    assert (await http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": KEY},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY.upper()}"},
        {"authorization": f"Bearer {KEY} {OTHER_KEY}"},
        {"authorization": f"Bearer {ApiKey.of(KEY).digest.hex()}"},
        {"authorization": "Bearer ann"},
        {"x-api-key": ""},
        {"x-api-key": f"Bearer {KEY}"},
        {"api_key": KEY},
        {"cookie": f"api_key={KEY}"},
        {"x-forwarded-for": "127.0.0.1", "x-forwarded-uri": "/livez", "x-original-url": "/livez", "x-rewrite-url": "/livez"},
        {"host": "/livez"},
    ],
)
async def test_what_is_not_exactly_a_key_in_its_header_opens_nothing(http: httpx.AsyncClient, headers: dict[str, str]):
    assert is_refused_for_its_key(await http.get("/v1/models", headers=headers))


async def test_a_key_in_the_query_opens_nothing(http: httpx.AsyncClient):
    assert is_refused_for_its_key(await http.get(f"/v1/models?api_key={KEY}&key={KEY}"))


TARGETS = [
    b"/v1/models",
    b"//v1/models",
    b"/v1//models",
    b"/v1/models/",
    b"/livez/../v1/models",
    b"/livez/%2e%2e/v1/models",
    b"/livez%2f..%2fv1/models",
    b"/livez%2F%2E%2E%2Fv1%2Fmodels",
    b"/livez;/v1/models",
    b"/livez/v1/models",
    b"/v1/models/livez",
    b"/v1/models?/livez",
    b"/v1/models#/livez",
    b"/v1%2fmodels",
    b"/%76%31/models",
    b"/V1/MODELS",
    b"/LIVEZ",
    b"/Livez",
    b"/livez/",
    b"/livez.",
    b"/livez/.",
    b"/./livez",
    b"//livez",
    b"///livez",
    b"/%6civez",
    b"/livez%00",
    b"/livez%00/v1/models",
    b"/livez%0d%0aX:1",
    b"/livez%20",
    b"/livez%3f",
    b"/livez\\..\\v1\\models",
    b"/healthz",
    b"/health/",
    b"/metrics",
    b"/openapi.json",
    b"http://localhost/v1/models",
    b"http://localhost//v1/models",
    b"http://livez/v1/models",
    b"http://user:pass@livez/metrics",
    b"http:///v1/models",
    b"/",
    b"//",
    b"/" + b"a" * 5000,
    b"/%ff%fe",
]
HOSTS = [b"localhost", b"livez", b"/livez", b"127.0.0.1/livez", b"x\r\nHost: livez", b"", b"livez?", b"http://localhost/livez", b"\xff"]


def raw_answer(address: tuple[str, int], request: bytes) -> tuple[int, bytes]:
    """Status and body of what comes back for these bytes."""
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: " in head
    return int(head.split()[1]), body


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_no_way_to_write_a_path_gets_around_the_key_on_a_real_port(address: tuple[str, int], method: bytes):
    for target in TARGETS:
        status, body = raw_answer(address, method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert status in (400, 401), target
        assert json.loads(body)["error"]["code"] == ("invalid_api_key" if status == 401 else None), target


def test_only_what_is_no_http_at_all_is_refused_for_anything_else_than_its_key(address: tuple[str, int]):
    unparsable = {
        target
        for target in TARGETS
        if raw_answer(address, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] != 401
    }

    assert unparsable == {b"http:///v1/models"}


def test_no_host_header_gets_around_the_key(address: tuple[str, int]):
    for host in HOSTS:
        status, _ = raw_answer(address, b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert status in (400, 401), host


@pytest.mark.parametrize("target", [b"/livez", b"/livez?verbose=1", b"http://anywhere/livez"])
def test_probes_answer_without_a_key_on_a_real_port(address: tuple[str, int], target: bytes):
    status, body = raw_answer(address, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert (status, json.loads(body)) == (200, {"status": "alive"})


def test_the_second_request_on_a_connection_needs_its_own_key(address: tuple[str, int]):
    host, port = address
    with httpx.Client(base_url=f"http://{host}:{port}") as http:
        assert http.get("/v1/models", headers=BEARER).status_code == 200
        assert is_refused_for_its_key(http.get("/v1/models"))
        assert http.get("/v1/models", headers=BEARER).status_code == 200


def test_a_client_with_a_large_body_and_a_wrong_key_still_reads_why(address: tuple[str, int]):
    host, port = address
    answer = httpx.post(f"http://{host}:{port}/v1/completions", content=b" " * 5_000_000, headers={"authorization": "Bearer wrong"})

    assert is_refused_for_its_key(answer)


async def test_every_key_is_a_tenant_of_its_own_whatever_user_the_body_names(http: httpx.AsyncClient, engine: FakeEngineClient):
    for key, user in ((KEY, "bob"), (KEY, None), (OTHER_KEY, "bob")):
        answer = await http.post(
            "/v1/completions", json={"prompt": [7], "max_tokens": 1, "user": user}, headers={"authorization": f"Bearer {key}"}
        )
        assert answer.status_code == 200

    first, second, third = (request.tenant for request in engine.submitted)
    assert first == second == "name:ann"
    assert third not in (first, "bob")
    assert OTHER_KEY not in third


@pytest.mark.parametrize("limits", [replace(Limits(), max_tenant_sequences=1)])
async def test_a_quota_counts_by_key(http: httpx.AsyncClient):
    body = {"prompt": [[7], [8]], "max_tokens": 1}

    refused = await http.post("/v1/completions", json=body | {"user": "a"}, headers=BEARER)

    assert refused.status_code == 400
    assert "one tenant of this server may hold 1" in refused.json()["error"]["message"]


@pytest.mark.parametrize("keys", [ApiKeys()])
async def test_without_keys_everything_is_open(http: httpx.AsyncClient):
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert (await http.get(path, headers={"authorization": "Bearer anything"})).status_code == 200
    assert (await http.get("/nowhere")).status_code == 404


@pytest.mark.parametrize("allowed_origins", [("https://app.example",)])
async def test_with_allowed_origins_a_browser_asks_for_leave_without_a_key_and_needs_one_for_the_rest(http: httpx.AsyncClient):
    origin = {"origin": "https://app.example"}
    wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}

    leave = await http.options("/v1/completions", headers=origin | wants)
    no_leave = await http.options("/v1/completions", headers={"origin": "https://evil.example"} | wants)
    refused = await http.get("/v1/models", headers=origin)
    taken = await http.get("/v1/models", headers=origin | BEARER)
    plain_options = await http.options("/v1/completions", headers=origin)

    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in leave.headers["access-control-allow-headers"].lower()
    assert (no_leave.status_code, no_leave.headers.get("access-control-allow-origin")) == (400, None)
    assert is_refused_for_its_key(refused)
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in taken.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in taken.headers
    assert is_refused_for_its_key(plain_options)


async def test_without_allowed_origins_no_page_is_let_in(http: httpx.AsyncClient):
    wants = {"origin": "https://app.example", "access-control-request-method": "POST"}

    for answer in (await http.options("/v1/completions", headers=wants), await http.get("/v1/models", headers=wants | BEARER)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_the_metrics_port_serves_metrics_alone(app: FastAPI):
    transport = httpx.ASGITransport(create_metrics_app(app.state.services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answers = {path: (await http.get(path)).status_code for path in ("/metrics", "/v1/models", "/openapi.json", "/")}
        large = await http.get("/metrics", headers={"x-big": "x" * 40_000})

    assert answers == {"/metrics": 200, "/v1/models": 404, "/openapi.json": 404, "/": 404}
    assert large.status_code == 431


async def test_with_a_metrics_port_the_other_has_none(engine: FakeEngineClient):
    app = create_app(client=engine, tokenizer=None, model=tiny_config(), model_name="tiny", has_metrics=False)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/metrics")).status_code == 404


def test_a_key_is_kept_as_its_digest_alone():
    keys = ApiKeys([ApiKey.of(KEY), ApiKey.of(OTHER_KEY)])

    assert len(keys) == 2
    assert KEY not in repr(keys) + repr(vars(keys))
    assert keys.tenant_of(KEY.encode()) != keys.tenant_of(OTHER_KEY.encode())
    assert keys.tenant_of(b"") is keys.tenant_of(b"\xff" * 30_000) is None


def test_all_keys_are_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch):
    compared: list[bytes] = []

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return left == right

    monkeypatch.setattr("server.api_keys.hmac.compare_digest", counting)
    keys = ApiKeys(ApiKey.of(key) for key in ("first", "second", "third"))

    for presented in (b"first", b"third", b"none", b""):
        compared.clear()
        keys.tenant_of(presented)
        assert len(compared) == 3


@pytest.mark.parametrize("text", ["", "secret,b", "secret b", "secretä", "secret\tb", "secret" * 86, "secret,"])
def test_what_no_header_can_carry_is_no_key_and_the_message_does_not_repeat_it(text: str):
    with pytest.raises(ValueError, match="visible ASCII") as caught:
        ApiKey.of(text)

    assert "secret" not in str(caught.value)


def test_a_file_holds_a_key_a_line_with_or_without_a_name(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n\n{KEY} ann\n  {OTHER_KEY}\nsk-third  ann \n")

    first, second, third = read_key_file(path)

    assert (first.tenant, third.tenant) == ("name:ann", "name:ann")
    assert second == ApiKey.of(OTHER_KEY)
    assert first.digest == ApiKey.of(KEY).digest


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "holds no key"), (b"# nothing\n\n", "holds no key"), (b"good\nsecr\xc3\xa9t\n", "line 2"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_wrong_file_of_keys_is_refused_by_line_and_without_the_key(tmp_path: Path, content: bytes, complaint: str):
    path = tmp_path / "keys"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=complaint) as caught:
        read_key_file(path)

    assert "secr" not in str(caught.value)
    assert "good" not in str(caught.value)


def test_a_missing_file_of_keys_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--api-key-file: cannot read .*no-such-file: No such file"):
        read_key_file(tmp_path / "no-such-file")


def test_a_file_that_everybody_may_read_is_known_for_that(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(KEY)
    path.chmod(0o640)
    assert not is_open_to_others(path)
    path.chmod(0o644)
    assert is_open_to_others(path)
