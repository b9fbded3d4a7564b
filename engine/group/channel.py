"""One connection between two engine processes of a group: frames over TCP, and silence that counts as an end.

Each side says at least a `Beat` a second, from a thread of its own; who hears nothing for `silence_s` takes the other for dead, stopped or
cut off. Frames are cut as `engine/transport.py` cuts them. The connection is neither encrypted nor authenticated: it is for a private
network. What arrives is bounded in size and decoded by type.
"""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

from engine.errors import TransportError
from engine.group.messages import Beat, encode
from engine.transport import FrameParser, to_frame

BEAT_S = 1.0
SILENCE_S = 6.0  # once a group serves
START_SILENCE_S = 30.0  # before: importing the runtime from a cold disk stalls every thread
LOOK_S = 0.5  # at how long it is silent already; a shorter limit takes effect by then
CONNECT_PAUSE_S = 0.2

_RECEIVE_BYTES = 256 << 10
_BEAT = encode(Beat())


class GroupChannel:
    """One thread iterates over `payloads`, any thread sends; `keep_beating` starts a thread that beats."""

    def __init__(self, sock: socket.socket, *, max_frame_bytes: int, silence_s: float = START_SILENCE_S) -> None:
        """`max_frame_bytes` bounds what the other side may send."""
        self.peer = str(sock.getpeername()[0])
        self._socket = sock
        self._parser = FrameParser(max_frame_bytes=max_frame_bytes)
        self._sending = threading.Lock()
        self._is_closed = threading.Event()
        sock.set_inheritable(False)
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.expect_within(silence_s)

    def expect_within(self, silence_s: float) -> None:
        """From now on, hearing nothing or getting nothing sent for this long is the end, if that has not come yet."""
        self._silence_s = silence_s
        with suppress(OSError):
            for option, seconds in ((socket.SO_RCVTIMEO, min(LOOK_S, silence_s)), (socket.SO_SNDTIMEO, silence_s)):
                self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))

    def keep_beating(self) -> None:
        """Until the channel is closed, by either side."""
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def send(self, payload: bytes) -> None:
        """Does nothing where the other side is gone: whoever reads is told."""
        self.send_frame(to_frame(payload))

    def send_frame(self, frame: bytes) -> None:
        """`send`, of what `to_frame` made already."""
        with self._sending, suppress(OSError):
            self._socket.sendall(frame)

    def payloads(self) -> Iterator[bytes]:
        """What the other side sends but its beats, until it closes. Raises `TransportError` for silence, and as `FrameParser.feed` does."""
        silent_s = 0.0  # waited, which is not what a clock says to one that was held up itself
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
                silent_s = 0.0
            except BlockingIOError:
                silent_s += min(LOOK_S, self._silence_s)
                if silent_s >= self._silence_s:
                    raise TransportError(f"said nothing for {self._silence_s:g} s") from None
                continue
            except OSError:
                return
            if not data:
                return
            yield from (payload for payload in self._parser.feed(data) if payload != _BEAT)

    def close(self) -> None:
        """Wakes whoever reads."""
        self._is_closed.set()
        with suppress(OSError):  # the other side was quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def finish(self) -> None:
        """Say nothing more, and close once the other side has read all and closed, or stays silent."""
        with suppress(OSError, TransportError):
            self._socket.shutdown(socket.SHUT_WR)
            for _ in self.payloads():
                pass
        self.close()

    def _beat(self) -> None:
        while not self._is_closed.wait(BEAT_S):
            self.send(_BEAT)


def listen(host: str, port: int) -> socket.socket:
    """Raises `OSError` where that cannot be, which `gaierror` is."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an engine that died are no hindrance
        listener.bind(address)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def connect(host: str, port: int, *, timeout_s: float) -> socket.socket:
    """Tries until somebody listens. Raises the last `OSError` after `timeout_s`."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(CONNECT_PAUSE_S, min(10.0, give_up_s - time.monotonic())))
        except OSError:
            if time.monotonic() >= give_up_s:
                raise
        time.sleep(CONNECT_PAUSE_S)
