"""The client against the engine's own loop, in one process: frames move only when a test says so."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import pytest
from fake_core import CRASHING, CRASHING_LATER, HANGING, REFUSED, FakeCore, engine_options, options_info, request

from engine.client import EngineClient, RemoteEngineClient
from engine.engine_loop import EngineLoop
from engine.errors import EngineDiedError, NoEngineError, RequestError
from engine.messages import Abort, Configure, Deltas, FromServer, Ready, Report, Submit, decode_from_server, encode
from engine.transport import LoopbackChannel
from engine.types import EngineStats, FinishReason, Progress, TokenDelta

pytestmark = pytest.mark.anyio


class LocalEngine:
    """An engine loop at the other end of a loopback; `turn` lets everything that waits happen once, `heard` is what the client said."""

    def __init__(self, client: RemoteEngineClient) -> None:
        self.channel, client_end = LoopbackChannel.pair()
        self.core = FakeCore(options_info(engine_options()))
        self.loop = EngineLoop(self.core, send=lambda message: self.channel.send(encode(message)))
        self.channel.handler, client_end.handler = self, client
        self._client_end = client_end
        self.heard: list[FromServer] = []
        client.connect(client_end, engine_options())

    def become_ready(self) -> None:
        self.channel.send(encode(Ready(self.core.info)))
        self._client_end.deliver()

    def frame_received(self, payload: bytes) -> None:
        message = decode_from_server(payload)
        self.heard.append(message)
        if not isinstance(message, Configure):
            self.loop.take(message)

    def channel_closed(self) -> None:
        pass

    def submitted(self) -> list[Submit]:
        """What the client has given to this engine so far."""
        self.channel.deliver()
        return [message for message in self.heard if isinstance(message, Submit)]

    def die(self) -> None:
        self.channel.close()

    async def turn(self, count: int = 1) -> None:
        for _ in range(count):
            await asyncio.sleep(0)
            self.channel.deliver()
            self.loop.turn()
            self._client_end.deliver()
            await asyncio.sleep(0)


@pytest.fixture
def client(anyio_backend) -> RemoteEngineClient:  # noqa: ARG001
    return RemoteEngineClient()


async def collect(client: EngineClient, request_id: str, *prompt: int, max_tokens: int = 4) -> list[TokenDelta]:
    return [delta async for delta in client.generate(request(request_id, *prompt, max_tokens=max_tokens))]


async def test_a_generation_yields_every_delta_up_to_the_one_with_a_finish_reason(client):
    engine = LocalEngine(client)
    engine.become_ready()

    task = asyncio.create_task(collect(client, "a", 5, 6, max_tokens=3))
    await engine.turn(5)

    deltas = await task
    assert [delta.token_ids for delta in deltas] == [(5,), (6,), (5,)]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH]
    assert client.num_open == 0


async def test_generations_at_once_do_not_mix(client):
    engine = LocalEngine(client)
    engine.become_ready()

    tasks = [asyncio.create_task(collect(client, str(n), n + 1, max_tokens=n + 1)) for n in range(8)]
    await engine.turn(12)

    for n, task in enumerate(tasks):
        assert [delta.token_ids for delta in await task] == [(n + 1,)] * (n + 1)


async def test_nothing_is_sent_before_the_first_delta_is_awaited(client):
    engine = LocalEngine(client)
    engine.become_ready()
    engine.channel.deliver()

    generation = client.generate(request("a"))

    assert engine.channel.num_arrived == 0
    assert client.num_open == 0
    await generation.aclose()
    assert engine.channel.num_arrived == 0


async def test_closing_the_generator_aborts_before_the_next_step(client):
    engine = LocalEngine(client)
    engine.become_ready()

    async with aclosing(client.generate(request("a", max_tokens=100))) as generation:
        first = asyncio.ensure_future(anext(generation))
        await engine.turn(2)
        await first
    steps_before = engine.core.num_steps
    await engine.turn()

    assert engine.core.num_steps == steps_before
    assert not engine.core.has_work
    assert client.num_open == 0
    assert client.stats.num_running == 0


async def test_cancelling_the_reader_aborts(client):
    engine = LocalEngine(client)
    engine.become_ready()
    task = asyncio.create_task(collect(client, "a", max_tokens=100))
    await engine.turn(3)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.turn()

    assert not engine.core.has_work
    assert client.num_open == 0


async def test_a_finished_generation_sends_no_abort(client):
    engine = LocalEngine(client)
    engine.become_ready()

    task = asyncio.create_task(collect(client, "a", max_tokens=1))
    await engine.turn(2)
    await task

    assert engine.channel.num_arrived == 0


async def test_a_refused_request_raises_the_engines_words(client):
    engine = LocalEngine(client)
    engine.become_ready()

    task = asyncio.create_task(collect(client, "a", REFUSED))
    await engine.turn(2)

    with pytest.raises(RequestError, match="this prompt is refused"):
        await task
    assert client.num_open == 0


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def ready_engine(client: RemoteEngineClient) -> LocalEngine:
    engine = LocalEngine(client)
    engine.become_ready()
    return engine


async def test_requests_given_up_while_the_engine_does_not_read_are_never_sent(client):
    engine = await ready_engine(client)
    prompt = tuple(range(7, 107)) * 1000

    for number in range(200):
        task = asyncio.create_task(collect(client, str(number), *prompt))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    task = asyncio.create_task(collect(client, "last", 5))
    await asyncio.sleep(0)
    num_frames = engine.channel.num_arrived
    await engine.turn(20)

    assert 2 < num_frames < 40, "a megabyte of prompts, and their aborts"
    assert (await task)[-1].finish_reason is FinishReason.LENGTH
    assert client.num_open == 0


async def test_a_request_before_the_first_engine_is_ready_fails_at_once(client):
    LocalEngine(client)

    with pytest.raises(NoEngineError, match="no engine has been ready yet"):
        await collect(client, "a")


async def test_a_generation_goes_on_in_the_next_engine_exactly_where_it_was(client):
    first = await ready_engine(client)
    task = asyncio.create_task(collect(client, "a", 5, 6, 7, max_tokens=9))
    await first.turn(4)

    first.die()
    assert not client.is_ready
    assert client.info is not None, "ranges stay known while the next engine starts"
    assert client.num_held == 1
    second = await ready_engine(client)
    assert client.num_held == 0
    await second.turn(9)

    deltas = await task
    assert second.submitted()[0].output_token_ids == (5, 6, 7, 5)
    assert tokens(deltas) == [5, 6, 7, 5, 6, 7, 5, 6, 7]
    assert [delta.finish_reason for delta in deltas] == [None] * 8 + [FinishReason.LENGTH]
    assert client.num_open == 0
    assert client.num_restarts == 1


async def test_what_an_engine_said_after_the_last_frame_that_arrived_is_said_again_by_the_next(client):
    first = await ready_engine(client)
    task = asyncio.create_task(collect(client, "a", 5, 6, 7, max_tokens=6))
    await first.turn(2)
    first.loop.turn()
    first.loop.turn()  # two tokens on their way when the engine dies

    first.die()
    second = await ready_engine(client)
    await second.turn(9)

    assert tokens(await task) == [5, 6, 7, 5, 6, 7]


async def test_prompt_scores_that_were_received_are_not_sent_again(client):
    prompt = tuple(range(1, 12))
    scored = request("a", *prompt, max_tokens=1)
    scored = replace(scored, sampling=replace(scored.sampling, prompt_logprobs=0))
    first = await ready_engine(client)
    deltas: list[TokenDelta] = []

    async def read() -> None:
        async for delta in client.generate(scored):
            deltas.append(delta)

    task = asyncio.create_task(read())
    await first.turn()
    first.die()
    second = await ready_engine(client)
    await second.turn(5)
    await task

    assert second.submitted()[0].num_scored_tokens == 3
    assert tuple(entry.token_id for delta in deltas for entry in delta.prompt_logprobs) == prompt[1:]


async def test_started_generations_are_given_to_the_next_engine_before_the_others(client):
    first = await ready_engine(client)
    tasks = [asyncio.create_task(collect(client, name, max_tokens=20)) for name in ("a", "b")]
    await first.turn(3)
    first.die()
    tasks += [asyncio.create_task(collect(client, name, max_tokens=20)) for name in ("c", "d")]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)

    second = await ready_engine(client)

    assert [message.request.request_id for message in second.submitted()] == ["b", "c", "d"]
    await second.turn(25)
    assert [len(tokens(await task)) for task in tasks[1:]] == [20, 20, 20]


async def test_a_request_that_arrives_between_two_engines_waits_for_the_next(client):
    (await ready_engine(client)).die()
    task = asyncio.create_task(collect(client, "a", 5, max_tokens=2))
    await asyncio.sleep(0)
    second = LocalEngine(client)
    await asyncio.sleep(0)
    assert not task.done()

    second.become_ready()
    await second.turn(3)

    assert tokens(await task) == [5, 5]


async def test_leaving_between_two_engines_leaves_nothing_behind(client):
    first = await ready_engine(client)
    task = asyncio.create_task(collect(client, "a", max_tokens=100))
    await first.turn(3)
    first.die()

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    second = await ready_engine(client)

    assert client.num_open == client.num_held == 0
    assert second.submitted() == []
    assert not [message for message in second.heard if isinstance(message, Abort)]


async def test_a_deadline_that_passes_without_an_engine_is_kept(client):
    first = await ready_engine(client)
    soon = replace(request("a", max_tokens=100), deadline_s=time.monotonic() + 0.05)
    generation = client.generate(soon)
    task = asyncio.ensure_future(anext(generation))
    await first.turn(2)
    await task
    first.die()

    async with asyncio.timeout(5):
        rest = [delta async for delta in generation]

    assert [delta.finish_reason for delta in rest if not delta.token_ids] == [FinishReason.DEADLINE]
    assert time.monotonic() >= soon.deadline_s
    second = await ready_engine(client)
    assert second.submitted() == []


async def test_a_deadline_is_kept_where_the_engine_hangs(client, monkeypatch):
    monkeypatch.setattr("engine.journal.ENGINE_LATENESS_S", 0.05)
    engine = await ready_engine(client)

    async with asyncio.timeout(5):
        deltas = [delta async for delta in client.generate(replace(request("a", HANGING), deadline_s=time.monotonic() + 0.05))]

    assert [delta.finish_reason for delta in deltas] == [FinishReason.DEADLINE]
    engine.channel.deliver()
    assert isinstance(engine.heard[-1], Abort)


async def test_a_request_that_the_next_engine_refuses_ends_with_its_words(client):
    first = await ready_engine(client)
    task = asyncio.create_task(collect(client, "a", max_tokens=100))
    await first.turn(3)
    first.die()
    second = LocalEngine(client)

    def refuse(*_, **__) -> None:
        raise RequestError("the cache is smaller now")

    second.core.submit = refuse
    second.become_ready()
    await second.turn(2)

    with pytest.raises(RequestError, match="smaller now"):
        await task
    assert client.num_open == 0


@pytest.mark.parametrize("poison", [CRASHING, CRASHING_LATER])
async def test_only_the_request_that_kills_every_engine_fails(client, poison: int):
    engine = await ready_engine(client)
    good = [asyncio.create_task(collect(client, f"good-{n}", 5, 6, max_tokens=30)) for n in range(3)]
    bad = asyncio.create_task(collect(client, "bad", poison, max_tokens=30))
    good += [asyncio.create_task(collect(client, f"good-{n}", 5, 6, max_tokens=30)) for n in range(3, 6)]
    num_deaths = 0
    for _ in range(200):
        try:
            await engine.turn()
        except RuntimeError:
            num_deaths += 1
            engine.die()
            engine = await ready_engine(client)
        if bad.done() and all(task.done() for task in good):
            break

    with pytest.raises(EngineDiedError) as conviction:
        await bad
    assert not isinstance(conviction.value, NoEngineError)
    assert [tokens(await task) for task in good] == [[5, 6] * 15] * 6
    assert num_deaths <= 7
    assert not client.is_searching


async def test_totals_count_over_all_engines_and_gauges_are_the_engines_of_now(client):
    first = await ready_engine(client)
    first.channel.send(encode(Deltas([], EngineStats(num_running=3, num_steps=10, num_hit_tokens=5))))
    first._client_end.deliver()
    first.die()
    assert client.stats == EngineStats(num_steps=10, num_hit_tokens=5)
    second = await ready_engine(client)
    second.channel.send(encode(Deltas([], EngineStats(num_running=1, num_steps=4))))
    second._client_end.deliver()

    assert client.stats == EngineStats(num_running=1, num_steps=14, num_hit_tokens=5)


async def test_progress_is_visible_until_the_engine_is_ready():
    heard: list[object] = []
    client = RemoteEngineClient(on_progress=heard.append, on_ready=heard.append)
    engine = LocalEngine(client)
    progress = Progress(phase="compile", done=3, total=12, unit="programs")
    engine.channel.send(encode(Report(progress)))
    engine._client_end.deliver()

    assert client.progress == progress
    engine.become_ready()
    assert client.progress is None
    assert heard == [progress, engine.core.info]


async def test_failing_what_is_open_ends_it_here_and_in_the_engine(client):
    engine = LocalEngine(client)
    engine.become_ready()
    task = asyncio.create_task(collect(client, "a", max_tokens=100))
    await engine.turn(2)

    client.fail_open("the server is shutting down")

    with pytest.raises(NoEngineError, match="shutting down"):
        await task
    await engine.turn()
    assert not engine.core.has_work


async def test_at_the_end_what_waits_fails_and_nothing_begins_any_more(client):
    (await ready_engine(client)).die()
    task = asyncio.create_task(collect(client, "a"))
    await asyncio.sleep(0)

    client.fail_open("the server is shutting down")

    with pytest.raises(NoEngineError, match="shutting down"):
        await task
    with pytest.raises(NoEngineError, match="shutting down"):
        await collect(client, "b")
    assert client.num_open == 0


async def test_a_silent_engine_with_work_still_gives_a_sign_of_life():
    now = [0.0]
    sent = []
    core = FakeCore(options_info(engine_options()))
    loop = EngineLoop(core, send=sent.append, clock=lambda: now[0])
    core.submit(request("a", max_tokens=100))
    core.step = lambda: setattr(core, "num_steps", core.num_steps + 1) or []  # a long prompt: steps without deltas

    for _ in range(20):
        now[0] += 0.1
        loop.turn()

    assert 3 <= len(sent) <= 5
    assert all(message.deltas == [] for message in sent)
