"""What server and engine process say to each other, as MessagePack with types.

`Configure` is the first message of a connection, after `Prepare` where the process stands by for a while; then the engine tells how its
start goes (`Report`..., then `Ready` or `Failed`), and from there on generations travel as `Submit` and `Abort` one way and as `Deltas` and
`Refused` the other way; `Queued` and `Begun` say which of them can have ended an engine. The values inside are the frozen dataclasses of
`engine/types.py` and `engine/config.py`; decoding checks every type, and no form of the bytes can run code. Cutting a byte stream into
frames is `engine/transport.py`'s work.
"""

import msgspec

from engine.config import EngineOptions
from engine.errors import ConfigError, TransportError
from engine.types import EngineInfo, EngineStats, GenerationRequest, Progress, TokenDelta

FOLLOWING = "follow"  # the phase of the last `Report` of a process that follows


class Configure(msgspec.Struct, frozen=True, array_like=True, tag="configure"):
    """Server to engine, once and first: what to build."""

    options: EngineOptions


class Prepare(msgspec.Struct, frozen=True, array_like=True, tag="prepare"):
    """Server to engine, before `Configure`: stand by, with all done that needs neither weights nor memory of the devices."""

    options: EngineOptions
    backend: str  # what the engine that runs now computes on


class Follow(msgspec.Struct, frozen=True, array_like=True, tag="follow"):
    """To an engine process, once and first, in place of `Configure`: compute what the leader of this group tells you to."""

    options: EngineOptions
    process_id: int


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Server to engine: generate this. A generation that ran in an engine that died goes on behind what it has given already."""

    request: GenerationRequest
    output_token_ids: tuple[int, ...] = ()
    num_scored_tokens: int = 0  # prompt log-probabilities already received


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Server to engine: nobody listens to this generation any more. Unknown and finished ids are fine."""

    request_id: str


class Report(msgspec.Struct, frozen=True, array_like=True, tag="report"):
    """Engine to server, while it starts."""

    progress: Progress


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Engine to server: everything is compiled, requests may come."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """Engine to server, as its last word: it cannot start, for a reason that a restart does not cure."""

    message: str
    plan: str | None = None  # where memory is what is missing: `grok-server plan`'s answer, as JSON


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Engine to server: the end of one submitted request that the engine does not take."""

    request_id: str
    message: str


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    """Engine to server after a step: what it added to all generations, and the gauges. Without deltas it is a sign of life."""

    deltas: list[TokenDelta]
    stats: EngineStats


class Queued(msgspec.Struct, frozen=True, array_like=True, tag="queued"):
    """Engine to server: it has these, and nothing of them is computed before `Begun` tells so."""

    request_ids: list[str]


class Begun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    """Engine to server, before the step: some of `Queued` that are computed from now on, and could end the engine."""

    request_ids: list[str]


FromServer = Prepare | Configure | Follow | Submit | Abort
FromEngine = Report | Ready | Failed | Refused | Queued | Begun | Deltas

_encoder = msgspec.msgpack.Encoder()
_from_server = msgspec.msgpack.Decoder(FromServer)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: FromServer | FromEngine) -> bytes:
    """The payload of one frame."""
    return _encoder.encode(message)


def decode_from_server(payload: bytes) -> FromServer:
    """Raises `TransportError` for anything that is not such a message."""
    try:
        return _from_server.decode(payload)
    except (msgspec.DecodeError, ConfigError) as error:
        raise TransportError(f"the server sent no message the engine knows: {error}") from None


def decode_from_engine(payload: bytes) -> FromEngine:
    """Raises `TransportError` for anything that is not such a message."""
    try:
        return _from_engine.decode(payload)
    except msgspec.DecodeError as error:
        raise TransportError(f"the engine sent no message the server knows: {error}") from None
