"""Plan: whether a model fits a machine, with the numbers, and what would fit where it does not.

`python -m engine.plan` reads a `Query` as JSON from standard input and answers with a plan as JSON; `grok-server plan` asks it and draws
the table. Needs neither weights nor the devices that it is about: everything comes from `engine/footprint.py`.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace

import msgspec

from engine.config import DType, MeshConfig, ModelConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.footprint import (
    DEVICES,
    Device,
    KVFormat,
    Setup,
    Speed,
    WeightFormat,
    Weights,
    kv_bytes_per_token,
    payload_bytes,
    speeds,
    temporary_bytes,
    weights_by_kind,
)

BATCHES = (1, 8, 32, 128)
SPEED_CONTEXT = 2048  # tokens of each sequence, where speeds are given
CONTEXTS = (2048, 8192)  # besides the longest
MOST_DEVICES = 16  # that an alternative may ask for


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be served, on what."""

    setup: Setup
    device: Device
    memory_share: float


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
    temporaries: dict[str, int]  # an upper bound, by buffer
    usable_bytes: int
    cache_bytes: int  # left for the KV cache; negative where the rest does not fit already
    kv_bytes_per_token: int
    cache_tokens: int  # over all devices
    capacities: list[Capacity]
    speeds: list[Speed]
    problem: str | None  # why it does not fit
    alternatives: list[Alternative]

    @property
    def weight_bytes(self) -> int:
        return sum(each.device_bytes for each in self.weights)


