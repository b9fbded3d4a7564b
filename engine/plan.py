"""Plan: whether a model fits a machine, with the numbers, and what would fit where it does not.

`grok-server plan` asks it by way of `engine/plan_query.py`, about any machine; an engine asks it about its own before it loads anything
(`engine/memory_check.py`). Needs neither weights nor the devices that it is about: everything comes from `engine/footprint.py`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.config import MeshConfig, blocks_per_sequence, mesh_of
from engine.errors import ConfigError
from engine.footprint import (
    Device,
    Setup,
    Speed,
    Weights,
    check_int4_groups,
    kv_bytes_per_token,
    payload_bytes,
    speeds,
    temporary_bytes,
    weights_by_kind,
)
from engine.sharding import check_widths

BATCHES = (1, 8, 32, 128)
SPEED_CONTEXT = 2048  # tokens of each sequence, where speeds are given
CONTEXTS = (2048, 8192)  # besides the longest
MOST_DEVICES = 16  # that an alternative may ask for
CONTEXT_STEP = 256  # tokens: of shorter contexts, the multiples are offered


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be served, on what."""

    setup: Setup
    device: Device
    memory_share: float = 1.0
    cache_bytes: int | None = None  # of one data shard; None: all that is left
    step_bytes: int | None = None  # temporaries of the compiled step, where it was compiled for such a device


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Sequences of one context length that the cache holds at the same time, over all devices."""

    context: int
    num_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another setup that fits, in words and numbers."""

    change: str
    num_devices: int
    weight_bytes: int  # on each device
    cache_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer. Bytes are those of one device, unless said otherwise."""

    question: Question
    payload_bytes: int  # of the whole model as it is released
    weights: list[Weights]
    temporaries: dict[str, int]  # by buffer; an upper bound where the step was not compiled for the device
    usable_bytes: int
    cache_bytes: int  # left for the KV cache; negative where the rest does not fit already
    kv_bytes_per_token: int
    cache_blocks: int  # of one data shard; the scratch block, which takes as much as any, is not one of them
    cache_tokens: int  # over all devices
    capacities: list[Capacity]
    speeds: list[Speed]
    problem: str | None  # why it does not fit
    alternatives: list[Alternative]

    @property
    def weight_bytes(self) -> int:
        return sum(each.device_bytes for each in self.weights)

    @property
    def block_bytes(self) -> int:
        """Of one block of the cache, on one device."""
        return self.question.setup.block_size * self.kv_bytes_per_token

    @property
    def largest_cache_bytes(self) -> int:
        """Of the largest cache of a data shard that there is room for, over its devices, as `--kv-cache-memory-bytes` counts it."""
        return max(0, self.cache_bytes // self.block_bytes - 1) * self.block_bytes * self.question.setup.shard_size


def make_plan(question: Question, *, seeks_alternatives: bool = True) -> Plan:
    """The plan for a setup whose mesh and int4 groups divide the model. Raises `ConfigError` where they do not."""
    setup, device = question.setup, question.device
    check_widths(setup.mesh, setup.model)
    check_int4_groups(setup)
    weights = weights_by_kind(setup)
    temporaries = temporary_bytes(setup, device, step_bytes=question.step_bytes)
    usable = int(device.memory_bytes * question.memory_share) // device.num_sharing
    room = usable - sum(each.device_bytes for each in weights) - sum(temporaries.values())
    per_token = kv_bytes_per_token(setup)
    block_bytes = setup.block_size * per_token
    blocks = room // block_bytes - 1 if question.cache_bytes is None else question.cache_bytes // (block_bytes * setup.shard_size)
    blocks = max(0, blocks)
    tokens = blocks * setup.block_size * setup.mesh.data
    longest = setup.scheduler.max_model_len
    contexts = sorted({*(context for context in CONTEXTS if context < longest), longest})
    plan = Plan(
        question=question,
        payload_bytes=payload_bytes(setup.model),
        weights=weights,
        temporaries=temporaries,
        usable_bytes=usable,
        cache_bytes=room,
        kv_bytes_per_token=per_token,
        cache_blocks=blocks,
        cache_tokens=tokens,
        capacities=[
            Capacity(context=context, num_sequences=blocks // -(-context // setup.block_size) * setup.mesh.data) for context in contexts
        ],
        speeds=list(speeds(setup, device, context=min(SPEED_CONTEXT, longest), batches=BATCHES)),
        problem=None,
        alternatives=[],
    )
    problem = _problem(plan)
    if problem is None:
        return plan
    return replace(plan, problem=problem, alternatives=list(_alternatives(plan)) if seeks_alternatives else [])


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as it travels to whoever draws it."""
    return {**asdict(plan), "weight_bytes": plan.weight_bytes}


