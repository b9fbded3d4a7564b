"""Connections on a real port: how many, how fast, how much in advance; each bound at the cap and past it."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from fake_engine import HANG, FakeEngineClient, counting_script
from fastapi import FastAPI
from live_server import serve_in_thread

from engine.types import GenerationRequest, TokenDelta
from server.http_protocol import SPARE_CONNECTIONS, BoundedHttp, bounded_http
from server.limits import Limits

GET_MODELS = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
GET_LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def limited(**limits: float):
    """The server with these limits."""
    return pytest.mark.parametrize("limits", [replace(Limits(), keep_alive_s=0.05, **limits)])


def with_small_buffers(connection_class: type[BoundedHttp]) -> type[BoundedHttp]:
    """The same where the system keeps little of what a client does not read, so that a test need not send megabytes."""

    class WithSmallBuffers(connection_class):
        def connection_made(self, transport: asyncio.Transport) -> None:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
            super().connection_made(transport)

    return WithSmallBuffers


@pytest.fixture
def address(app: FastAPI, limits: Limits) -> Iterator[tuple[str, int]]:
    with serve_in_thread(app, http=with_small_buffers(bounded_http(limits))) as url:
        yield "127.0.0.1", httpx.URL(url).port or 0


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    """Connections that are closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield stack


