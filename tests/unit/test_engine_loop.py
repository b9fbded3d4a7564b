"""What the engine says around its steps, so that the server knows who can have ended it."""

from dataclasses import replace

from fake_core import request
from scripted_runner import engine_config, scripted_core

from engine.engine_loop import EngineLoop
from engine.messages import Abort, Begun, Deltas, FromEngine, Queued, Submit


def loop_of(*, max_num_seqs: int) -> tuple[EngineLoop, list[FromEngine]]:
    core, _ = scripted_core(engine_config(max_num_seqs=max_num_seqs))
    said: list[FromEngine] = []
    return EngineLoop(core, send=said.append), said


def test_a_request_that_begins_at_once_is_not_spoken_of() -> None:
    loop, said = loop_of(max_num_seqs=2)
    loop.take(Submit(request("a")))
    loop.take(Submit(request("b")))

    for _ in range(20):
        loop.turn()

    assert {type(message) for message in said} == {Deltas}


def test_one_that_waits_is_told_of_and_before_the_step_in_which_it_begins_again() -> None:
    loop, said = loop_of(max_num_seqs=1)
    for name in "abc":
        loop.take(Submit(request(name)))

    for _ in range(30):
        loop.turn()

    told = [message for message in said if not isinstance(message, Deltas)]
    assert told == [Queued(["b", "c"]), Begun(["b"]), Begun(["c"])]
    for name in "bc":
        begun = said.index(Begun([name]))
        deltas = [
            at for at, message in enumerate(said) if isinstance(message, Deltas) and name in [each.request_id for each in message.deltas]
        ]
        assert begun < deltas[0]


def test_one_that_leaves_while_it_waits_is_forgotten() -> None:
    loop, said = loop_of(max_num_seqs=1)
    for name in "abc":
        loop.take(Submit(replace(request(name), deadline_s=0.0 if name == "c" else None)))
    loop.take(Abort("b"))

    for _ in range(20):
        loop.turn()

    assert {type(message) for message in said} == {Deltas}
    assert not loop._queued
    assert not loop._new
