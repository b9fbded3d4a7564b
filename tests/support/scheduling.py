"""A scheduler without a device: sequences are queued by a line each, and every token that a step chooses is a 7."""

from engine.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.prefix_cache import PrefixCache
from engine.scheduler import Schedule, Scheduler
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams

BLOCK_SIZE = 4


def scheduler_of(*, num_blocks: int = 100, max_num_seqs: int = 8, budget: int = 16, block_size: int = BLOCK_SIZE) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=2000)
    pool = BlockPool(num_blocks)
    return Scheduler(config, pool, PrefixCache(pool, block_size=block_size), block_size=block_size)


def sequence_of(arrival: int, prompt: tuple[int, ...], *, max_tokens: int = 20, tenant: str = "", priority: int = 0) -> Sequence:
    request = GenerationRequest(
        request_id=str(arrival),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        tenant=tenant,
        priority=priority,
    )
    return Sequence(request=request, arrival=arrival, token_ids=list(prompt))


def add(
    scheduler: Scheduler,
    arrival: int,
    num_prompt: int,
    *,
    max_tokens: int = 20,
    first: int | None = None,
    tenant: str = "",
    priority: int = 0,
) -> Sequence:
    """Queue a sequence; `arrival` is its age and name. Its prompt is its own, or counts up from `first`."""
    start = 1000 * arrival if first is None else first
    sequence = sequence_of(arrival, tuple(range(start, start + num_prompt)), max_tokens=max_tokens, tenant=tenant, priority=priority)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[int, int]:
    """Schedule a step and enter its result at once. Tokens computed by arrival, in schedule order."""
    schedule = scheduler.schedule()
    commit(scheduler, schedule)
    return {item.sequence.arrival: item.num_tokens for item in schedule.items}


def commit(scheduler: Scheduler, schedule: Schedule) -> None:
    """Every chosen token is a 7; who has all its tokens leaves."""
    for item in schedule.items:
        if item.chooses_token and not item.sequence.is_over:
            item.sequence.token_ids.append(7)
            item.sequence.num_pending_tokens -= 1
            if len(item.sequence.token_ids) == item.sequence.max_len:
                item.sequence.is_over = True
                scheduler.remove(item.sequence)
