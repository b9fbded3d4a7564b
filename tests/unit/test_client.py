"""The client against the engine's own loop, in one process: frames move only when a test says so."""

import asyncio
from contextlib import aclosing

import pytest
from fake_core import REFUSED, FakeCore, engine_options, options_info, request

from engine.__main__ import EngineLoop
from engine.client import EngineClient, RemoteEngineClient
from engine.errors import EngineDiedError, RequestError
from engine.messages import Configure, Ready, Report, decode_from_server, encode
from engine.transport import LoopbackChannel
from engine.types import FinishReason, Progress, TokenDelta

pytestmark = pytest.mark.anyio


class LocalEngine:
    """An engine loop at the other end of a loopback; `turn` lets everything that waits happen once."""

    def __init__(self, client: RemoteEngineClient) -> None:
        self.channel, client_end = LoopbackChannel.pair()
        self.core = FakeCore(options_info(engine_options()))
        self.loop = EngineLoop(self.core, send=lambda message: self.channel.send(encode(message)))
        self.channel.handler, client_end.handler = self, client
        self._client_end = client_end
        client.connect(client_end, engine_options())

    def become_ready(self) -> None:
        self.channel.send(encode(Ready(self.core.info)))
        self._client_end.deliver()

    def frame_received(self, payload: bytes) -> None:
        message = decode_from_server(payload)
        if not isinstance(message, Configure):
            self.loop.take(message)

    def channel_closed(self) -> None:
        pass

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


async def test_the_death_of_the_engine_fails_what_is_open_after_what_arrived(client):
    engine = LocalEngine(client)
    engine.become_ready()
    generation = client.generate(request("a", max_tokens=100))
    first = asyncio.ensure_future(anext(generation))
    await engine.turn(3)
    await first

    engine.channel.close()

    assert [await anext(generation) for _ in range(2)], "what arrived is still told"
    with pytest.raises(EngineDiedError):
        await anext(generation)
    assert not client.is_ready
    assert client.info is not None, "ranges stay known while the next engine starts"


async def test_a_request_without_a_ready_engine_fails_at_once(client):
    with pytest.raises(EngineDiedError, match="no engine is ready"):
        await collect(client, "a")


async def test_another_engine_can_take_the_place_of_a_dead_one(client):
    first = LocalEngine(client)
    first.become_ready()
    first.channel.close()

    second = LocalEngine(client)
    assert not client.is_ready
    second.become_ready()
    task = asyncio.create_task(collect(client, "a", max_tokens=2))
    await second.turn(3)

    assert len(await task) == 2


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

    with pytest.raises(EngineDiedError, match="shutting down"):
        await task
    await engine.turn()
    assert not engine.core.has_work


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
