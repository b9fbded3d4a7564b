"""Who may be in a group of engine processes, and how all of it ends."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import msgspec
import numpy as np
import pytest
from fake_core import engine_options
from scripted_runner import engine_config

from engine.batch import Batch, StepKind, StepLayout
from engine.config import EngineConfig, EngineOptions, GroupConfig, MeshConfig
from engine.errors import ConfigError, TransportError
from engine.group.calls import MASKS_AT_ONCE, FollowingRunner, LeadingRunner
from engine.group.channel import GroupChannel, connect, listen
from engine.group.fingerprint import fingerprint
from engine.group.follower import Follower
from engine.group.leader import MAX_FRAME_BYTES, Group, free_port, hello
from engine.group.messages import Call, Described, Devices, Dismissed, Hello, Launch, decode_from_leader, encode
from engine.messages import Follow
from engine.transport import MAX_FRAME_BYTES as FROM_LEADER
from engine.types import Progress, SamplingParams

HOST = "127.0.0.1"


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    """Of a group of two nodes."""
    (tmp_path / "tensor00000_000").write_bytes(b"weights")
    group = GroupConfig(num_nodes=2, host=HOST, port=free_port(HOST), start_timeout_s=20.0)
    return replace(engine_options(), model_dir=str(tmp_path), group=group)


def with_group(options: EngineOptions, **changes: Any) -> EngineOptions:
    assert options.group is not None
    return replace(options, group=replace(options.group, **changes))


class End:
    """What ends a process outside of tests: here, the thread that noticed stays where it is."""

    def __init__(self) -> None:
        self.cause = ""
        self.has_come = threading.Event()

    def __call__(self, cause: str) -> Never:
        self.cause = cause
        self.has_come.set()
        while True:
            time.sleep(60)

    def wait(self) -> str:
        assert self.has_come.wait(10)
        return self.cause


def ignore(progress: Progress) -> None: ...


@contextmanager
def leading(options: EngineOptions, command: Sequence[str] = ()) -> Iterator[tuple[Group, End, Callable[[], None]]]:
    """A group that gathers in a thread, how its process ends, and what waits until it is complete or raises why it is not."""
    lost, raised = End(), list[Exception]()
    group = Group(options, report=ignore, on_lost=lost, on_unable=lost, command=command)

    def gather() -> None:
        try:
            group.gather()
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=gather, daemon=True)
    thread.start()

    def wait() -> None:
        thread.join(30)
        assert not thread.is_alive()
        if raised:
            raise raised[0]

    try:
        yield group, lost, wait
    finally:
        for channel in list(group._members.values()):
            channel.close()
        for _, sock in group._siblings.values():
            sock.close()


def connected(options: EngineOptions) -> GroupChannel:
    assert options.group is not None
    return GroupChannel(connect(HOST, options.group.port, timeout_s=10), max_frame_bytes=FROM_LEADER)


def joined(options: EngineOptions, said: Hello | None = None, described: Described | None = None) -> GroupChannel:
    """A connection on which a follower has introduced itself, rightly unless told otherwise."""
    assert options.group is not None
    channel = connected(options)
    channel.send(encode(said or hello(options.group, 1)))
    channel.send(encode(described or Described(fingerprint(options.model, Path(options.model_dir)), options)))
    channel.keep_beating()
    return channel


def reason_of(channel: GroupChannel) -> str:
    """Why the leader dismissed whoever is at the other end."""
    message = decode_from_leader(next(channel.payloads()))
    assert isinstance(message, Dismissed)
    channel.close()
    return message.reason


# who is let in


def test_a_group_is_complete_when_all_are_there(options: EngineOptions):
    with leading(options) as (_, _, complete):
        channel = joined(options)

        complete()

        channel.close()


STRANGERS = {
    "version": (lambda said: msgspec.structs.replace(said, version="9.9"), r"runs grok-server 9\.9 .* install the same"),
    "jax": (lambda said: msgspec.structs.replace(said, jax_version="9.9"), r"with jax 9\.9"),
    "number": (lambda said: msgspec.structs.replace(said, num_processes=3), r"process 1 of 3, the leader counts 2"),
    "rank": (lambda said: msgspec.structs.replace(said, process_id=2), r"process 2 of 2, .* ranks from 0 up"),
    "leader's": (lambda said: msgspec.structs.replace(said, process_id=0), r"process 0 of 2"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_process_that_cannot_be_here_is_told_why_and_the_group_waits_on(options: EngineOptions, stranger: str):
    change, reason = STRANGERS[stranger]
    assert options.group is not None
    with leading(options) as (_, _, complete):
        told = reason_of(joined(options, said=change(hello(options.group, 1))))
        channel = joined(options)

        complete()

        assert re.search(reason, told)
        channel.close()


def test_one_that_was_set_otherwise_is_told_what_differs(options: EngineOptions):
    described = Described(fingerprint(options.model, Path(options.model_dir)), replace(options, mesh=MeshConfig(tensor=2)))
    with leading(options):
        told = reason_of(joined(options, described=described))

    assert told.startswith("its settings differ: mesh.tensor is 2 there and 1 at the leader")


def test_one_with_paths_of_its_own_is_welcome(options: EngineOptions):
    theirs = replace(options, model_dir="/elsewhere", tokenizer_path="/elsewhere/tokenizer.model", compile_cache_dir="/tmp")
    with leading(options) as (_, _, complete):
        channel = joined(options, described=Described(fingerprint(options.model, Path(options.model_dir)), theirs))

        complete()

        channel.close()


def test_one_with_other_files_is_told_so(options: EngineOptions):
    with leading(options):
        told = reason_of(joined(options, described=Described("another", options)))

    assert "files of other names or sizes" in told


def test_a_rank_can_be_taken_once(options: EngineOptions):
    three = with_group(options, num_nodes=3)
    with leading(three) as (group, _, _):
        first = joined(three)
        with group._changed:
            assert group._changed.wait_for(lambda: group._members, timeout=10)

        told = reason_of(joined(three))

        first.close()
    assert told == "process 1 is in the group already: each node needs a rank of its own"


def test_one_that_left_before_all_were_there_may_come_again(options: EngineOptions):
    three = with_group(options, num_nodes=3)
    assert three.group is not None
    with leading(three) as (group, _, complete):
        first = joined(three)
        with group._changed:
            assert group._changed.wait_for(lambda: group._members, timeout=10)
            first.close()
            assert group._changed.wait_for(lambda: not group._members, timeout=10)
        channels = [joined(three), joined(three, said=hello(three.group, 2))]

        complete()

        for channel in channels:
            channel.close()


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\nhost: here\r\n\r\n", b"\1" + (MAX_FRAME_BYTES + 1).to_bytes(4, "little")])
def test_who_speaks_something_else_is_hung_up_on(options: EngineOptions, noise: bytes):
    assert options.group is not None
    with leading(options) as (_, _, complete):
        with connect(HOST, options.group.port, timeout_s=10) as stranger:
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while stranger.recv(1000):
                    pass
        channel = joined(options)

        complete()

        channel.close()


def test_who_takes_too_long_over_a_hello_is_hung_up_on_however_often_a_byte_comes(options: EngineOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.group.leader.HELLO_TIMEOUT_S", 0.5)
    assert options.group is not None
    with leading(options) as (_, _, complete):
        with connect(HOST, options.group.port, timeout_s=10) as stranger:
            stranger.sendall(b"\1" + (1000).to_bytes(4, "little"))
            with suppress(ConnectionError):
                for _ in range(100):
                    stranger.sendall(b"a")
                    time.sleep(0.05)
                pytest.fail("the leader listened for 5 s")
        channel = joined(options)

        complete()

        channel.close()


def test_who_comes_when_all_are_there_finds_nobody(options: EngineOptions):
    assert options.group is not None
    with leading(options) as (_, _, complete):
        channel = joined(options)
        complete()

        with pytest.raises(ConnectionRefusedError):
            connect(HOST, options.group.port, timeout_s=0)

        channel.close()


def test_who_is_missing_is_named_in_time(options: EngineOptions):
    missing = r"1 of 2 processes .* within 0\.5 s: start the nodes with rank 1, with the same --nnodes"

    with leading(with_group(options, start_timeout_s=0.5)) as (_, _, complete), pytest.raises(ConfigError, match=missing):
        complete()


def test_a_process_of_the_same_machine_that_is_killed_before_it_is_there_may_do_better_next_time(options: EngineOptions):
    one_node = with_group(options, num_nodes=1, processes_per_node=2, port=0)

    with leading(one_node, ("sh", "-c", "sleep 0.5; kill -9 $$")) as (_, lost, _):
        assert lost.wait() == "process 1 of the group ended with status -9 before it was here"


def test_a_process_of_the_same_machine_that_says_a_restart_does_not_help_is_believed(options: EngineOptions):
    one_node = with_group(options, num_nodes=1, processes_per_node=2, port=0)
    told = "process 1 of the group ended with status 2 before it was here"

    with leading(one_node, ("sh", "-c", "sleep 0.5; exit 2")) as (_, _, complete), pytest.raises(ConfigError, match=told):
        complete()


def test_a_process_of_the_same_machine_that_never_says_anything_is_not_waited_for_as_long_as_other_machines(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("engine.group.leader.SIBLING_TIMEOUT_S", 0.3)
    one_node = with_group(options, num_nodes=1, processes_per_node=2, port=0)

    with leading(one_node, ("sh", "-c", "sleep 2")) as (_, lost, _):
        assert lost.wait() == "process 1 of the group said nothing for 0.3 s after its start"


def test_a_port_that_is_taken_is_refused(options: EngineOptions):
    assert options.group is not None
    taken = rf"on 127\.0\.0\.1:{options.group.port} \(Address already in use\): --master-addr must"

    with listen(HOST, options.group.port), leading(options) as (_, _, complete), pytest.raises(ConfigError, match=taken):
        complete()


def test_an_address_of_another_machine_is_refused(options: EngineOptions):
    foreign = with_group(options, host="192.0.2.1")

    with leading(foreign) as (_, _, complete), pytest.raises(ConfigError, match="must be an address of the node with rank 0"):
        complete()


def test_a_name_that_nobody_knows_is_refused_after_a_while(options: EngineOptions):
    nameless = with_group(options, host="leader.invalid", start_timeout_s=0.5)

    with leading(nameless) as (_, _, complete), pytest.raises(ConfigError, match=r"on leader\.invalid:\d+ \(.*\): --master-addr must"):
        complete()


def test_a_follower_gives_up_where_no_leader_comes(options: EngineOptions):
    alone = with_group(options, start_timeout_s=0.5)
    follower = Follower(Follow(alone, 1), report=ignore, on_lost=End(), on_dismissed=End())

    with pytest.raises(ConfigError, match=r"no leader answers at 127\.0\.0\.1:\d+ within 0\.5 s .*start the node with rank 0"):
        follower.run(Devoted())


# how it ends


def test_the_end_of_one_is_the_end_of_all(options: EngineOptions):
    with leading(options) as (_, lost, complete):
        channel = joined(options)
        complete()

        channel.close()

        assert lost.wait() == "process 1 at 127.0.0.1 has ended, and the group ends with it"


def test_who_says_nothing_counts_as_gone():
    with listen(HOST, 0) as listener:
        ours = GroupChannel(connect(*listener.getsockname(), timeout_s=5), max_frame_bytes=100, silence_s=0.3)
        theirs, _ = listener.accept()

        with pytest.raises(TransportError, match=r"said nothing for 0\.3 s"):
            next(ours.payloads())

        ours.close()
        theirs.close()


def test_a_shorter_limit_holds_for_the_silence_that_lasts_already():
    with listen(HOST, 0) as listener, connect(HOST, listener.getsockname()[1], timeout_s=10) as sock:
        channel = GroupChannel(sock, max_frame_bytes=1000, silence_s=60.0)
        shorten = threading.Timer(0.2, channel.expect_within, (0.5,))
        shorten.start()

        start_s = time.monotonic()
        with pytest.raises(TransportError, match=r"said nothing for 0\.5 s"):
            next(channel.payloads())

        assert time.monotonic() - start_s < 10


def test_a_channel_that_is_closed_expects_nothing():
    with listen(HOST, 0) as listener:
        channel = GroupChannel(connect(*listener.getsockname(), timeout_s=5), max_frame_bytes=100)
        channel.close()

        channel.expect_within(1)

        assert list(channel.payloads()) == []


def test_beats_are_signs_of_life_and_no_news(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.group.channel.BEAT_S", 0.05)
    with listen(HOST, 0) as listener:
        ours = GroupChannel(connect(*listener.getsockname(), timeout_s=5), max_frame_bytes=100, silence_s=2)
        theirs = GroupChannel(listener.accept()[0], max_frame_bytes=100)
        theirs.keep_beating()
        threading.Timer(3, theirs.send, (b"news",)).start()
        start_s = time.monotonic()

        assert next(ours.payloads()) == b"news"
        assert time.monotonic() - start_s > 2

        ours.close()
        theirs.close()


def test_a_follower_that_cannot_build_ends_the_leader_with_its_reason(options: EngineOptions):
    with leading(options) as (group, unable, complete):
        follower = Follower(Follow(options, 1), report=ignore, on_lost=End(), on_dismissed=End())
        raised: list[ConfigError] = []

        def run() -> None:
            try:
                follower.run(Devoted(refuses="no room here"))
            except ConfigError as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        complete()
        group.join("here:1")
        group.build(engine_config())

        assert unable.wait() == "process 1 at 127.0.0.1: no room here"
        thread.join(10)
    assert [str(error) for error in raised] == ["no room here"]


def test_dismissal_and_the_leaders_end_reach_a_follower_that_waits_for_its_devices(options: EngineOptions):
    lost, dismissed = End(), End()
    with leading(options) as (group, _, complete):
        follower = Follower(Follow(options, 1), report=ignore, on_lost=lost, on_dismissed=dismissed)
        threading.Thread(target=follower.run, args=(Devoted(hangs=True),), daemon=True).start()
        complete()
        group.join("here:1")

        group.dismiss("the checkpoint is damaged")

        assert dismissed.wait() == "the checkpoint is damaged"


# what follows


class Recorder:
    """A runner that remembers its calls."""

    num_late_compilations = 0

    def __init__(self) -> None:
        self.layouts = tuple(StepLayout(num_tokens=num_tokens, num_seqs=4, blocks_per_seq=2) for num_tokens in (16, 32))
        self.calls: list[tuple[object, ...]] = []

    def warm_up(self) -> float:
        self.calls.append(("warm up",))
        return 0.5

    def reset_slot(self, slot, sampling, end_token_ids, *, prompt_token_ids=(), output_token_ids=()):
        self.calls.append(("reset", slot, sampling, end_token_ids, tuple(prompt_token_ids), tuple(output_token_ids)))

    def write_masks(self, masks):
        self.calls.append(("masks", [(slot, words.tolist()) for slot, words in masks]))

    def launch(self, batch):
        self.calls.append(("launch", batch.layout, batch.kind, batch.packed.tolist()))
        return len(self.calls)

    def choose(self, launched, *, dropped=()):
        self.calls.append(("choose", launched, list(dropped)))

    def collect(self, output):
        return output


class Devoted:
    """What a follower does with devices, without any."""

    def __init__(self, *, refuses: str = "", hangs: bool = False) -> None:
        self.runner = Recorder()
        self._refuses = refuses
        self._hangs = hangs

    def join(self, coordinator: str) -> Devices:  # noqa: ARG002
        if self._hangs:
            threading.Event().wait(10)
        return Devices("cpu", 4, 1 << 30)

    def build(self, config: EngineConfig) -> list[Recorder]:  # noqa: ARG002
        if self._refuses:
            raise ConfigError(self._refuses)
        return [self.runner]


def make_every_call(runner: LeadingRunner) -> None:
    layout = runner.layouts[1]
    packed = np.arange(layout.packed_len, dtype=np.int32) - 5
    batch = Batch(layout=layout, kind=StepKind.SCORE, packed=packed, items=(), num_sampled=0, token_starts=())
    sampling = SamplingParams(temperature=0.5, seed=-(2**63), logit_bias={7: -1.5}, bad_words=((1, 2),), presence_penalty=1.0)
    words = np.array([-(2**31), 5, 2**31 - 1], np.int32)

    assert runner.warm_up() == 0.5
    runner.reset_slot(3, sampling, (2, 9), prompt_token_ids=iter([1, 2]), output_token_ids=[4])
    runner.write_masks([(slot, words + slot * 0) for slot in range(MASKS_AT_ONCE + 2)])
    runner.choose(runner.launch(batch), dropped=[1])
    runner.choose(runner.launch(batch))


def test_a_follower_makes_every_call_of_the_leaders_runner_in_the_same_order(options: EngineOptions):
    ours, devoted = Recorder(), Devoted()
    with leading(options) as (group, _, complete):
        follower = Follower(Follow(options, 1), report=ignore, on_lost=End(), on_dismissed=End())
        threading.Thread(target=follower.run, args=(devoted,), daemon=True).start()
        complete()
        group.join("here:1")
        assert group.devices() == [Devices("cpu", 4, 1 << 30)]
        group.build(engine_config())
        group.wait_until_built()

        make_every_call(group.lead(ours, replica=0))

        give_up_s = time.monotonic() + 10
        while len(devoted.runner.calls) < len(ours.calls) and time.monotonic() < give_up_s:
            time.sleep(0.01)
    assert [call[0] for call in ours.calls] == ["warm up", "reset", "masks", "masks", "launch", "choose", "launch", "choose"]
    assert devoted.runner.calls == ours.calls


def test_a_call_is_told_before_it_is_made():
    told: list[Call] = []
    runner = Recorder()
    leading_runner = LeadingRunner(runner, replica=3, send=lambda call: told.append(call) or check(len(told), len(runner.calls)))

    def check(num_told: int, num_made: int) -> None:
        assert num_told == num_made + 1

    make_every_call(leading_runner)

    assert {call.replica for call in told} == {3}


def test_of_a_step_that_chooses_at_once_only_the_launch_is_told():
    told: list[Call] = []
    runner = LeadingRunner(Recorder(), replica=0, send=told.append)
    layout = runner.layouts[0]
    packed = np.zeros(layout.packed_len, np.int32)
    batch = Batch(layout=layout, kind=StepKind.GREEDY, packed=packed, items=(), num_sampled=0, token_starts=())

    runner.choose(runner.launch(batch))

    assert [type(call) for call in told] == [Launch]


def test_a_step_of_another_shape_is_refused():
    told: list[Call] = []
    make_every_call(LeadingRunner(Recorder(), replica=0, send=told.append))
    launch = next(call for call in told if hasattr(call, "packed"))

    for changed in (msgspec.structs.replace(launch, layout=0), msgspec.structs.replace(launch, layout=2)):
        with pytest.raises(TransportError, match="of a shape that this one has not"):
            FollowingRunner(Recorder()).make(changed)


# whether two have the same model


def test_the_same_files_have_the_same_fingerprint_wherever_they_are_and_others_have_not(options: EngineOptions, tmp_path: Path):
    there = tmp_path / "there" / "ckpt-0"
    there.mkdir(parents=True)
    (there / "tensor00000_000").write_bytes(b"weights")
    (there.parent / "README.md").write_text("not a weight")

    same = fingerprint(options.model, there.parent)
    (there / "tensor00000_000").write_bytes(b"weight")

    assert same == fingerprint(options.model, tmp_path)
    assert fingerprint(options.model, there.parent) != same
    assert fingerprint(replace(options.model, rope_base=1.0), tmp_path) != same