def _problem(plan: Plan) -> str | None:
    setup, device = plan.question.setup, plan.question.device
    each = "the memory" if device.is_host and device.num_sharing == 1 else "each device"
    usable = _usable(plan)
    if plan.cache_bytes <= 0:
        return (
            f"the weights take {plan.weight_bytes / 1e9:,.1f} GB of {each} and a step's own buffers "
            f"{'' if device.is_host else 'up to '}{sum(plan.temporaries.values()) / 1e9:,.1f} GB; {usable}"
        )
    if plan.question.cache_bytes is not None:
        cache_bytes = (plan.cache_blocks + 1) * plan.block_bytes
        if cache_bytes <= plan.cache_bytes:
            return None
        return (
            f"the KV cache takes {cache_bytes / 1e9:,.2f} GB of {each}, where beside weights and buffers "
            f"{plan.cache_bytes / 1e9:,.2f} GB are left; {usable}"
        )
    tokens = plan.cache_blocks * setup.block_size
    longest = setup.scheduler.max_model_len
    if plan.cache_blocks < blocks_per_sequence(setup.scheduler, setup.block_size):
        left = max(0, plan.cache_bytes) / 1e9
        return f"the {left:,.2f} GB that are left of {each} hold {tokens:,} tokens, one sequence of the longest context is {longest:,}"
    return None


def _usable(plan: Plan) -> str:
    device, usable_gb = plan.question.device, f"{plan.usable_bytes / 1e9:,.1f} GB"
    if not device.is_host:
        share = plan.question.memory_share
        return f"{share:.0%} of a {device.name} are {usable_gb}" if share < 1 else f"{usable_gb} of a {device.name} may be used"
    has = f"the host has {device.memory_bytes / 1e9:,.1f} GB"
    return has if device.num_sharing == 1 else f"{has}, {usable_gb} for each of {device.num_sharing} devices"


def _alternatives(plan: Plan) -> Iterator[Alternative]:
    """Setups near the one asked for that fit: a smaller cache, 4 bits, more devices, both, a cache of 8 bits, a shorter context."""
    question = plan.question
    setup, is_host = question.setup, question.device.is_host
    unbounded = replace(question, cache_bytes=None)
    if question.cache_bytes is not None and (found := _fitting(unbounded)) is not None:
        yield _alternative(found, question, change=f"a smaller cache (--kv-cache-memory-bytes {found.largest_cache_bytes})")
    for weights in ("int8", "int4") if is_host and setup.weights not in ("int8", "int4") else dict.fromkeys((setup.weights, "int4")):
        for num_devices in [setup.shard_size] if is_host else _doubled(setup):
            changed = _with(question, weights=weights, mesh=_widened(setup, num_devices))
            if (found := _fitting(changed)) is not None:
                yield _alternative(found, question)
                break
    if setup.kv not in ("int8", "fp8") and question.cache_bytes is None and (found := _fitting(_with(question, kv="int8"))) is not None:
        yield _alternative(found, question)
    largest = make_plan(unbounded, seeks_alternatives=False).cache_blocks * setup.block_size
    shorter = largest // CONTEXT_STEP * CONTEXT_STEP
    if 0 < shorter < setup.scheduler.max_model_len:
        scheduler = replace(setup.scheduler, max_model_len=shorter)
        if (found := _fitting(_with(unbounded, scheduler=scheduler))) is not None:
            yield _alternative(found, question)


def _doubled(setup: Setup) -> Iterator[int]:
    num_devices = setup.shard_size
    while setup.mesh.data * num_devices <= MOST_DEVICES:
        yield num_devices
        num_devices *= 2


def _widened(setup: Setup, num_devices: int) -> MeshConfig:
    return mesh_of(setup.model, num_devices=num_devices, data=setup.mesh.data, is_expert_parallel=setup.mesh.expert > 1)


def _with(question: Question, **changes: object) -> Question:
    return replace(question, setup=replace(question.setup, **changes))


def _fitting(question: Question) -> Plan | None:
    try:
        plan = make_plan(question, seeks_alternatives=False)
    except ConfigError:
        return None
    return None if plan.problem else plan


def _alternative(plan: Plan, asked: Question, *, change: str = "") -> Alternative:
    setup, before = plan.question.setup, asked.setup
    changes = [change] if change else []
    if setup.num_devices != before.num_devices:
        changes.append(f"{setup.num_devices} devices (--tensor-parallel-size {setup.shard_size})")
    if setup.weights != before.weights:
        kept = " kept packed (--cpu-weights packed)" if plan.question.device.is_host else ""
        changes.append(f"{setup.weights} weights{kept}")
    if setup.kv != before.kv:
        changes.append(f"a cache in {setup.kv} (--kv-cache-dtype {setup.kv})")
    if setup.scheduler.max_model_len != before.scheduler.max_model_len:
        changes.append(f"a context of {setup.scheduler.max_model_len:,} tokens (--max-model-len {setup.scheduler.max_model_len})")
    return Alternative(
        change=", ".join(changes), num_devices=setup.num_devices, weight_bytes=plan.weight_bytes, cache_tokens=plan.cache_tokens
    )
