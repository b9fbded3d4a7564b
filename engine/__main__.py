"""`python -m engine --fd N` is the engine process; `server/supervisor.py` starts it with one end of a socket pair as descriptor N.

Two threads. The reader turns frames into messages; the end of the connection, at any time, ends the process at once, so that no engine
outlives its server, not even one that is loading or compiling; a stopped one, which sees nothing, is the kernel's (`die_with_parent`).
The main thread builds the engine and then runs the loop (`engine/engine_loop.py`): take what arrived, step, send the news. jax is imported
only when the options are here and the reader is watching.

The server takes silence for a hang, so something is said at least every `SIGN_OF_LIFE_S`: by the loop, which a hanging step keeps from it,
and before readiness by a thread of its own, because one tensor or program may take minutes.

A process that stands by gets `Prepare` first: it imports, and compiles where that takes no memory of a device, and waits for its time.
Until then it is what the kernel ends first where memory runs out.

The process ends in three ways: with its connection (status 0), because it cannot start for a reason that a restart does not cure (2, after
`Failed` with the reason), or by an unexpected exception, traceback on stderr (1; the supervisor starts another). Ctrl-C in the terminal and
a service manager's SIGTERM reach the whole process group and are ignored here: the server decides when to end.
"""

import argparse
import ctypes
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Never, Protocol

from engine.config import EngineConfig, EngineOptions
from engine.constraints import Grammars
from engine.engine_loop import SIGN_OF_LIFE_S, Core, EngineLoop
from engine.errors import DoesNotFitError, EngineError, TransportError
from engine.grammar import GrammarMatcher, GrammarTokenizer
from engine.heap import settle_heap, share_arenas
from engine.messages import (
    Configure,
    Deltas,
    Failed,
    Follow,
    FromServer,
    Prepare,
    Ready,
    Report,
    decode_from_server,
    encode,
)
from engine.transport import BlockingChannel
from engine.types import EngineStats, Progress

if TYPE_CHECKING:  # it imports jax
    from engine.programs import Programs

START_FAILED = 2
CRASHED = 1

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MOST_EXPENDABLE = 1000  # linux/oom.h


class Builder(Protocol):
    """What makes the core; `OnDevices` is the real one."""

    def prepare(self, options: EngineOptions, *, backend: str) -> None:
        """Do ahead what takes neither weights nor memory of the devices. Raises `EngineError` where `build` will."""
        ...

    def build(self, options: EngineOptions, report: Callable[[Progress], None]) -> Core:
        """Raises `EngineError` where it cannot be built."""
        ...

    def follow(self, message: Follow, report: Callable[[Progress], None]) -> Never:
        """Be led by another engine process from here on. Raises `EngineError` where that cannot be."""
        ...


def run_engine(channel: BlockingChannel, *, builder: Builder, on_disconnect: Callable[[], None]) -> int:
    """Build what `Configure` asks for and serve it until the connection ends; returns the exit status.

    `on_disconnect` is called in the reader's thread at the end of the connection, whatever the main thread is doing then.
    """
    inbox: queue.SimpleQueue[FromServer | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox, on_disconnect), name="reader", daemon=True).start()
    configure = inbox.get()
    if isinstance(configure, Prepare):
        with _first_to_go():
            with suppress(EngineError), _signs_of_life(channel):  # an error is told when it is built
                builder.prepare(configure.options, backend=configure.backend)
            settle_heap()
            configure = inbox.get()
    if configure is None:
        return 0
    if not isinstance(configure, Configure | Follow):
        raise TransportError(f"Configure comes first, found {type(configure).__name__}")
    try:
        with _signs_of_life(channel):
            report = partial(_report, channel)
            core = builder.build(configure.options, report) if isinstance(configure, Configure) else builder.follow(configure, report)
    except EngineError as error:
        channel.send(encode(Failed(str(error), plan=error.plan if isinstance(error, DoesNotFitError) else None)))
        return START_FAILED
    loop = EngineLoop(core, send=lambda message: channel.send(encode(message)))
    settle_heap()
    channel.send(encode(Ready(core.info)))
    while True:
        for message in _arrived(inbox, wait_s=0.0 if core.has_work else SIGN_OF_LIFE_S):
            if message is None:
                return 0
            loop.take(message)
        loop.turn()