def post(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def connect(address: tuple[str, int], opened: contextlib.ExitStack) -> socket.socket:
    return opened.enter_context(socket.create_connection(address, timeout=10))


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer with a declared length."""
    content = b""
    while b"\r\n\r\n" not in content:
        piece = connection.recv(65536)
        assert piece, f"closed after {content!r}"
        content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return int(status.split()[1]), headers, body


def ask(connection: socket.socket, request: bytes) -> int:
    """The status of the answer."""
    connection.sendall(request)
    return answer(connection)[0]


def is_closed(connection: socket.socket, *, within_s: float = 5.0) -> bool:
    """Whether the server ends the connection; what else it says is read on the way."""
    connection.settimeout(within_s)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def wait_until(condition) -> None:
    give_up = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


@limited(max_connections=3)
def test_connections_are_served_up_to_the_cap_and_refused_past_it(
    address: tuple[str, int], opened: contextlib.ExitStack, engine: FakeEngineClient
):
    engine.script = lambda _: [HANG]
    for number in range(3):
        connect(address, opened).sendall(post({"prompt": [7]}))
        wait_until(lambda number=number: engine.num_open == number + 1)

    past_it = connect(address, opened)
    past_it.sendall(post({"prompt": [7]}))
    status, headers, body = answer(past_it)

    assert status == 503
    assert json.loads(body)["error"]["code"] == "server_overloaded"
    assert headers["x-request-id"]
    assert (headers["retry-after"], headers["retry-after-ms"], headers["connection"]) == ("1", "1000", "close")
    assert is_closed(past_it)
    assert engine.num_open == 3


@limited(max_connections=2)
def test_probes_are_answered_where_all_connections_are_busy(
    address: tuple[str, int], opened: contextlib.ExitStack, engine: FakeEngineClient
):
    engine.script = lambda _: [HANG]
    busy = [connect(address, opened) for _ in range(2)]
    for connection in busy:
        connection.sendall(post({"prompt": [7]}))
    wait_until(lambda: engine.num_open == 2)

    probe = connect(address, opened)
    assert [ask(probe, GET_LIVEZ), ask(probe, GET_LIVEZ), ask(probe, GET_MODELS)] == [200, 200, 503]

    late = connect(address, opened)
    assert ask(late, GET_LIVEZ) == 200
    busy[0].close()
    wait_until(lambda: engine.num_open == 1)
    assert ask(late, GET_MODELS) == 200


@limited(max_connections=3)
def test_the_connection_that_waits_longest_for_a_request_makes_room(address: tuple[str, int], opened: contextlib.ExitStack):
    first, second, third = (connect(address, opened) for _ in range(3))
    for connection in (first, second, third, first):
        assert ask(connection, GET_MODELS) == 200

    newcomer = connect(address, opened)

    assert ask(newcomer, GET_MODELS) == 200
    assert is_closed(second)
    assert [ask(connection, GET_MODELS) for connection in (first, third, newcomer)] == [200, 200, 200]


@limited(max_connections=2)
def test_a_connection_with_half_a_head_makes_room_like_one_without(address: tuple[str, int], opened: contextlib.ExitStack):
    slow = [connect(address, opened) for _ in range(2)]
    for connection in slow:
        connection.sendall(b"GET /livez HTTP/1.1\r\nx-slow: ")

    assert ask(connect(address, opened), GET_MODELS) == 200
    assert is_closed(slow[0])


@limited(max_connections=1)
def test_of_too_many_spare_connections_the_oldest_goes(address: tuple[str, int], opened: contextlib.ExitStack, engine: FakeEngineClient):
    engine.script = lambda _: [HANG]
    connect(address, opened).sendall(post({"prompt": [7]}))
    wait_until(lambda: engine.num_open == 1)

    at_the_cap = [connect(address, opened) for _ in range(SPARE_CONNECTIONS)]
    assert {ask(connection, GET_LIVEZ) for connection in at_the_cap} == {200}
    past_it = connect(address, opened)

    assert ask(past_it, GET_LIVEZ) == 200
    assert is_closed(at_the_cap[0])
    assert ask(at_the_cap[1], GET_LIVEZ) == 200


@limited(max_pipelined=4)
def test_requests_are_taken_in_advance_up_to_the_limit_and_not_past_it(address: tuple[str, int], opened: contextlib.ExitStack):
    at_the_cap, past_it = connect(address, opened), connect(address, opened)

    at_the_cap.sendall(GET_MODELS * 5)
    statuses = b""
    while statuses.count(b"HTTP/1.1 200 OK") < 5:
        statuses += at_the_cap.recv(65536)
    past_it.sendall(GET_MODELS * 6)

    assert ask(at_the_cap, GET_MODELS) == 200
    assert is_closed(past_it)


def read_slowly(connection: socket.socket, *, pieces: int, piece_bytes: int, pause_s: float) -> bool:
    """False where the connection ended before so many pieces were read."""
    for _ in range(pieces):
        time.sleep(pause_s)
        num_left = piece_bytes
        while num_left:
            try:
                piece = connection.recv(num_left)
            except ConnectionError:
                return False
            if not piece:
                return False
            num_left -= len(piece)
    return True


LARGE = {"prompt": [7], "n": 4, "max_tokens": 240, "logprobs": 20, "stream": True}


def reader(address: tuple[str, int], opened: contextlib.ExitStack) -> socket.socket:
    """A connection whose system keeps little for a client that does not read."""
    connection = opened.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(address)
    return connection


@limited(write_timeout_s=0.3)
def test_an_answer_that_nobody_reads_ends_and_frees_what_it_runs(
    address: tuple[str, int], opened: contextlib.ExitStack, engine: FakeEngineClient, app: FastAPI
):
    engine.script = lambda request: [*counting_script(request)[:-1], HANG]
    deaf = reader(address, opened)
    deaf.sendall(post(LARGE))
    wait_until(lambda: engine.num_open)

    wait_until(lambda: app.state.services.admission.num_open == 0)

    assert engine.num_open == 0
    assert len(engine.aborted) == LARGE["n"]
    assert is_closed(deaf)


@limited(write_timeout_s=0.5)
def test_a_client_that_takes_enough_in_time_is_served_on(address: tuple[str, int], opened: contextlib.ExitStack, app: FastAPI):
    slow = reader(address, opened)
    slow.sendall(post(LARGE))

    assert read_slowly(slow, pieces=12, piece_bytes=20_000, pause_s=0.15)
    assert app.state.services.admission.num_open


@limited(max_discarded_bytes=200_000)
def test_what_follows_an_answer_is_read_up_to_the_limit_and_not_past_it(address: tuple[str, int], opened: contextlib.ExitStack):
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    at_the_cap, past_it = connect(address, opened), connect(address, opened)

    assert ask(at_the_cap, head % 200_000) == 404
    assert ask(past_it, head % 200_001) == 404
    at_the_cap.sendall(b"x" * 200_000)
    past_it.sendall(b"x" * 200_001)

    assert ask(at_the_cap, GET_MODELS) == 200
    assert is_closed(past_it)


@limited(body_timeout_s=0.3)
def test_what_follows_an_answer_too_slowly_ends_the_connection_without_a_second_answer(
    address: tuple[str, int], opened: contextlib.ExitStack
):
    connection = connect(address, opened)
    assert ask(connection, b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx") == 404

    rest = b""
    while piece := connection.recv(65536):
        rest += piece

    assert rest == b""


def test_a_connection_whose_body_came_after_the_answer_is_idle_like_any_other(app: FastAPI, opened: contextlib.ExitStack):
    with serve_in_thread(app, http=bounded_http(Limits()), timeout_keep_alive=0.3) as url:
        connection = connect(("127.0.0.1", httpx.URL(url).port or 0), opened)
        assert ask(connection, b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n") == 404
        connection.sendall(b"late")

        assert is_closed(connection, within_s=3)


def test_an_offer_of_another_protocol_is_answered_in_this_one(address: tuple[str, int], opened: contextlib.ExitStack):
    connection = connect(address, opened)
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"

    for request in (GET_MODELS, post({"prompt": [7], "max_tokens": 1})) * 2:
        assert ask(connection, request.replace(b"Host: x\r\n", b"Host: x\r\n" + offer)) == 200

    head, _, body = post({"prompt": [7], "max_tokens": 1}).replace(b"Host: x\r\n", b"Host: x\r\n" + offer).partition(b"\r\n\r\n")
    for piece in (head[:50], head[50:] + b"\r\n\r\n", body[:5]):
        connection.sendall(piece)
        time.sleep(0.02)
    assert ask(connection, body[5:]) == 200


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(256, 4096, 1000), (4096, 4096, 1000), (256, 628, 500), (128, 129, 1), (128, 128, None)],
)
def test_connections_stay_below_what_the_system_allows(soft: int, hard: int, expected: int | None):
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from engine.errors import ConfigError
from server.open_files import OTHER_FILES, connections_within
try:
    print(connections_within(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES)
except ConfigError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()

    if expected is None:
        assert result[:6] == ["the", "process", "may", "have", "128", "files"]
    else:
        assert int(result[0]) == expected
        assert int(result[1]) >= expected


def test_500_streams_opened_and_dropped_leave_tasks_files_and_places_where_they_were(
    address: tuple[str, int], engine: FakeEngineClient, app: FastAPI
):
    loops: set[asyncio.AbstractEventLoop] = set()

    def script(request: GenerationRequest) -> list[TokenDelta | float]:
        loops.add(asyncio.get_running_loop())
        return [counting_script(request)[0], HANG]

    def drop(count: int) -> None:
        with contextlib.ExitStack() as opened:
            for _ in range(count):
                connection = connect(address, opened)
                connection.sendall(post({"prompt": [7], "stream": True}))
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")

    def settled() -> tuple[int, int]:
        """Tasks and open files once nothing is open."""
        wait_until(lambda: not engine.num_open and app.state.services.admission.open == (0, 0))
        (loop,) = loops
        time.sleep(0.2)
        return len(asyncio.all_tasks(loop)), len(os.listdir("/proc/self/fd"))

    engine.script = script
    drop(50)
    before = settled()
    for _ in range(10):
        drop(50)

    assert settled() == before
    assert len(engine.aborted) == 550
