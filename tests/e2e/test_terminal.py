"""`grok-server complete` and `grok-server chat` as a user and a pipe see them."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngineClient, tiny_config
from live_server import serve_in_thread
from pseudo_terminal import CTRL_C, CTRL_D, PseudoTerminal, at_terminal
from scripted_server import DONE, ScriptedServer, chat_event, completion_event, error_event
from server_process import COMPILE_CACHE
from tiny_tokenizer import tiny_tokenizer

from server.app import create_app
from server.own_server import OwnServer

COMMAND = (sys.executable, "-m", "server")
SMALL = {
    "MAX_MODEL_LEN": "64",
    "MAX_NUM_SEQS": "1",
    "MAX_NUM_BATCHED_TOKENS": "16",
    "MAX_LOGPROBS": "0",
    "KV_CACHE_MEMORY_BYTES": "4MiB",
    "COMPILE_CACHE_DIR": str(COMPILE_CACHE),
}


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("GROK_SERVER_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def run(*arguments: str, stdin: str | bytes = b"", **environment: str) -> "subprocess.CompletedProcess[str]":
    content = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([*COMMAND, *arguments], input=content, capture_output=True, timeout=60, env=os.environ | environment)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextmanager
def scripted(**options: object) -> Iterator[tuple[ScriptedServer, str]]:
    server = ScriptedServer(**options)  # pyright: ignore[reportArgumentType]
    with serve_in_thread(server.app()) as url:
        yield server, url


@contextmanager
def real_app(*, pause_s: float = 0.0) -> Iterator[tuple[FakeEngineClient, str]]:
    engine = FakeEngineClient(pause_s=pause_s)
    with serve_in_thread(create_app(client=engine, tokenizer=tiny_tokenizer(), model=tiny_config(), model_name="tiny")) as url:
        yield engine, url


def num_running(url: str) -> int:
    """Generations in the engine, as the server's metrics tell."""
    (count,) = re.findall(r"^grok:num_requests_running (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return int(float(count))


def eventually(condition: Callable[[], object], *, within_s: float = 30.0) -> None:
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def one_line_of(result: "subprocess.CompletedProcess[str]") -> str:
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# what a pipe gets


@pytest.mark.parametrize(("arguments", "stdin"), [(("Once upon",), ""), (("-",), "Once upon"), ((), "Once upon\n")])
def test_a_pipe_gets_the_text_and_nothing_else(arguments: tuple[str, ...], stdin: str):
    with scripted() as (server, url):
        result = run("complete", *arguments, "--url", url, stdin=stdin)

    assert (result.returncode, result.stdout, result.stderr) == (0, "Hello world", "")
    assert server.bodies == [{"prompt": "Once upon", "max_tokens": 256, "stream": True}]


def test_only_what_is_asked_for_is_sent_and_the_prompt_echoed_on_demand():
    options = ["--max-tokens", "5", "--temperature", "0", "--top-p", "0.5", "--seed", "3", "--stop", "a", "--stop", "b", "--model", "m"]
    with scripted() as (server, url):
        result = run("complete", "Once", *options, "--echo", "--url", f"{url}/v1/")

    assert result.stdout == "OnceHello world"
    sent = {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "seed": 3, "stop": ["a", "b"], "model": "m"}
    assert server.bodies == [{"prompt": "Once", "stream": True, **sent}]


def test_a_chat_in_a_pipe_is_one_question_and_its_answer():
    with scripted(chunks=[chat_event(""), chat_event("Hi"), DONE]) as (server, url):
        result = run("chat", "--system", "Be brief.", "--url", url, stdin="Hello?\nAnybody?\n")

    assert (result.returncode, result.stdout, result.stderr) == (0, "Hi", "")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?\nAnybody?"}]
    assert server.bodies == [{"messages": messages, "stream": True}]


def test_the_stream_is_read_as_events_whatever_its_pieces_and_characters():
    events = b"".join(
        [
            b": keep-alive\n\n",
            completion_event("a\u2028b\x85c\x1bd\n"),
            b"event: x\r\n",
            completion_event("é").replace(b"\n", b"\r\n"),
            DONE,
        ]
    )
    with scripted(chunks=[events[at : at + 7] for at in range(0, len(events), 7)]) as (_, url):
        result = run("complete", "x", "--url", url, PYTHONUTF8="1")

    assert result.stdout == "a\u2028b\x85c\x1bd\né"


@pytest.mark.parametrize(
    ("environment", "sent"),
    [
        ({}, None),
        ({"GROK_SERVER_API_KEY": "one,two", "OPENAI_API_KEY": "three"}, "Bearer one"),
        ({"OPENAI_API_KEY": "three"}, None),  # that is somebody else's, and whoever listens here could read it
    ],
)
def test_url_and_key_may_come_from_the_environment(environment: dict[str, str], sent: str | None):
    with scripted() as (server, url):
        result = run("complete", "x", GROK_SERVER_URL=url, **environment)

    assert result.returncode == 0
    assert server.headers[0].get("authorization") == sent


def test_no_proxy_stands_before_a_server_of_this_machine():
    with scripted() as (_, url):
        result = run("complete", "x", "--url", url, HTTP_PROXY="http://192.0.2.1:9", ALL_PROXY="http://192.0.2.1:9")

    assert result.stdout == "Hello world"


def test_a_server_that_still_loads_is_waited_for():
    with scripted(refusals=[(503, "model_loading")]) as (server, url):
        result = run("complete", "x", "--url", url)

    assert (result.returncode, result.stdout, result.stderr) == (0, "Hello world", "")
    assert len(server.bodies) == 2


def test_a_reader_that_goes_away_ends_the_generation_without_a_word():
    with scripted(chunks=[completion_event("word ")] * 200, pause_s=0.05) as (server, url):
        command = f"{sys.executable} -m server complete x --url {url} | head -c 5; echo ${{PIPESTATUS[0]}}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        eventually(lambda: server.num_left == 1)

    assert result.stdout == "word 141\n"
    assert result.stderr == ""


@pytest.mark.parametrize(("output", "told", "status"), [(">/dev/full", "No space left on device", 1), (">&-", "stdout is closed", 2)])
def test_a_text_that_cannot_be_written_is_one_line(output: str, told: str, status: int):
    with scripted(chunks=[completion_event("word")]) as (_, url):
        command = f"exec {sys.executable} -m server complete x --url {url} {output}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)

    assert told in one_line_of(result)
    assert result.returncode == status


# what goes wrong is one line with the way out


def test_no_server_at_the_url_is_one_line_and_status_2():
    url = f"http://127.0.0.1:{free_port()}"

    result = run("complete", "x", "--url", url)

    assert result.returncode == 2
    assert f"no server answers at {url}" in one_line_of(result)
    assert "grok-server serve" in result.stderr


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://[::1", "http://localhost:http"])
def test_what_is_no_url_is_one_line_and_status_2(url: str):
    result = run("complete", "x", "--url", url)

    assert result.returncode == 2
    assert "--url" in one_line_of(result)


@pytest.mark.parametrize(
    ("status", "code", "told", "exit_status"),
    [
        (401, "invalid_api_key", "--api-key", 2),
        (400, "context_length_exceeded", "refused with context_length_exceeded", 2),
        (429, "rate_limit_exceeded", "try again", 2),
        (503, "server_overloaded", "refused with server_overloaded", 1),
        (400, "\x1b]0;mine\x07", "refused with ␛]0;mine␇", 2),
    ],
)
def test_a_refusal_is_one_line_with_its_status(status: int, code: str, told: str, exit_status: int):
    with scripted(refusals=[(status, code)]) as (_, url):
        result = run("chat", "--url", url, stdin="hello")

    assert result.returncode == exit_status
    assert told in one_line_of(result)
    assert result.stdout == ""


def test_a_context_that_is_too_long_says_how_long():
    with real_app() as (_, url):
        result = run("complete", "word " * 300, "--url", url)

    assert result.returncode == 2
    assert all(told in one_line_of(result) for told in ("256", "shorten the prompt", "max_tokens"))


def test_a_stream_that_fails_or_breaks_is_one_line_and_status_1():
    with scripted(chunks=[completion_event("begun"), error_event("the engine ended")]) as (server, url):
        failed = run("complete", "x", "--url", url)
        server.chunks = [completion_event("begun")]
        broken = run("complete", "x", "--url", url)

    assert (failed.returncode, failed.stdout) == (broken.returncode, broken.stdout) == (1, "begun")
    assert "the engine ended" in one_line_of(failed)
    assert "in the middle" in one_line_of(broken)


def test_another_program_at_the_url_is_told_apart():
    with scripted() as (_, url):
        result = run("complete", "x", "--url", f"{url}/elsewhere")

    assert result.returncode == 2
    assert "answered 404" in one_line_of(result)


@pytest.mark.parametrize(("arguments", "stdin", "told"), [((), b"\xff\xfe", "UTF-8"), (("-",), b"x" * (16 * 1024 * 1024 + 1), "more than")])
def test_what_is_no_prompt_is_told_before_any_server_is_asked(arguments: tuple[str, ...], stdin: bytes, told: str):
    result = run("complete", *arguments, stdin=stdin)

    assert result.returncode == 2
    assert told in one_line_of(result)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("\udcff",), "no UTF-8 text"), (("x", "--api-key", "ключ"), "--api-key"), (("x", "--api-key", "a\nb"), "--api-key")],
)
def test_what_no_request_can_carry_is_one_line_and_status_2(arguments: tuple[str, ...], told: str):
    with scripted() as (server, url):
        result = run("complete", *arguments, "--url", url, PYTHONUTF8="1")

    assert result.returncode == 2
    assert told in one_line_of(result)
    assert server.bodies == []


