import socket
import struct
import threading

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TransportError
from engine.transport import (
    MAX_FRAME_BYTES,
    MAX_UNSENT_BYTES,
    PROTOCOL_VERSION,
    BlockingChannel,
    FrameParser,
    LoopbackChannel,
    open_channel,
    to_frame,
)

pytestmark = pytest.mark.anyio


class Recorder:
    """A frame handler that remembers."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.closed = anyio.Event()

    def frame_received(self, payload: bytes) -> None:
        self.payloads.append(payload)

    def channel_closed(self) -> None:
        assert not self.closed.is_set(), "closed twice"
        self.closed.set()


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_payloads_survive_any_cutting_of_the_stream(payloads, cuts):
    stream = b"".join(map(to_frame, payloads))
    parser = FrameParser()
    received, start = [], 0

    for cut in [*cuts, len(stream)]:
        received += parser.feed(stream[start : start + cut])
        start += cut

    assert received == payloads


def test_a_frame_of_another_version_is_refused_by_both_numbers():
    with pytest.raises(TransportError, match=f"version 9, this one {PROTOCOL_VERSION}"):
        FrameParser().feed(struct.pack("<BI", 9, 0))


def test_no_child_of_the_engine_can_keep_its_connection_open():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.set_inheritable(True)  # as it is handed to the engine

        BlockingChannel(theirs)

        assert not theirs.get_inheritable()


def test_a_length_over_the_limit_is_refused_before_its_bytes_come():
    with pytest.raises(TransportError, match="over the limit"):
        FrameParser().feed(struct.pack("<BI", PROTOCOL_VERSION, MAX_FRAME_BYTES + 1))


async def test_both_ends_of_a_socket_pair_exchange_frames_of_any_size():
    ours, theirs = socket.socketpair()
    recorder = Recorder()
    channel = await open_channel(ours, recorder)
    engine_end = BlockingChannel(theirs)
    sent = [b"", b"x", b"y" * 3_000_000, b"z"]
    seen_by_engine: list[bytes] = []

    def echo() -> None:
        for payload in engine_end.payloads():
            seen_by_engine.append(payload)
            engine_end.send(payload)

    thread = threading.Thread(target=echo)
    thread.start()
    for payload in sent:
        channel.send(payload)
    with anyio.fail_after(10):
        while len(recorder.payloads) < len(sent):
            await anyio.sleep(0.01)
    channel.close()
    await anyio.to_thread.run_sync(thread.join)
    engine_end.close()

    assert seen_by_engine == sent
    assert recorder.payloads == sent


async def test_the_end_of_the_engine_side_is_told_once():
    ours, theirs = socket.socketpair()
    recorder = Recorder()
    channel = await open_channel(ours, recorder)

    BlockingChannel(theirs).close()

    with anyio.fail_after(5):
        await recorder.closed.wait()
    channel.send(b"into the void")


async def test_an_unreadable_frame_closes_the_channel_and_is_logged_once(caplog):
    ours, theirs = socket.socketpair()
    recorder = Recorder()
    await open_channel(ours, recorder)

    theirs.sendall(b"GET / HTTP/1.1\r\n")

    with anyio.fail_after(5):
        await recorder.closed.wait()
    theirs.close()
    (line,) = caplog.messages
    assert line.startswith("the connection to the engine is closed: the other process speaks protocol version 71, this one 1;")


def test_a_reader_that_takes_nothing_holds_the_writer_for_a_bounded_time():
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs, send_timeout_s=0.2)

    with pytest.raises(TransportError, match="stopped reading"):
        channel.send(bytes(8 << 20))

    ours.close()
    channel.close()


def test_writing_to_a_reader_that_is_gone_does_not_raise():
    ours, theirs = socket.socketpair()
    ours.close()
    channel = BlockingChannel(theirs)

    channel.send(b"hello")

    assert list(channel.payloads()) == []
    channel.close()


async def test_the_loopback_moves_nothing_until_asked_and_keeps_order():
    one, other = LoopbackChannel.pair()
    one.handler, other.handler = Recorder(), Recorder()
    for payload in (b"a", b"b", b"c"):
        one.send(payload)

    assert other.handler.payloads == []
    assert other.deliver(2) == 2
    assert other.handler.payloads == [b"a", b"b"]

    one.close()

    assert other.num_arrived == 0
    assert one.handler.closed.is_set()
    assert other.handler.closed.is_set()


async def test_a_channel_is_congested_while_the_other_side_does_not_read():
    ours, theirs = socket.socketpair()
    with theirs:
        channel = await open_channel(ours, Recorder())
        payload = bytes(MAX_UNSENT_BYTES // 4)
        num_sent = 0

        while not channel.is_congested:
            channel.send(payload)
            num_sent += 1

        assert 4 <= num_sent <= 40
        theirs.settimeout(10)
        num_read = 0
        while num_read < num_sent * len(to_frame(payload)):
            num_read += len(await anyio.to_thread.run_sync(theirs.recv, 1 << 20))
        assert not channel.is_congested
        channel.close()
