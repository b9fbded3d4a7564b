"""`grok-server complete` and `grok-server chat`: text in a terminal, from a server that runs or from one for the time being.

Ctrl-C ends a generation, by closing its connection, and not the program: `complete` ends in its own order with status 130, `chat` is back
at its prompt. What comes from the model is made harmless for a terminal; a pipe gets the text as it is and nothing else. Reaching a server
is `server/remote.py`'s work, having one `server/own_server.py`'s.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from server.own_server import OwnServer
from server.remote import Remote, RemoteError, harmless
from server.settings import ENV_PREFIX

USUAL_PORT = 8000
PROBE_TIMEOUT_S = 1.0
MAX_INPUT_BYTES = 16 * 1024 * 1024
MAX_HISTORY_LINES = 1000
INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 128 + signal.SIGPIPE
HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this."


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What both commands are told: which server, as whom, and the fields of a request that were given."""

    url: str | None
    api_key: str | None
    model: str | None
    fields: Mapping[str, Any]


def complete(asked: Asked, text: str | None, *, is_echoed: bool) -> int:
    """Continue `text`, or stdin where it is `-` or None. Returns the exit status; raises `EngineError` with one line."""
    _check_has_output()
    prompt = read_stdin() if text == "-" or (text is None and not _has_user()) else text
    if prompt is None:
        raise RemoteError('there is nothing to continue: give a text, as in grok-server complete "Once upon a time", or pipe one in')
    screen = Screen()

    def run() -> int:
        with reached(asked) as (remote, fields):
            if is_echoed:
                screen.write(prompt)
            return INTERRUPTED if show(remote.completion({**fields, "prompt": prompt}), screen).was_interrupted else 0

    return _until_interrupted(run)


def chat(asked: Asked, *, system: str | None) -> int:
    """Talk until the user leaves; where no user sits at a terminal, answer what is piped in. Otherwise like `complete`."""
    _check_has_output()
    is_interactive = _has_user() and sys.stdout.isatty()
    message = None if is_interactive else read_stdin()
    if message is not None and not message.strip():
        raise RemoteError("there is nothing to answer: stdin is empty; pipe a message in, or chat at a terminal")

    def run() -> int:
        with reached(asked) as (remote, fields):
            talk = Talk(remote, fields, system=system)
            if message is None:
                talk.run()
                return 0
            return INTERRUPTED if talk.answer(message).was_interrupted else 0

    return _until_interrupted(run)


class Screen:
    """stdout, as far as text of a model goes there."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._is_line_open = False
        if reconfigure := getattr(sys.stdout, "reconfigure", None):
            reconfigure(errors="replace")  # characters that this terminal's encoding has not

    def write(self, text: str) -> None:
        if text:
            try:
                sys.stdout.write(harmless(text) if self.is_terminal else text)
                sys.stdout.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                _write_nowhere()
                raise RemoteError(f"the text cannot be written: {error.strerror}", exit_status=1) from None
            self._is_line_open = not text.endswith("\n")

    def took_keys(self) -> None:
        """The terminal itself has written `^C`."""
        self._is_line_open = True

    def end_line(self) -> None:
        """What is written next begins on a line of its own; in a pipe nothing is added."""
        if self.is_terminal and self._is_line_open:
            self.write("\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What of an answer was written."""

    text: str
    was_interrupted: bool


class Talk:
    """A conversation and its prompt. The whole of it is sent each time; an answer that was stopped counts as far as it came."""

    def __init__(self, remote: Remote, fields: Mapping[str, Any], *, system: str | None) -> None:
        self._remote = remote
        self._fields = fields
        self._screen = Screen()
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def run(self) -> None:
        """Prompt and answer until the user leaves."""
        print(HELP)
        can_leave = False
        for line in lines_with_history():
            if line is None:
                if can_leave:
                    return
                can_leave = True
                print("Ctrl-C again leaves.")
                continue
            can_leave = False
            match line.split():
                case []:
                    continue
                case ["/exit"]:
                    return
                case ["/clear"]:
                    self._messages = list(self._opening)
                    print("The conversation is forgotten.")
                case ["/help"]:
                    print(HELP)
                case [command] if command.startswith("/"):
                    print(f"{command} is no command. {HELP}")
                case _:
                    try:
                        self.answer(line)
                    except RemoteError as error:
                        print(f"error: {error}", file=sys.stderr)

    def answer(self, message: str) -> Shown:
        """Say `message`, show the answer, remember both; a message without any answer is forgotten. Raises `RemoteError`."""
        messages = [*self._messages, {"role": "user", "content": message}]
        shown = show(self._remote.chat({**self._fields, "messages": messages}), self._screen)
        if shown.text:
            self._messages = [*messages, {"role": "assistant", "content": shown.text}]
        return shown


