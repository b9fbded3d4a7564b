"""Footprint: how many bytes a model takes on each device of a mesh, what is left for the cache, and what speed to expect.

Counted from the declarations in `engine/model/params.py` and the table in `engine/sharding.py`, so it is right before anything is loaded:
`grok-server plan` prints it for machines that are somewhere else, and an engine looks at it before it loads. Nothing here touches a device.

Temporaries are an upper bound, the sum of the named buffers that a step may hold at the same time; what a compiler reuses makes it less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, lcm, prod
from typing import Literal

from engine.config import DType, KVDType, MeshConfig, ModelConfig, SchedulerConfig, kv_head_bytes
from engine.errors import ConfigError
from engine.model.params import Axis, ParamSpec, each_spec, param_specs
from engine.sharding import RULES, num_cached_heads

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4")

BYTES = {"float32": 4, "bfloat16": 2}
SCALE_BYTES = 2  # bfloat16
SLOT_BYTES_PER_TOKEN = 10.125  # of the vocabulary, per running sequence: counts, biases, two flags and a bit of its mask
NUM_SAMPLING_ARRAYS = 6  # over rows x vocabulary, float32, alive at the same time while tokens are chosen
SCORED_ROWS = 128  # positions whose logits exist at the same time
FIXED_BYTES = 1 << 30  # of a device: the runtime's own, and the programs

BANDWIDTH_SHARE = 0.75  # of the data sheet's, that a step reaches; an assumption
REDUCE_S = 12e-6  # one all-reduce of a step's activations; an assumption
REDUCES_PER_LAYER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What matters of one accelerator, as its maker gives it; memory as its driver reports it. Or the host, where a CPU computes."""

    name: str
    memory_bytes: int
    bytes_per_s: float | None = None  # None: nobody told, so no speeds are expected
    flops: float = 0.0  # bfloat16, dense, a second
    is_host: bool = False
    num_sharing: int = 1  # devices that have this memory together


