"""Hostile grammars against real worker processes: each gets its verdict within the limits, and nobody else notices."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tiny_tokenizer import tiny_model_proto, tiny_tokenizer

from server.errors import InvalidRequest, Unavailable
from server.grammar_check import GrammarCheck
from server.limits import Limits
from server.structured_output import choice_grammar, json_grammar

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
GOOD = 'start: "a" /[b-d]{1,3}/'
MAX_STALL_S = 0.05


def json_of(schema: dict[str, Any]) -> str:
    return json_grammar(schema, param="response_format", limits=Limits())


def chained(link: Callable[[str], dict[str, Any]], *, length: int) -> str:
    """A schema of definitions, each made of the next one."""
    definitions = {f"d{index}": link(f"#/$defs/d{index + 1}") for index in range(length)}
    return json_of({"$ref": "#/$defs/d0", "$defs": definitions | {f"d{length}": {"type": "string"}}})


def doubled(reference: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"$ref": reference} for name in "ab"}, "required": ["a", "b"]}


def chain_of_rules(length: int) -> str:
    """EBNF of quadratic cost."""
    return "".join(f"r{index} ::= r{index + 1}\n" for index in range(length)) + f'r{length} ::= "a"\nroot ::= r0'


SLOW = chain_of_rules(9000)
HUNGRY = json_of({"allOf": [{"type": "string", "pattern": f".*{chr(97 + index % 26)}.*{index}.*"} for index in range(40)]})

SLOW_ONES = {"rules": SLOW, "empty lines": "\n" * 250_000}

HOSTILE = {  # with what the reason says
    "memory": (HUNGRY, "more than 64 MiB"),
    "stack": (chained(doubled, length=1750), "nests too deeply"),
    "nested ebnf": ("root ::= " + "(" * 100_000, "nests too deeply"),
    "nested regex": (LLMatcher.grammar_from_regex("(" * 5000 + "a" + ")" * 5000), "regex"),
    "nested lark": ("start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "too deeply nested"),
    "properties": (json_of({"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(1600)}}), "row"),
    "alternatives": ("start: " + " | ".join(f"/w{index}[a-z]*/" for index in range(5000)), "row"),
    "doubling rules": ("start: r0\n" + "".join(f"r{index}: r{index + 1} r{index + 1}\n" for index in range(40)) + 'r40: "x"', "Too many"),
    "doubling terminals": (
        "start: R0\n" + "".join(f"R{index}: R{index + 1} R{index + 1}\n" for index in range(40)) + 'R40: "x"',
        "too big",
    ),
    "conjunction": ("start: A\nA: " + " & ".join(f"/.*{chr(97 + index % 26)}{index}.*/" for index in range(30)), "too many expressions"),
    "no end": ("start: start", "no text matches"),
}

ONLY_LOOKS_HOSTILE = {  # llguidance repeats without unrolling
    "repeated regex": LLMatcher.grammar_from_regex("((a{1,100}){1,100}){1,100}"),
    "references": chained(doubled, length=100),
    "conjunctions of references": chained(lambda reference: {"allOf": [{"$ref": reference}, {"$ref": reference}]}, length=20),
    "enum": json_of({"enum": [f"v{index}" for index in range(10_000)]}),
    "choices": choice_grammar(f"c{index}" for index in range(10_000)),
    "lengths": json_of({"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 10**6}, "maxItems": 10**6}),
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tiny_model_proto())
    return path


@pytest.fixture
async def check(tokenizer_path: Path) -> AsyncGenerator[GrammarCheck]:
    """With little time for each grammar, so that slow ones end soon."""
    async with grammar_check(tokenizer_path, grammar_timeout_s=0.5) as check:
        yield check


@asynccontextmanager
async def grammar_check(tokenizer_path: Path, **limits: Any) -> AsyncIterator[GrammarCheck]:
    vocab_size = tiny_tokenizer().vocab_size
    async with GrammarCheck(tokenizer_path=tokenizer_path, vocab_size=vocab_size, eos_token=2, limits=replace(Limits(), **limits)) as check:
        yield check


async def reason(check: GrammarCheck, grammar: str, *, tenant: str = "") -> str:
    """Why a grammar is refused."""
    with pytest.raises(InvalidRequest) as refused:
        await verdict(check, grammar, tenant=tenant)
    assert refused.value.param == "structured_outputs"
    return refused.value.message


async def verdict(check: GrammarCheck, grammar: str, *, tenant: str) -> str:
    """A machine that is too busy to find out is asked again, as a client would."""
    while True:
        with suppress(Unavailable):
            return await check.check(grammar, param="structured_outputs", tenant=tenant)


@asynccontextmanager
async def no_stall() -> AsyncIterator[None]:
    """The event loop comes round all the time: its thread never works long at a stretch, however busy the machine is."""
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before_s = time.thread_time()
            await asyncio.sleep(0.002)
            longest_s = max(longest_s, time.thread_time() - before_s)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
    assert longest_s < MAX_STALL_S, f"the event loop stood still for {longest_s * 1000:.0f} ms"


def workers(parent: int | None = None) -> list[int]:
    """The processes that check grammars, of this process or another."""
    parent = parent or os.getpid()
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"server.grammar_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


async def until_ready(check: GrammarCheck, *, tenant: str = "warming") -> list[int]:
    """Both workers, once they have started."""
    await check.check(f"start: /{tenant}/", param=None, tenant=tenant)
    give_up_s = time.monotonic() + 20
    while len(running := [pid for pid in workers() if has_started(pid)]) < 2:
        assert time.monotonic() < give_up_s
        await asyncio.sleep(0.02)
    return running


def has_started(pid: int) -> bool:
    """Whether it takes grammars: it has no place to complain to from then on."""
    return os.path.realpath(f"/proc/{pid}/fd/2") == os.devnull


async def test_a_good_grammar_passes_as_it_is(check: GrammarCheck):
    for grammar in (GOOD, json_of({"type": "object"}), LLMatcher.grammar_from_regex("a+")):
        assert await check.check(grammar, param="structured_outputs") == grammar


async def test_ebnf_comes_back_as_the_engine_takes_it(check: GrammarCheck):
    ebnf = 'root ::= "a" digit\ndigit ::= [0-9]'

    lark = await check.check(ebnf, param=None)

    assert "start:" in lark
    assert await check.check(lark, param=None) == lark
    assert await check.check(ebnf, param=None) == lark


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_grammar_is_refused_with_its_reason_and_the_next_one_is_checked(tokenizer_path: Path, name: str):
    grammar, told = HOSTILE[name]
    async with grammar_check(tokenizer_path, grammar_timeout_s=10.0) as check:
        await until_ready(check)

        async with no_stall():
            message = await reason(check, grammar)
            await check.check(GOOD, param=None)

    assert told in message
    assert len(message) <= Limits().max_message_chars


@pytest.mark.parametrize("name", SLOW_ONES)
async def test_a_grammar_that_takes_too_long_is_ended(check: GrammarCheck, name: str):
    await until_ready(check)

    async with no_stall():
        message = await reason(check, SLOW_ONES[name])
        await check.check(GOOD, param=None)

    assert "longer than 0.5 seconds" in message


@pytest.mark.parametrize("name", ONLY_LOOKS_HOSTILE)
async def test_what_only_looks_hostile_passes(check: GrammarCheck, name: str):
    await check.check(ONLY_LOOKS_HOSTILE[name], param=None)


async def test_a_grammar_at_the_cap_of_its_size_is_checked_and_one_past_it_is_not(tokenizer_path: Path):
    async with grammar_check(tokenizer_path, max_grammar_chars=100) as check:
        await check.check(GOOD.ljust(100), param=None)

        message = await reason(check, GOOD.ljust(101))

    assert "101 characters, the limit is 100" in message


async def test_more_time_and_memory_let_more_through(tokenizer_path: Path):
    takes_half_a_second = chain_of_rules(2500)  # to read, and then it nests too deeply
    takes_50_mib = "start: R0\n" + "".join(f"R{index}: R{index + 1} R{index + 1}\n" for index in range(40)) + 'R40: "x"'

    async with grammar_check(tokenizer_path, grammar_timeout_s=0.1) as check:
        assert "longer than 0.1 seconds" in await reason(check, takes_half_a_second)
    async with grammar_check(tokenizer_path, grammar_timeout_s=10.0) as check:
        assert "nests too deeply" in await reason(check, takes_half_a_second)
    async with grammar_check(tokenizer_path, grammar_memory_bytes=2**24) as check:
        assert "more than 16 MiB" in await reason(check, takes_50_mib)
    async with grammar_check(tokenizer_path, grammar_memory_bytes=2**28) as check:
        assert "too big" in await reason(check, takes_50_mib)


async def test_a_verdict_is_kept(check: GrammarCheck):
    await check.check(GOOD, param=None)
    first = await reason(check, SLOW)
    for pid in await until_ready(check):
        os.kill(pid, signal.SIGSTOP)  # who asks one now is told to come again

    await check.check(GOOD, param=None)
    with pytest.raises(InvalidRequest) as second:
        await check.check(SLOW, param="structured_outputs")

    assert first == second.value.message


async def test_requests_with_the_same_grammar_wait_for_one_verdict(check: GrammarCheck):
    before = {*await until_ready(check)}

    messages = await asyncio.gather(*(reason(check, SLOW) for _ in range(20)))

    assert len(set(messages)) == 1
    assert len(before & {*workers()}) == 1  # one was ended, and one only


async def test_one_tenants_hostile_grammars_leave_a_worker_to_the_others(tokenizer_path: Path):
    async with grammar_check(tokenizer_path, grammar_timeout_s=3.0) as check:
        await until_ready(check)
        hostile = [asyncio.create_task(reason(check, f"{SLOW}\n# {index}", tenant="mallory")) for index in range(3)]
        await asyncio.sleep(0.1)

        for index in range(20):
            await check.check(f'start: "{index}"', param=None, tenant="ann")

        assert not any(task.done() for task in hostile)
        for task in hostile:
            task.cancel()
        await asyncio.gather(*hostile, return_exceptions=True)


async def test_more_grammars_than_may_wait_are_told_to_come_again(tokenizer_path: Path):
    async with grammar_check(tokenizer_path, max_queued_grammars=2, grammar_timeout_s=0.5) as check:
        await until_ready(check)
        running = asyncio.create_task(check.check(SLOW, param=None, tenant="mallory"))
        await asyncio.sleep(0.1)
        waiting = [asyncio.create_task(check.check(f'start: "{index}"', param=None, tenant="mallory")) for index in range(2)]
        await asyncio.sleep(0)

        with pytest.raises(Unavailable) as refused:
            await check.check('start: "one too many"', param=None, tenant="mallory")
        await check.check(GOOD, param=None, tenant="ann")

        assert refused.value.code == "server_overloaded"
        with pytest.raises(InvalidRequest):
            await running
        assert [type(outcome) for outcome in await asyncio.gather(*waiting, return_exceptions=True)] == [str, Unavailable]


async def test_a_grammar_whose_clients_left_is_not_checked(tokenizer_path: Path):
    async with grammar_check(tokenizer_path, max_queued_grammars=1, grammar_timeout_s=0.5) as check:
        before = {*await until_ready(check)}
        running = asyncio.create_task(reason(check, SLOW, tenant="ann"))
        await asyncio.sleep(0.1)

        for index in range(5):
            leaving = asyncio.create_task(check.check(f"{SLOW}\n# {index}", param=None, tenant="ann"))
            await asyncio.sleep(0.01)
            assert not leaving.done()
            leaving.cancel()

        await running
        await check.check(GOOD, param=None, tenant="ann")
        assert len(before & {*workers()}) == 1  # one grammar ended one worker


async def test_a_worker_that_somebody_kills_costs_no_verdict(check: GrammarCheck):
    for pid in await until_ready(check):
        os.kill(pid, signal.SIGKILL)

    await check.check(GOOD, param=None)

    running = asyncio.create_task(reason(check, SLOW))
    await asyncio.sleep(0.1)
    for pid in filter(has_started, workers()):
        os.kill(pid, signal.SIGKILL)
    assert "longer than 0.5 seconds" in await running


async def test_a_worker_that_stands_still_is_replaced_and_its_client_told_to_come_again(tokenizer_path: Path):
    async with grammar_check(tokenizer_path, grammar_timeout_s=0.2) as check:
        for pid in await until_ready(check):
            os.kill(pid, signal.SIGSTOP)

        one_each = (check.check(GOOD.replace("3", limit), param=None) for limit in "45")
        refused = await asyncio.gather(*one_each, return_exceptions=True)

        assert [error.code for error in refused if isinstance(error, Unavailable)] == ["server_overloaded"] * 2
        await check.check(GOOD, param=None)


async def test_where_no_worker_can_be_started_clients_are_told_to_come_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    async with grammar_check(tmp_path / "missing.model") as check:
        with pytest.raises(Unavailable):
            await check.check(GOOD, param=None)

    assert "missing.model" in capfd.readouterr().err


async def test_closing_ends_the_workers_and_tells_who_waits(tokenizer_path: Path):
    async with grammar_check(tokenizer_path) as check:
        running = await until_ready(check)
        waiting = asyncio.create_task(check.check(SLOW, param=None))
        await asyncio.sleep(0.1)

    with pytest.raises(Unavailable) as refused:
        await waiting
    assert refused.value.code == "shutting_down"
    assert not workers()
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)


async def test_a_worker_is_there_ahead_of_the_first_grammar(check: GrammarCheck):
    check.start()
    give_up_s = time.monotonic() + 20
    while not (running := workers()) or not has_started(running[0]):
        assert time.monotonic() < give_up_s
        await asyncio.sleep(0.02)

    assert len(running) == 1


@pytest.mark.parametrize("grammar", [GOOD, SLOW], ids=["idle", "busy"])
async def test_no_worker_outlives_its_server(tokenizer_path: Path, grammar: str):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tokenizer_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdin is not None
    server.stdin.write(grammar)
    server.stdin.close()
    server.stdout.readline()
    running = workers(server.pid)

    server.kill()
    server.wait()
    server.stdout.close()

    assert len(running) == 2
    give_up_s = time.monotonic() + 2
    while any(Path(f"/proc/{pid}").exists() for pid in running):
        assert time.monotonic() < give_up_s, "a worker lives on"
        await asyncio.sleep(0.02)


SERVER = """
import asyncio, sys
from pathlib import Path
from server.grammar_check import GrammarCheck
from server.limits import Limits

async def main():
    async with GrammarCheck(tokenizer_path=Path(sys.argv[1]), vocab_size=420, eos_token=2, limits=Limits(grammar_timeout_s=30.0)) as check:
        await check.check('start: "a"', param=None)
        checking = asyncio.create_task(check.check(sys.stdin.read(), param=None))
        await asyncio.sleep(0.5)
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""