@contextmanager
def reached(asked: Asked) -> Generator[tuple[Remote, dict[str, Any]]]:
    """A server and the fields to send it: the one that is named or runs at the usual address, else one of our own.

    For a server that runs, the model is a name it knows; for our own it is a directory.
    """
    usual_url = f"http://127.0.0.1:{os.environ.get(f'{ENV_PREFIX}PORT') or USUAL_PORT}"
    if asked.url is not None or _listens(usual_url):
        api_key = (asked.api_key or "").partition(",")[0].strip() or None  # of a server's own setting, which may hold several
        remote = Remote(asked.url or usual_url, api_key=api_key, waiting=_say_waiting)
        yield remote, {**asked.fields, **({"model": asked.model} if asked.model else {})}
        return
    with OwnServer(model=Path(asked.model) if asked.model else None) as own:
        yield Remote(own.url, api_key=own.api_key), dict(asked.fields)


def show(pieces: Generator[str], screen: Screen) -> Shown:
    """Write an answer as it comes, until its end or Ctrl-C. Raises `RemoteError`."""
    written: list[str] = []
    was_interrupted = False
    with _one_interrupt():
        try:
            with closing(pieces):
                for piece in pieces:
                    screen.write(piece)
                    written.append(piece)
        except KeyboardInterrupt:
            was_interrupted = True
            screen.took_keys()
        finally:
            screen.end_line()
    return Shown(text="".join(written), was_interrupted=was_interrupted)


def read_stdin() -> str:
    """All of it as one text, without the line feed that ends it. Raises `RemoteError` where that cannot be a prompt."""
    content = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(content) > MAX_INPUT_BYTES:
        raise RemoteError(f"stdin has more than {MAX_INPUT_BYTES:,} bytes, which no model takes")
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise RemoteError("stdin is no UTF-8 text") from None


def lines_with_history() -> Iterator[str | None]:
    """What the user types, until Ctrl-D; None for Ctrl-C. Lines can be edited, and those of earlier conversations be had again."""
    keep = _line_editing()
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="replace")  # a terminal may be set to another encoding
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            yield None
            continue
        keep()
        yield line


def _line_editing() -> Callable[[], None]:
    """Turn it on where this Python has it. Returns what keeps the lines so far, in a file for the user's eyes alone."""
    try:
        import readline

        path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "grok-server" / "chat_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.set_history_length(MAX_HISTORY_LINES)
        readline.read_history_file(path)
    except (ImportError, OSError, RuntimeError):
        return lambda: None

    def keep() -> None:
        with suppress(OSError):  # a full disk costs the history alone
            readline.write_history_file(path)

    return keep


@contextmanager
def _one_interrupt() -> Generator[None]:
    """The first Ctrl-C interrupts what runs here; those that follow at once are the same wish."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _until_interrupted(run: Callable[[], int]) -> int:
    """The status that `run` returns, or that of a program whose user pressed Ctrl-C, or whose output nobody reads any more."""
    try:
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _write_nowhere()
        return READER_GONE


def _write_nowhere() -> None:
    """The interpreter's last flush, too."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _has_user() -> bool:
    """Whether somebody sits at stdin, which may be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def _check_has_output() -> None:
    if sys.stdout is None:
        raise RemoteError("stdout is closed: there is nowhere to write a text")


def _listens(url: str) -> bool:
    try:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=PROBE_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def _say_waiting() -> None:
    if sys.stderr.isatty():
        print("The server still loads its model; waiting for it.", file=sys.stderr)