class OnDevices:
    """Builds the real engine, together with the other processes where it is one of a group. Imports jax, which takes seconds.

    `on_lost` and `on_unable` end this process for its group, see `engine/group/start.py`.
    """

    def __init__(self, *, on_lost: Callable[[str], Never], on_unable: Callable[[str], Never]) -> None:
        self._on_lost = on_lost
        self._on_unable = on_unable
        self._programs: tuple[Programs, ...] | None = None  # compiled ahead
        self._grammars: Grammars | None = None  # loaded ahead

    def prepare(self, options: EngineOptions, *, backend: str) -> None:
        """On a CPU everything is compiled. An accelerator is not touched: its memory is the running engine's."""
        _prepare_environment(options)
        self._grammars = _load_grammars(options)
        from engine.build import compile_ahead

        if backend == "cpu" and options.group is None:
            self._programs = compile_ahead(_resolve(options))

    def build(self, options: EngineOptions, report: Callable[[Progress], None]) -> Core:
        _prepare_environment(options)
        from engine.build import build_engine

        grammars = self._grammars or _load_grammars(options)
        if options.group is None:
            return build_engine(_resolve(options), report=report, programs=self._programs, grammars=grammars)
        from engine.group.start import lead

        group, config = lead(options, report=report, on_lost=self._on_lost, on_unable=self._on_unable)
        try:
            return build_engine(config, report=report, grammars=grammars, group=group)
        except EngineError as error:
            group.dismiss(str(error))
            raise

    def follow(self, message: Follow, report: Callable[[Progress], None]) -> Never:
        _prepare_environment(message.options)
        from engine.group.start import follow

        follow(message, report=report, on_lost=self._on_lost, on_dismissed=self._on_unable)


def _load_grammars(options: EngineOptions) -> Grammars | None:
    """What compiles grammars for the model's tokens, where there is a tokenizer. Raises `TokenizerError`."""
    if options.tokenizer_path is None:
        return None
    model = options.model
    tokenizer = GrammarTokenizer.load(Path(options.tokenizer_path), vocab_size=model.vocab_size, eos_token=model.eos_token)
    return Grammars(partial(GrammarMatcher, tokenizer))


def _resolve(options: EngineOptions) -> EngineConfig:
    """The configuration for the devices that are here. Raises `DoesNotFitError` where their memory does not suffice."""
    from engine.memory_check import config_for, device_here

    return config_for(options, device_here(options))


def _prepare_environment(options: EngineOptions) -> None:
    """What jax reads from the environment at import. The operator's own settings win."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's informational lines
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{options.memory_share:.2f}")


def _read(channel: BlockingChannel, inbox: "queue.SimpleQueue[FromServer | None]", on_disconnect: Callable[[], None]) -> None:
    try:
        for payload in channel.payloads():
            inbox.put(decode_from_server(payload))
    except TransportError as error:
        print(f"engine: {error}", file=sys.stderr)
    inbox.put(None)
    on_disconnect()


@contextmanager
def _first_to_go() -> Iterator[None]:
    """On Linux, want of memory ends this process before any other while the context lasts: an engine is worth more than its standby."""
    score = Path("/proc/self/oom_score_adj")
    before = None
    with suppress(OSError):
        before = score.read_text()
        score.write_text(str(_MOST_EXPENDABLE))
    try:
        yield
    finally:
        with suppress(OSError):  # allowed down to where it was
            if before is not None:
                score.write_text(before)


@contextmanager
def _signs_of_life(channel: BlockingChannel) -> Iterator[None]:
    """Sent from a thread of their own as long as the context lasts: a slow start is not a hang, a stopped process is one."""
    is_over = threading.Event()

    def send() -> None:
        while not is_over.wait(SIGN_OF_LIFE_S):
            try:
                channel.send(encode(Deltas([], EngineStats())))
            except TransportError:  # the main thread's next report says so
                return

    sender = threading.Thread(target=send, name="signs of life", daemon=True)
    sender.start()
    try:
        yield
    finally:
        is_over.set()
        sender.join()


def _report(channel: BlockingChannel, progress: Progress) -> None:
    channel.send(encode(Report(progress)))


def _arrived(inbox: "queue.SimpleQueue[FromServer | None]", *, wait_s: float) -> Iterator[FromServer | None]:
    """Everything in the inbox now; where it is empty, the first message within `wait_s`."""
    try:
        yield inbox.get(timeout=wait_s) if wait_s else inbox.get_nowait()
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return


def die_with_parent() -> None:
    """On Linux, have the kernel kill this process at the end of the thread that started it (the server's main thread), even while stopped.

    A parent that was gone before this call shows as the end of the connection, as any parent does on other systems.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def _end_with_group(cause: str) -> Never:
    print(f"engine: {cause}", file=sys.stderr, flush=True)
    os._exit(CRASHED)


def _give_up(channel: BlockingChannel, reason: str) -> Never:
    channel.send(encode(Failed(reason)))
    os._exit(START_FAILED)


def main() -> None:
    """Ends the process itself, past interpreter shutdown, which would wait for threads of the runtime."""
    die_with_parent()
    share_arenas()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="python -m engine", description="The engine process; started by the server.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the connected socket to the server")
    channel = BlockingChannel(socket.socket(fileno=parser.parse_args().fd))
    try:
        builder = OnDevices(on_lost=_end_with_group, on_unable=partial(_give_up, channel))
        status = run_engine(channel, builder=builder, on_disconnect=lambda: os._exit(0))
    except BaseException:
        traceback.print_exc()
        status = CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
