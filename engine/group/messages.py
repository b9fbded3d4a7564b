"""What the engine processes of a group say to each other, as MessagePack with types.

A follower says `Hello` and `Described`, gets `Join`, tells its `Devices`, gets `Build`, says `Built`, and from there on is told every
call of the leader's runner, in order. `Dismissed` ends it at any time, `Unable` is its own last word; both carry a reason that a restart
does not cure. `Beat` says that a process lives. Decoding checks every type, and no form of the bytes can run code.
"""

import msgspec

from engine.config import EngineConfig, EngineOptions
from engine.errors import ConfigError, TransportError
from engine.types import SamplingParams


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Follower to leader, first. Stays as it is from version to version, so that another one is known by it."""

    version: str
    jax_version: str
    process_id: int
    num_processes: int


class Described(msgspec.Struct, frozen=True, array_like=True, tag="described"):
    """Follower to leader, second: what it would serve."""

    fingerprint: str  # of the model's files, see `engine/group/fingerprint.py`
    options: EngineOptions  # as its own node's flags say


class Join(msgspec.Struct, frozen=True, array_like=True, tag="join"):
    """Leader to follower, once everybody is here: where the runtimes of all processes meet."""

    coordinator: str


class Devices(msgspec.Struct, frozen=True, array_like=True, tag="devices"):
    """Follower to leader: what it computes on."""

    kind: str
    num_devices: int
    memory_bytes: int  # of each


class Build(msgspec.Struct, frozen=True, array_like=True, tag="build"):
    """Leader to follower: what to build, but for the paths, which are each machine's own."""

    config: EngineConfig


class Built(msgspec.Struct, frozen=True, array_like=True, tag="built"):
    """Follower to leader: it waits for calls."""


class Dismissed(msgspec.Struct, frozen=True, array_like=True, tag="dismissed"):
    """Leader to follower, as its last word."""

    reason: str


class Unable(msgspec.Struct, frozen=True, array_like=True, tag="unable"):
    """Follower to leader, as its last word."""

    reason: str


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Either way, once a second."""


class WarmUp(msgspec.Struct, frozen=True, array_like=True, tag="warm-up"):
    """Leader to follower, as all below: a call of a replica's runner."""

    replica: int


class ResetSlot(msgspec.Struct, frozen=True, array_like=True, tag="reset-slot"):
    """`Runner.reset_slot`."""

    replica: int
    slot: int
    sampling: SamplingParams
    end_token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]


class WriteMasks(msgspec.Struct, frozen=True, array_like=True, tag="write-masks"):
    """`Runner.write_masks`."""

    replica: int
    slots: tuple[int, ...]
    words: bytes  # int32 [slots, words of a mask], little-endian


class Launch(msgspec.Struct, frozen=True, array_like=True, tag="launch"):
    """`Runner.launch`."""

    replica: int
    layout: int  # place among the runner's layouts
    kind: int  # a `StepKind`
    packed: bytes  # int32, little-endian


class Choose(msgspec.Struct, frozen=True, array_like=True, tag="choose"):
    """`Runner.choose`, of what was launched last."""

    replica: int
    dropped: tuple[int, ...]


Call = WarmUp | ResetSlot | WriteMasks | Launch | Choose
FromLeader = Join | Build | Dismissed | Beat | Call
FromFollower = Hello | Described | Devices | Built | Unable | Beat

_encoder = msgspec.msgpack.Encoder()
_from_leader = msgspec.msgpack.Decoder(FromLeader)
_from_follower = msgspec.msgpack.Decoder(FromFollower)


def encode(message: FromLeader | FromFollower) -> bytes:
    """The payload of one frame."""
    return _encoder.encode(message)


def decode_from_leader(payload: bytes) -> FromLeader:
    """Raises `TransportError` for anything that is not such a message."""
    try:
        return _from_leader.decode(payload)
    except (msgspec.DecodeError, ConfigError) as error:
        raise TransportError(f"the leading process sent no message that this one knows: {error}") from None


def decode_from_follower(payload: bytes) -> FromFollower:
    """Raises `TransportError` for anything that is not such a message."""
    try:
        return _from_follower.decode(payload)
    except (msgspec.DecodeError, ConfigError) as error:
        raise TransportError(f"a following process sent no message that this one knows: {error}") from None
