"""What a process says that stands by."""

import socket
import threading
from collections.abc import Callable

from fake_core import FakeCore, engine_options, options_info

from engine.__main__ import run_engine
from engine.config import EngineOptions
from engine.messages import Configure, Deltas, FromEngine, Prepare, Ready, decode_from_engine, encode
from engine.transport import BlockingChannel, FrameParser, to_frame
from engine.types import Progress


class SlowBuilder:
    """Prepares until it is told to stop."""

    def __init__(self) -> None:
        self.may_stop = threading.Event()

    def prepare(self, options: EngineOptions, *, backend: str) -> None:  # noqa: ARG002
        assert self.may_stop.wait(30)

    def build(self, options: EngineOptions, report: Callable[[Progress], None]) -> FakeCore:  # noqa: ARG002
        return FakeCore(options_info(options))


def heard(ours: socket.socket, parser: FrameParser) -> list[FromEngine]:
    return [decode_from_engine(payload) for payload in parser.feed(ours.recv(1 << 16))]


def test_one_that_becomes_the_engine_while_it_still_compiles_says_that_it_lives() -> None:
    ours, theirs = socket.socketpair()
    parser, builder = FrameParser(), SlowBuilder()
    engine = threading.Thread(
        target=run_engine, args=(BlockingChannel(theirs),), kwargs={"builder": builder, "on_disconnect": lambda: None}
    )
    engine.start()
    ours.settimeout(30)

    ours.sendall(to_frame(encode(Prepare(engine_options(), "cpu"))) + to_frame(encode(Configure(engine_options()))))
    first = [*heard(ours, parser), *heard(ours, parser)]
    builder.may_stop.set()
    last = heard(ours, parser)
    while not any(isinstance(message, Ready) for message in last):
        last += heard(ours, parser)
    ours.close()
    engine.join(30)

    assert {type(message) for message in first} == {Deltas}
    assert not engine.is_alive()
