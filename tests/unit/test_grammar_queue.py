"""Whose grammar is checked next, and who is sent away when too many wait."""

import asyncio

import pytest

from server.grammar_queue import GrammarJob, GrammarQueue, QueueFullError

pytestmark = pytest.mark.anyio


def job(tenant: str, text: str = "") -> GrammarJob:
    return GrammarJob(key=b"", text=text, tenant=tenant, outcome=asyncio.get_running_loop().create_future())


async def waits_for(queue: GrammarQueue) -> "asyncio.Task[GrammarJob]":
    """A worker that has found nothing it may run."""
    getting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    assert not getting.done()
    return getting


async def test_grammars_of_one_tenant_are_checked_in_order():
    queue = GrammarQueue(max_len=4)
    first, second = job("ann"), job("ann")
    queue.put(first)
    queue.put(second)

    assert await queue.get() is first
    queue.done(first)
    assert await queue.get() is second


async def test_a_tenant_that_asks_for_hundreds_does_not_come_before_others():
    queue = GrammarQueue(max_len=400)
    for _ in range(300):
        queue.put(job("ann"))
    await queue.get()
    bobs = job("bob")
    queue.put(bobs)

    assert await queue.get() is bobs


async def test_tenants_take_turns():
    queue = GrammarQueue(max_len=8)
    for tenant in ("ann", "ann", "ann", "bob", "bob", "cyd"):
        queue.put(job(tenant))

    order: list[str] = []
    for _ in range(6):
        running = await queue.get()
        order.append(running.tenant)
        queue.done(running)

    assert order == ["ann", "bob", "cyd", "ann", "bob", "ann"]


async def test_a_named_tenant_has_one_check_at_a_time():
    queue = GrammarQueue(max_len=4)
    first, second = job("ann"), job("ann")
    queue.put(first)
    queue.put(second)
    await queue.get()

    getting = await waits_for(queue)
    queue.done(first)

    assert await getting is second


async def test_the_nameless_may_be_many_and_share_the_workers():
    queue = GrammarQueue(max_len=4)
    queue.put(job(""))
    queue.put(job(""))

    await queue.get()
    await queue.get()


async def test_the_nameless_wait_while_a_named_tenant_has_no_check_under_way():
    queue = GrammarQueue(max_len=4)
    queue.put(job(""))
    await queue.get()
    queue.put(job(""))
    anns = job("ann")
    queue.put(anns)

    assert await queue.get() is anns


async def test_a_worker_is_woken_by_what_comes():
    queue = GrammarQueue(max_len=4)
    getting = await waits_for(queue)
    other = await waits_for(queue)
    new = job("ann")

    queue.put(new)

    assert await getting is new
    assert not other.done()
    other.cancel()


async def test_a_full_queue_takes_no_more_of_whoever_fills_it():
    queue = GrammarQueue(max_len=2)
    queue.put(job("ann"))
    queue.put(job("ann"))

    with pytest.raises(QueueFullError):
        queue.put(job("ann"))


async def test_a_full_queue_sends_the_last_of_the_greediest_away_for_another():
    queue = GrammarQueue(max_len=3)
    kept, also_kept, sent_away = job("ann"), job("ann"), job("ann")
    for each in (kept, also_kept, sent_away):
        queue.put(each)
    bobs = job("bob")

    queue.put(bobs)

    assert isinstance(sent_away.outcome.exception(), QueueFullError)
    assert not kept.outcome.done()
    assert not also_kept.outcome.done()
    assert {await queue.get(), await queue.get()} == {kept, bobs}


async def test_a_full_queue_of_equals_sends_nobody_away():
    queue = GrammarQueue(max_len=2)
    queue.put(job("ann"))
    queue.put(job("bob"))

    with pytest.raises(QueueFullError):
        queue.put(job("cyd"))


async def test_what_is_put_back_comes_before_its_tenants_others():
    queue = GrammarQueue(max_len=4)
    first, second = job("ann"), job("ann")
    queue.put(first)
    queue.put(second)

    assert await queue.get() is first
    queue.put_back(first)
    queue.done(first)

    assert await queue.get() is first


async def test_what_nobody_wants_any_more_leaves_the_queue():
    queue = GrammarQueue(max_len=4)
    unwanted, wanted = job("ann"), job("ann")
    queue.put(unwanted)
    queue.put(wanted)

    assert queue.discard(unwanted)
    assert not queue.discard(unwanted)
    assert await queue.get() is wanted
    assert not queue.discard(wanted)