MIB = 1 << 20
DEVICES = {
    device.name: device
    for device in (
        Device(name="a100-80", memory_bytes=81_920 * MIB, bytes_per_s=2.04e12, flops=312e12),
        Device(name="h100-80", memory_bytes=81_559 * MIB, bytes_per_s=3.35e12, flops=989e12),
        Device(name="h200", memory_bytes=143_771 * MIB, bytes_per_s=4.8e12, flops=989e12),
        Device(name="b200", memory_bytes=183_359 * MIB, bytes_per_s=8.0e12, flops=2250e12),
        Device(name="mi300x", memory_bytes=196_592 * MIB, bytes_per_s=5.3e12, flops=1307e12),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of one kind, on one device."""

    kind: str
    num_params: int  # of the whole model
    device_bytes: int
    placed: str  # "sharded over 8" or "replicated"
    stored: str  # the form on the device, with what it was cast from


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Expected decoding at one batch size; `ideal` is at the data sheet's bandwidth and without collectives."""

    batch: int
    ideal_tokens_per_s: float
    expected_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is to be served, and how."""

    model: ModelConfig
    mesh: MeshConfig
    scheduler: SchedulerConfig
    weights: WeightFormat
    kv: KVDType
    dtype: DType  # of activations and the embedding
    block_size: int = 16  # tokens per block of the cache
    int4_group: int = 128  # rows that share a scale, of int4

    @property
    def num_devices(self) -> int:
        return self.mesh.data * self.shard_size

    @property
    def shard_size(self) -> int:
        """Devices that share the weights and the cache of one replica."""
        return self.mesh.expert * self.mesh.tensor


def payload_bytes(model: ModelConfig) -> int:
    """Of the released form, before any cast: int8 with bfloat16 scales, the rest float32."""
    return sum(_released_bytes(spec, model) for spec in each_spec(param_specs(model)))


def check_int4_groups(setup: Setup) -> None:
    """Raises `ConfigError` where matrices in 4 bits would have rows that are no whole groups."""
    if setup.weights != "int4":
        return
    for spec in each_spec(param_specs(setup.model)):
        if spec.is_quantized and spec.shape[-2] % setup.int4_group:
            raise ConfigError(f"int4 groups of {setup.int4_group} do not divide the {spec.shape[-2]} rows of {spec.name}; use another form")


def weights_by_kind(setup: Setup) -> list[Weights]:
    """What each device holds, largest first."""
    kinds: dict[str, list[ParamSpec]] = {}
    for spec in each_spec(param_specs(setup.model)):
        kinds.setdefault(_kind(spec), []).append(spec)
    rows = [
        Weights(
            kind=kind,
            num_params=sum(spec.num_params for spec in specs),
            device_bytes=sum(device_bytes(spec, setup) for spec in specs),
            placed=_placed(specs[0], setup),
            stored=_stored(specs[0], setup),
        )
        for kind, specs in kinds.items()
    ]
    return sorted(rows, key=lambda row: -row.device_bytes)


def device_bytes(spec: ParamSpec, setup: Setup) -> int:
    """Of one tensor, on one device."""
    shape = _device_shape(spec, setup)
    if not spec.is_quantized:
        return prod(shape) * BYTES[setup.dtype if "vocab" in spec.axes else "float32"]
    if setup.weights not in ("int8", "int4"):
        return prod(shape) * BYTES[setup.weights]
    *lead, _, n = shape
    packed = prod(shape) if setup.weights == "int8" else prod(shape) // 2
    groups = num_scale_groups(spec, setup) or 0
    if groups > 1:  # cut where a device's rows begin or end inside of one, as `engine/checkpoint/load.py` cuts them
        parts = _num_parts(spec.axes[-2], setup)
        groups = lcm(groups, parts) // parts
    return packed + prod(lead) * groups * n * SCALE_BYTES


def num_scale_groups(spec: ParamSpec, setup: Setup) -> int | None:
    """Of a whole matrix, in the form in which it is kept; None for a form without scales."""
    if not spec.is_quantized or setup.weights not in ("int8", "int4"):
        return None
    return _num_released_groups(spec, setup.model) if setup.weights == "int8" else spec.shape[-2] // setup.int4_group


def kv_bytes_per_token(setup: Setup) -> int:
    """On one device: keys and values of all layers, of its own heads."""
    num_heads = num_cached_heads(setup.model, setup.shard_size) // setup.shard_size
    return num_heads * kv_head_bytes(setup.model, setup.kv)


def slot_bytes(setup: Setup) -> int:
    """What sampling remembers of the running sequences, on every device."""
    return ceil(setup.scheduler.max_num_seqs * setup.model.vocab_size * SLOT_BYTES_PER_TOKEN)


def temporary_bytes(setup: Setup, device: Device, *, step_bytes: int | None = None) -> dict[str, int]:
    """Named buffers of one device that may exist at the same time; `step_bytes` is what a compiler has found for a forward pass.

    On a host only those that are always there: nothing has a share of its memory.
    """
    if device.is_host:
        return {"slots": slot_bytes(setup)}
    model, scheduler = setup.model, setup.scheduler
    rows = scheduler.max_num_seqs
    always = {
        "slots": slot_bytes(setup),
        "sampling": (rows * NUM_SAMPLING_ARRAYS + SCORED_ROWS) * model.vocab_size * 4,
        "runtime": FIXED_BYTES,
    }
    if step_bytes is not None:
        return always | {"compiled step": step_bytes}
    tokens, size = scheduler.max_num_batched_tokens, BYTES[setup.dtype]
    tiles = tokens // 8 + rows
    width = model.num_q_heads * model.key_size // setup.shard_size
    num_experts, expert_width = model.num_experts // setup.mesh.expert, model.ffn_size // setup.mesh.tensor
    return always | {
        "activations": tokens * model.emb_size * (4 * size + 4 * model.num_selected_experts),
        "attention": tiles * 8 * width * 4 * 3,
        "experts": tokens * num_experts * (3 * expert_width + 2 * model.emb_size) * 4,
        "int4 as bfloat16": 3 * num_experts * model.emb_size * expert_width * 2 if setup.weights == "int4" else 0,
    }


def read_bytes(setup: Setup, *, batch: int, context: int) -> float:
    """What one device reads in a decoding step of `batch` sequences of `context` tokens, with uniform routing."""
    model = setup.model
    touched = expected_experts(model, batch)
    total = 0.0
    for spec in each_spec(param_specs(model)):
        share = touched / model.num_experts if "expert" in spec.axes else 1.0
        total += share * device_bytes(spec, setup)
    return total + kv_bytes_per_token(setup) * batch * context / setup.mesh.data


def expected_experts(model: ModelConfig, batch: int) -> float:
    """Experts of a layer that `batch` tokens touch, each choosing its own at random."""
    return model.num_experts * (1 - (1 - model.num_selected_experts / model.num_experts) ** batch)


def active_params(model: ModelConfig) -> float:
    """Parameters that one token is multiplied with."""
    share = model.num_selected_experts / model.num_experts
    return sum(spec.num_params * (share if "expert" in spec.axes else 1) for spec in each_spec(param_specs(model)))


def speeds(setup: Setup, device: Device, *, context: int, batches: tuple[int, ...]) -> Iterator[Speed]:
    """Decoding at each batch size: the longer of reading and computing, and for what is expected, the collectives on top."""
    if device.bytes_per_s is None:
        return
    for batch in batches:
        reading_s = read_bytes(setup, batch=batch, context=context) / device.bytes_per_s
        computing_s = 2 * active_params(setup.model) * batch / setup.num_devices / device.flops
        reduces = REDUCES_PER_LAYER * setup.model.num_layers if setup.num_devices > setup.mesh.data else 0
        expected_s = max(reading_s, computing_s) / BANDWIDTH_SHARE + reduces * REDUCE_S
        yield Speed(batch=batch, ideal_tokens_per_s=batch / max(reading_s, computing_s), expected_tokens_per_s=batch / expected_s)


def _released_bytes(spec: ParamSpec, model: ModelConfig) -> int:
    if not spec.is_quantized:
        return spec.num_params * BYTES["float32"]
    *lead, _, n = spec.shape
    groups = _num_released_groups(spec, model)
    return spec.num_params + prod(lead) * groups * n * SCALE_BYTES


def _num_released_groups(spec: ParamSpec, model: ModelConfig) -> int:
    """Scale groups of the contracting axis; a checkpoint that does not say how many it has, has as many as its files show."""
    return (model.row_parallel_scale_groups or 1) if spec.is_row_parallel else 1


def _kind(spec: ParamSpec) -> str:
    if "vocab" in spec.axes:
        return "embedding"
    if "expert" in spec.axes:
        return "experts"
    return "attention" if spec.is_quantized else "router, norms"


def _device_shape(spec: ParamSpec, setup: Setup) -> tuple[int, ...]:
    """Of one device's share of a tensor."""
    return tuple(size // _num_parts(axis, setup) for size, axis in zip(spec.shape, spec.axes, strict=True))


def _num_parts(axis: Axis | None, setup: Setup) -> int:
    """Into how many parts the devices of a replica cut an axis. A kv head is held by several where there are more of them than heads."""
    sizes = {"expert": setup.mesh.expert, "tensor": setup.mesh.tensor}
    parts = prod(sizes[name] for name in RULES[axis])
    return min(parts, setup.model.num_kv_heads) if axis == "kv_heads" else parts


def _placed(spec: ParamSpec, setup: Setup) -> str:
    shards = prod(_num_parts(axis, setup) for axis in spec.axes)
    return f"sharded over {shards}" if shards > 1 else "replicated"


def _stored(spec: ParamSpec, setup: Setup) -> str:
    if spec.is_quantized:
        return setup.weights if setup.weights == "int8" else f"{setup.weights}, from int8"
    form = setup.dtype if "vocab" in spec.axes else "float32"
    return form if form == "float32" else f"{form}, from float32"