def test_keys_that_are_no_character_of_the_terminal_do_not_end_a_chat():
    with scripted(chunks=[chat_event("Fine."), DONE]) as (server, url), chatting(url) as terminal:
        os.write(terminal.keyboard, b"a\xff\n")
        terminal.wait_for("Fine.")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)

        assert terminal.wait() == 0
    assert server.bodies[0]["messages"][0]["content"] == "a\ufffd"


def test_an_empty_message_is_one_line_and_status_2():
    result = run("chat", stdin="\n")

    assert result.returncode == 2
    assert "stdin is empty" in one_line_of(result)


def test_at_a_terminal_no_text_is_one_line_and_status_2():
    with at_terminal(*COMMAND, "complete") as terminal:
        terminal.wait_for("error: there is nothing to continue")

        assert terminal.wait() == 2


# at a terminal


def test_ctrl_c_ends_a_completion_and_its_generation_with_status_130():
    with (
        real_app(pause_s=0.05) as (engine, url),
        at_terminal(*COMMAND, "complete", "Once", "--max-tokens", "200", "--url", url) as terminal,
    ):
        eventually(lambda: num_running(url) == 1 and terminal.shown)

        terminal.type(CTRL_C)

        assert terminal.wait() == 130
        eventually(lambda: num_running(url) == 0)
        assert (len(engine.aborted), engine.finished) == (1, [])
        assert "Traceback" not in terminal.shown