def make_plan(question: Question, *, seeks_alternatives: bool = True) -> Plan:
    """The plan for a setup whose mesh divides the model. Raises `ConfigError` where it does not."""
    setup, device = question.setup, question.device
    check_mesh(setup)
    weights = weights_by_kind(setup)
    temporaries = temporary_bytes(setup)
    usable = int(device.memory_bytes * question.memory_share)
    room = usable - sum(each.device_bytes for each in weights) - sum(temporaries.values())
    per_token = kv_bytes_per_token(setup)
    tokens = max(0, room // per_token) * setup.mesh.data
    longest = setup.scheduler.max_model_len
    contexts = sorted({*(context for context in CONTEXTS if context < longest), longest})
    problem = _problem(question, weights, temporaries, room=room, tokens=tokens)
    return Plan(
        question=question,
        payload_bytes=payload_bytes(setup.model),
        weights=weights,
        temporaries=temporaries,
        usable_bytes=usable,
        cache_bytes=room,
        kv_bytes_per_token=per_token,
        cache_tokens=tokens,
        capacities=[Capacity(context=context, num_sequences=tokens // context) for context in contexts],
        speeds=list(speeds(setup, device, context=min(SPEED_CONTEXT, longest), batches=BATCHES)),
        problem=problem,
        alternatives=_alternatives(question) if problem and seeks_alternatives else [],
    )


def check_mesh(setup: Setup) -> None:
    """Raises `ConfigError` for widths that do not divide."""
    model, mesh = setup.model, setup.mesh
    heads = mesh.tensor * mesh.expert
    if model.num_kv_heads % heads and heads % model.num_kv_heads:
        raise ConfigError(
            f"{heads} devices share the attention of a model with {model.num_kv_heads} kv heads: give a divisor or a multiple of "
            f"{model.num_kv_heads} as --tensor-parallel-size"
        )
    if model.num_q_heads % heads:
        raise ConfigError(f"--tensor-parallel-size {heads} does not divide the {model.num_q_heads} query heads")
    if model.ffn_size % mesh.tensor:
        raise ConfigError(f"--tensor-parallel-size {mesh.tensor} does not divide the experts' width of {model.ffn_size:,}")
    if model.num_experts % mesh.expert:
        raise ConfigError(f"expert parallelism over {mesh.expert} devices does not divide {model.num_experts} experts")


def _problem(question: Question, weights: list[Weights], temporaries: dict[str, int], *, room: int, tokens: int) -> str | None:
    need = sum(each.device_bytes for each in weights)
    longest = question.setup.scheduler.max_model_len
    if room <= 0:
        buffers, usable = sum(temporaries.values()), question.device.memory_bytes * question.memory_share
        return (
            f"the weights take {need / 1e9:,.1f} GB of each device and a step's own buffers up to {buffers / 1e9:,.1f} GB; "
            f"{question.memory_share:.0%} of a {question.device.name} are {usable / 1e9:,.1f} GB"
        )
    if tokens // question.setup.mesh.data < longest:
        return (
            f"the {room / 1e9:,.2f} GB that are left of each device hold {tokens // question.setup.mesh.data:,} tokens, "
            f"one sequence of the longest context is {longest:,}"
        )
    return None


def _alternatives(question: Question) -> list[Alternative]:
    """Setups near the one asked for that fit: 4 bits, more devices, both, a shorter context."""
    setup = question.setup
    found: list[Alternative] = []
    for weights in dict.fromkeys((setup.weights, "int4")):
        num_devices = setup.mesh.tensor
        while setup.mesh.data * num_devices * setup.mesh.expert <= MOST_DEVICES:
            changed = replace(setup, weights=weights, mesh=replace(setup.mesh, tensor=num_devices))
            if (plan := _fitting(question, changed)) is not None:
                found.append(_alternative(plan, setup))
                break
            num_devices *= 2
    tokens = make_plan(question, seeks_alternatives=False).cache_tokens // setup.mesh.data
    shorter = tokens // 256 * 256
    if shorter:
        changed = replace(setup, scheduler=replace(setup.scheduler, max_model_len=shorter))
        if (plan := _fitting(question, changed)) is not None:
            found.append(_alternative(plan, setup))
    return found


def _fitting(question: Question, setup: Setup) -> Plan | None:
    try:
        plan = make_plan(replace(question, setup=setup), seeks_alternatives=False)
    except ConfigError:
        return None
    return None if plan.problem else plan


def _alternative(plan: Plan, asked: Setup) -> Alternative:
    setup = plan.question.setup
    changes: list[str] = []
    if setup.num_devices != asked.num_devices:
        changes.append(f"{setup.num_devices} devices (--tensor-parallel-size {setup.mesh.tensor})")
    if setup.weights != asked.weights:
        changes.append(f"{setup.weights} weights")
    if setup.scheduler.max_model_len != asked.scheduler.max_model_len:
        changes.append(f"a context of {setup.scheduler.max_model_len:,} tokens (--max-model-len {setup.scheduler.max_model_len})")
    return Alternative(
        change=", ".join(changes), num_devices=setup.num_devices, weight_bytes=plan.weight_bytes, cache_tokens=plan.cache_tokens
    )


def mesh_of(*, num_devices: int, data: int, is_expert_parallel: bool) -> MeshConfig:
    """The mesh that the flags mean: `num_devices` share each matrix, or hold whole experts."""
    return MeshConfig(data=data, expert=num_devices) if is_expert_parallel else MeshConfig(data=data, tensor=num_devices)


class Query(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A `Question` as it travels."""

    model: ModelConfig
    device: str  # one of `footprint.DEVICES`
    device_bytes: int | None = None  # where it has another memory than that one
    num_devices: int = 1  # that share each matrix, or hold whole experts
    data_parallel: int = 1
    is_expert_parallel: bool = False
    weights: WeightFormat = "int8"
    kv: KVFormat | None = None  # None: as the activations
    dtype: DType = "bfloat16"
    scheduler: SchedulerConfig
    memory_share: float = 0.9

    def question(self) -> Question:
        """Raises `ConfigError` for a device that nobody knows."""
        device = DEVICES.get(self.device)
        if device is None:
            raise ConfigError(f"--device: {self.device} is none of {', '.join(DEVICES)}; take a near one and give its --device-memory")
        if self.device_bytes is not None:
            device = replace(device, memory_bytes=self.device_bytes)
        return Question(
            setup=Setup(
                model=self.model,
                mesh=mesh_of(num_devices=self.num_devices, data=self.data_parallel, is_expert_parallel=self.is_expert_parallel),
                scheduler=self.scheduler,
                weights=self.weights,
                kv=self.kv or self.dtype,
                dtype=self.dtype,
            ),
            device=device,
            memory_share=self.memory_share,
        )


def main() -> int:
    """Standard input to standard output; a question that makes no sense is an error object and status 2."""
    try:
        plan = make_plan(msgspec.json.decode(sys.stdin.buffer.read(), type=Query).question())
    except (ConfigError, msgspec.DecodeError) as error:
        print(json.dumps({"error": str(error)}))
        return 2
    print(json.dumps({**asdict(plan), "weight_bytes": plan.weight_bytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