def test_ctrl_c_before_the_first_token_ends_it_too():
    with real_app(pause_s=30) as (engine, url), at_terminal(*COMMAND, "complete", "Once", "--max-tokens", "9", "--url", url) as terminal:
        eventually(lambda: engine.num_open == 1)

        terminal.type(CTRL_C)

        assert terminal.wait() == 130
        eventually(lambda: engine.num_open == 0)


def test_what_could_command_a_terminal_is_shown_as_a_picture():
    with (
        scripted(chunks=[completion_event("\x1b]0;mine\x07a\tb\x9b1m\r\n"), DONE]) as (_, url),
        at_terminal(*COMMAND, "complete", "x", "--url", url) as terminal,
    ):
        assert terminal.wait() == 0

    assert terminal.shown == "␛]0;mine␇a\tb\ufffd1m␍\r\n"


@contextmanager
def chatting(url: str, *arguments: str) -> Iterator[PseudoTerminal]:
    with at_terminal(*COMMAND, "chat", "--url", url, *arguments) as terminal:
        terminal.wait_for("> ")
        yield terminal


def test_ctrl_c_stops_an_answer_and_not_the_chat_which_goes_on_with_what_was_said():
    with (
        scripted(chunks=[chat_event("word "), chat_event("two"), *[chat_event(" more")] * 200], pause_s=0.05) as (server, url),
        chatting(url) as terminal,
    ):
        terminal.type("Hello\n")
        terminal.wait_for("word ")
        terminal.type(CTRL_C)
        terminal.wait_for("\n> ")
        eventually(lambda: server.num_left == 1)
        server.chunks, server.pause_s = [chat_event("Fine."), DONE], 0.0

        terminal.type("And now?\n")
        terminal.wait_for("Fine.")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)

        assert terminal.wait() == 0
    first, answer, second = server.bodies[1]["messages"]
    assert (first, second) == ({"role": "user", "content": "Hello"}, {"role": "user", "content": "And now?"})
    assert answer["role"] == "assistant"
    assert answer["content"].startswith("word ")


def test_ctrl_c_in_a_chat_ends_the_generation_in_the_server():
    with real_app(pause_s=0.05) as (engine, url), chatting(url) as terminal:
        for number in (1, 2):
            terminal.type("Hello\n")
            terminal.wait_for("Hello\r\n")
            eventually(lambda: num_running(url) == 1)
            terminal.type(CTRL_C)
            terminal.wait_for("\n> ")
            eventually(lambda: num_running(url) == 0)
            assert len(engine.aborted) == number

        terminal.type("/exit\n")

        assert terminal.wait() == 0


def type_and_drop(terminal: PseudoTerminal, text: str) -> None:
    """Ctrl-C at the prompt, once the keys before it show that the prompt reads keys: between writing it and that, Python may miss one."""
    terminal.type(text)
    terminal.wait_for(text)
    terminal.type(CTRL_C)


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not():
    with scripted(chunks=[chat_event("Fine."), DONE]) as (_, url), chatting(url) as terminal:
        type_and_drop(terminal, "half a li")
        terminal.wait_for("again leaves")
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Fine.")
        terminal.wait_for("> ")

        type_and_drop(terminal, "x")
        terminal.wait_for("again leaves")
        terminal.wait_for("> ")
        type_and_drop(terminal, "y")

        assert terminal.wait() == 0


def test_commands_of_the_chat():
    with scripted(chunks=[chat_event("Fine."), DONE]) as (server, url), chatting(url, "--system", "Be brief.") as terminal:
        for typed, shown in (
            ("One\n", "Fine."),
            ("\n", ""),
            ("/help\n", "/clear forgets"),
            ("/nonsense\n", "is no command"),
            ("/clear\n", "forgotten"),
            ("/etc is what?\n", "Fine."),
        ):
            terminal.type(typed)
            terminal.wait_for(shown)
            terminal.wait_for("\n> ")

        terminal.type("/exit\n")

        assert terminal.wait() == 0
    system = {"role": "system", "content": "Be brief."}
    assert [body["messages"] for body in server.bodies] == [
        [system, {"role": "user", "content": text}] for text in ("One", "/etc is what?")
    ]


def test_an_error_in_a_chat_is_a_line_and_its_message_is_forgotten():
    with (
        scripted(chunks=[chat_event("Fine."), DONE], refusals=[(400, "context_length_exceeded")]) as (server, url),
        chatting(url) as terminal,
    ):
        terminal.type("One\n")
        terminal.wait_for("error: refused with context_length_exceeded")
        terminal.wait_for("> ")
        terminal.type("Two\n")
        terminal.wait_for("Fine.")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)

        assert terminal.wait() == 0
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "Two"}]


def test_lines_of_earlier_chats_can_be_had_again_by_their_user_alone(tmp_path: Path):
    up = "\x1b[A"
    with scripted(chunks=[chat_event("Fine."), DONE]) as (server, url):
        for typed in ("Remember me\n", f"{up}\n"):
            with chatting(url) as terminal:
                terminal.type(typed)
                terminal.wait_for("Fine.")
                terminal.wait_for("> ")
                terminal.type(CTRL_D)
                assert terminal.wait() == 0

    assert [body["messages"][-1]["content"] for body in server.bodies] == ["Remember me"] * 2
    history = tmp_path / "state" / "grok-server" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0


# a server of its own


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROK_SERVER_PORT", str(free_port()))
    for name, value in SMALL.items():
        monkeypatch.setenv(f"GROK_SERVER_{name}", value)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_server")
def test_with_no_server_one_is_started_shown_and_ended():
    with at_terminal(*COMMAND, "complete", "Once upon a time", "--max-tokens", "40", "--seed", "1", TERM="xterm") as terminal:
        terminal.wait_for("starting one for the time being")
        terminal.wait_for("%")
        eventually(lambda: len(descendants(terminal.process.pid)) >= 2, within_s=60)  # the server and its engine
        pids = descendants(terminal.process.pid)

        assert terminal.wait(within_s=200) == 0, terminal.shown
        text = terminal.shown.rpartition("\x1b[")[2]
        assert len(re.findall(r"[a-z]+", text)) > 10
        assert not any(map(is_running, pids))


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_server")
def test_an_own_server_takes_nobody_elses_requests():
    with OwnServer(model=None) as own:
        statuses = [httpx.get(f"{own.url}/v1/models", headers=headers).status_code for headers in ({}, {"x-api-key": own.api_key})]

    assert statuses == [401, 200]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_server")
def test_a_killed_client_leaves_no_server_and_no_engine_behind():
    with at_terminal(*COMMAND, "chat") as terminal:
        eventually(lambda: len(descendants(terminal.process.pid)) >= 2, within_s=60)  # the server and its engine
        pids = descendants(terminal.process.pid)

        terminal.process.kill()

        eventually(lambda: not any(map(is_running, pids)))


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_server")
def test_ctrl_c_while_the_own_server_starts_ends_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GROK_SERVER_COMPILE_CACHE_DIR", str(tmp_path))  # so that it is not ready before the key comes
    monkeypatch.setenv("GROK_SERVER_MAX_NUM_BATCHED_TOKENS", "256")
    with at_terminal(*COMMAND, "complete", "x", "--max-tokens", "8") as terminal:
        eventually(lambda: len(descendants(terminal.process.pid)) >= 2, within_s=60)
        pids = descendants(terminal.process.pid)

        terminal.type(CTRL_C)

        assert terminal.wait(within_s=30) == 130, terminal.shown
        assert not any(map(is_running, pids))
        assert "Traceback" not in terminal.shown


@pytest.mark.usefixtures("no_server")
def test_an_own_server_that_cannot_start_says_why_in_one_line():
    result = run("complete", "x", "--model", "/does/not/exist")

    assert result.returncode == 2
    assert "/does/not/exist is not a directory" in one_line_of(result)
