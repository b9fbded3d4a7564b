"""Every choice the engine is built from, as frozen values. Nothing here is edited after it was made.

`ModelConfig` holds the facts of a model under the names of its `config.json` (the same keys as the presets in `configs/models`); the
others hold what the operator chose. The front end makes one `EngineOptions` and sends it to the engine process, which looks at its devices
and turns it into the `EngineConfig` that everything is built from.
"""

import json
import os
import re
from dataclasses import dataclass, fields
from importlib import resources
from math import gcd
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import ConfigError
from engine.huggingface_config import is_huggingface, model_fields

DType = Literal["float32", "bfloat16"]
KVDType = Literal["float32", "bfloat16", "int8", "fp8"]  # of the KV cache; fp8 is float8_e4m3fn
CPUWeights = Literal["float", "packed"]

_KV_BYTES: dict[KVDType, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
_KV_SCALE_BYTES: dict[KVDType, int] = {"float32": 0, "bfloat16": 0, "int8": 4, "fp8": 4}  # one scale, float32

CPU_CACHE_BYTES = 512 << 20  # of the KV cache on a CPU, where one sequence needs no more

_MAX_INT = 2**31 - 1  # what an index on the device can count to
_MAX_FLOAT = 3.4e38  # float32's, in which these numbers are used

# Keys of xai-org/grok-1's own configuration (model.py, run.py) that change nothing here: how weights are initialised, names for its logs,
# and how its runner lays out and shards its work, which flags decide for us.
_IGNORED_KEYS = {"name", "model_type", "model_size", "fprop_dtype", "capacity_factor"} | {
    *("init_scale", "init_scale_override", "embedding_init_scale"),
    *("shard_activations", "shard_embeddings", "data_axis", "model_axis", "bs_per_device"),
}


def ffn_size(emb_size: int, widening_factor: float) -> int:
    """Width of an expert: two thirds of the widened model width, rounded up to a multiple of 8 (xai-org/grok-1, model.py)."""
    size = int(widening_factor * emb_size) * 2 // 3
    return size + (8 - size) % 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The architecture of one Grok-1-shaped model.

    Raises `ConfigError` for sizes that no such model can have.
    """

    vocab_size: int
    sequence_len: int  # longest context
    emb_size: int
    key_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    num_experts: int
    num_selected_experts: int
    ffn_size: int
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    attn_output_multiplier: float  # scales q·k before the cap
    attn_logit_cap: float = 30.0
    rms_norm_eps: float = 1e-5
    rope_base: float = 10000.0
    pad_token: int = 0
    bos_token: int = 1  # stands for the document start; text prompts come without it
    eos_token: int = 2
    row_parallel_scale_groups: int | None = None  # None: whatever the files hold

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check_number(field.name, value, is_integer=field.type is not float)
        for name in (
            "vocab_size",
            "sequence_len",
            "emb_size",
            "key_size",
            "num_q_heads",
            "num_kv_heads",
            "num_layers",
            "num_experts",
            "ffn_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model config: {name} must be at least 1, found {getattr(self, name)}")
        if not 1 <= self.num_selected_experts <= self.num_experts:
            raise ConfigError(
                f"model config: num_selected_experts is {self.num_selected_experts}, must be 1 to num_experts ({self.num_experts})"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(f"model config: num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.key_size % 2:
            raise ConfigError(f"model config: key_size {self.key_size} is odd; rotary embedding turns pairs")
        for name in ("attn_logit_cap", "rms_norm_eps", "rope_base"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"model config: {name} must be above 0, found {getattr(self, name)}")
        for name in ("pad_token", "bos_token", "eos_token"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"model config: {name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}")
        groups = self.row_parallel_scale_groups
        if groups is not None and (groups < 1 or self.ffn_size % groups or (self.num_q_heads * self.key_size) % groups):
            raise ConfigError(f"model config: row_parallel_scale_groups {groups} divides not both ffn_size and num_q_heads * key_size")

    @classmethod
    def from_json(cls, raw: object) -> "ModelConfig":
        """Build from the parsed content of a `config.json`; unknown or missing keys are refused by name.

        The original's keys that concern training or its own runner are ignored. The keys of the Hugging Face layouts are understood, too.
        """
        if not isinstance(raw, dict):
            raise ConfigError("model config: the top level must be an object")
        flat: dict[str, Any] = {}
        top = cast("dict[str, Any]", raw)
        if is_huggingface(top):
            top = model_fields(top)
        for key, value in top.items():
            if key in ("model", "derived"):
                if not isinstance(value, dict):
                    raise ConfigError(f"model config: {key} must be an object, found {value!r}")
                flat.update(cast("dict[str, Any]", value))
            else:
                flat[key] = value
        if "widening_factor" in flat:
            widening = flat.pop("widening_factor")
            _check_number("widening_factor", widening, is_integer=False)
            _check_number("emb_size", flat.get("emb_size"), is_integer=True)
            if not 0 < widening <= _MAX_INT:
                raise ConfigError(f"model config: widening_factor must be above 0 and at most {_MAX_INT}, found {widening!r}")
            computed = ffn_size(flat["emb_size"], widening)
            if flat.setdefault("ffn_size", computed) != computed:
                raise ConfigError(
                    f"model config: ffn_size {flat['ffn_size']} contradicts widening_factor {widening}, which gives {computed}"
                )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(flat.keys() - known - _IGNORED_KEYS):
            raise ConfigError(f"model config: unknown key {unknown[0]!r}; known are {', '.join(sorted(known | {'widening_factor'}))}")
        try:
            return cls(**{key: value for key, value in flat.items() if key in known})
        except TypeError:
            required = {
                "vocab_size",
                "sequence_len",
                "emb_size",
                "key_size",
                "num_q_heads",
                "num_kv_heads",
                "num_layers",
                "num_experts",
            } | {
                "num_selected_experts",
                "ffn_size",
                "embedding_multiplier_scale",
                "output_multiplier_scale",
                "attn_output_multiplier",
            }
            raise ConfigError(f"model config: missing {', '.join(sorted(required - flat.keys()))}") from None

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A configuration from `configs/models`, e.g. `grok-1`."""
        return cls.from_json(json.loads((resources.files("configs") / "models" / f"{name}.json").read_text()))


def _check_number(name: str, value: object, *, is_integer: bool) -> None:
    """Raises `ConfigError` for anything but a number that engine and device can hold."""
    if isinstance(value, bool) or not isinstance(value, int if is_integer else int | float):
        raise ConfigError(f"model config: {name} must be {'an integer' if is_integer else 'a number'}, found {value!r}")
    largest = _MAX_INT if isinstance(value, int) else _MAX_FLOAT
    if not abs(value) <= largest:
        raise ConfigError(f"model config: {name} must be a finite number of at most {largest}, found {value!r}")


def is_tensor_file(name: str) -> bool:
    """Whether a file of this name counts as a part of a checkpoint, whole or not."""
    return re.match(r"tensor[0-9]{5}_", name) is not None


def model_directories(model_dir: Path) -> tuple[Path, ...]:
    """Where the files beside the weights may lie: the model directory, then its parent where it holds the tensor files itself."""
    directory = model_dir.absolute()  # so that "." has a name and a parent
    try:
        holds_tensors = any(is_tensor_file(path.name) for path in directory.iterdir())
    except OSError:  # whoever opens the checkpoint says what is wrong with it
        holds_tensors = False
    return (directory, directory.parent) if holds_tensors else (directory,)


def find_model_config(model_dir: Path) -> Path | None:
    """Whatever is called `config.json` in the first of the `model_directories` that has it."""
    candidates = (directory / "config.json" for directory in model_directories(model_dir))
    return next((path for path in candidates if os.path.lexists(path)), None)


def read_model_config(model_dir: Path) -> ModelConfig:
    """The configuration beside a checkpoint, or that of the released 314B model where `config.json` is missing.

    The release has no `config.json`; a directory that holds other weights is then refused when its files are checked. Raises `ConfigError`.
    """
    path = find_model_config(model_dir)
    if path is None:
        return ModelConfig.preset("grok-1")
    if not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "not a regular file" if os.path.exists(path) else "a link to nothing"
        raise ConfigError(f"{path} is {kind}; a JSON file is expected there, or nothing for the released 314B model")
    try:
        return ModelConfig.from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How many devices along each axis; their product is the number of devices used."""

    data: int = 1
    expert: int = 1
    tensor: int = 1


def mesh_of(model: ModelConfig, *, num_devices: int, data: int, is_expert_parallel: bool) -> MeshConfig:
    """The mesh that the flags mean: `num_devices` share each matrix, or hold whole experts as far as these can be dealt out."""
    expert = gcd(model.num_experts, num_devices) if is_expert_parallel else 1
    return MeshConfig(data=data, expert=expert, tensor=num_devices // expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """The engine processes that serve one model together, process 0 leading; each node has as many, in the order of the nodes' ranks."""

    num_nodes: int = 1
    processes_per_node: int = 1
    host: str = "127.0.0.1"  # where the leader is reached
    port: int = 0  # 0: any free one, which processes of other nodes could not know
    start_timeout_s: float = 1800.0  # for all to be there

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.processes_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache of one data shard."""

    block_size: int = 16  # tokens per block
    num_blocks: int  # blocks in the pool, the scratch block not counted
    dtype: KVDType | Literal["auto"] = "auto"  # auto: that of the computation


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step and of one sequence."""

    max_num_seqs: int = 64  # sequences running at once
    max_num_batched_tokens: int = 256  # the token budget of a step
    max_model_len: int  # prompt plus output of one sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All an engine process needs to start."""

    model: ModelConfig
    model_dir: str
    dtype: DType
    mesh: MeshConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    max_logprobs: int = 20
    compile_cache_dir: str | None = None
    cpu_weights: CPUWeights = "float"  # what int8 and int4 matrices become on a CPU

    @property
    def kv_dtype(self) -> KVDType:
        """Of the KV cache."""
        return self.dtype if self.cache.dtype == "auto" else self.cache.dtype

    @property
    def max_blocks_per_seq(self) -> int:
        """Width of a block table: blocks that hold `max_model_len` tokens."""
        return blocks_per_sequence(self.scheduler, self.cache.block_size)


def blocks_per_sequence(scheduler: SchedulerConfig, block_size: int) -> int:
    """Blocks that hold `max_model_len` tokens."""
    return -(-scheduler.max_model_len // block_size)


def kv_head_bytes(model: ModelConfig, dtype: KVDType) -> int:
    """Bytes of one head's keys and values of one token in the cache, over all layers."""
    return 2 * model.num_layers * (model.key_size * _KV_BYTES[dtype] + _KV_SCALE_BYTES[dtype])


def kv_bytes_per_token(model: ModelConfig, dtype: KVDType, *, num_devices: int = 1) -> int:
    """Bytes of keys and values that one token keeps in the cache over all heads and layers; each device holds at least one head."""
    return max(model.num_kv_heads, num_devices) * kv_head_bytes(model, dtype)


def choose_num_blocks(scheduler: SchedulerConfig, *, block_size: int, token_bytes: int, cache_bytes: int) -> int:
    """As many blocks as `cache_bytes` hold. Raises `ConfigError` where not even one sequence of `max_model_len` fits."""
    block_bytes = block_size * token_bytes
    num_blocks = cache_bytes // block_bytes
    if num_blocks < blocks_per_sequence(scheduler, block_size):
        raise ConfigError(
            f"the KV cache of {cache_bytes:,} bytes holds {num_blocks * block_size:,} tokens, "
            f"but max_model_len is {scheduler.max_model_len:,}; lower --max-model-len or raise --kv-cache-memory-bytes"
        )
    return num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the operator asked for, before anyone looked at the devices."""

    model: ModelConfig
    model_dir: str
    tokenizer_path: str | None = None  # of a SentencePiece model; None: requests with a grammar are refused
    scheduler: SchedulerConfig
    dtype: DType | Literal["auto"] = "auto"
    mesh: MeshConfig = MeshConfig()
    block_size: int = 16
    cache_bytes: int | None = None  # of one data shard; None: what the devices have left
    memory_share: float = 0.9  # of an accelerator's memory
    max_logprobs: int = 20
    compile_cache_dir: str | None = None
    kv_dtype: KVDType | Literal["auto"] = "auto"
    cpu_weights: CPUWeights = "float"
    group: GroupConfig | None = None  # None: one process has all devices

    def resolve(self, *, backend: str, free_bytes: int) -> EngineConfig:
        """The configuration for these devices: `auto` is float32 on a CPU and bfloat16 elsewhere; an unset cache size is `free_bytes`.

        Raises `ConfigError` where the cache cannot hold one sequence.
        """
        num_blocks = choose_num_blocks(
            self.scheduler,
            block_size=self.block_size,
            token_bytes=self._token_bytes_on(backend),
            cache_bytes=free_bytes if self.cache_bytes is None else self.cache_bytes,
        )
        return EngineConfig(
            model=self.model,
            model_dir=self.model_dir,
            dtype=self.dtype_on(backend),
            mesh=self.mesh,
            cache=CacheConfig(block_size=self.block_size, num_blocks=num_blocks, dtype=self.kv_dtype_on(backend)),
            scheduler=self.scheduler,
            max_logprobs=self.max_logprobs,
            compile_cache_dir=self.compile_cache_dir,
            cpu_weights=self.cpu_weights,
        )

    def default_cpu_cache_bytes(self, *, memory_bytes: int) -> int:
        """Size of an unset cache of a data shard on a CPU with this much memory.

        512 MiB, or less where that is more than twice what all sequences at full length can hold, the other half being for the prefix
        cache; more where a single sequence needs it, up to half the memory for all shards.
        """
        block_bytes = self.block_size * self._token_bytes_on("cpu")
        sequence_bytes = blocks_per_sequence(self.scheduler, self.block_size) * block_bytes
        useful_bytes = 2 * self.scheduler.max_num_seqs * sequence_bytes
        return max(min(CPU_CACHE_BYTES, useful_bytes), min(sequence_bytes, memory_bytes // 2 // self.mesh.data))

    def dtype_on(self, backend: str) -> DType:
        """Of the computation."""
        return self.dtype if self.dtype != "auto" else "float32" if backend == "cpu" else "bfloat16"

    def kv_dtype_on(self, backend: str) -> KVDType:
        """Of the KV cache."""
        return self.dtype_on(backend) if self.kv_dtype == "auto" else self.kv_dtype

    def _token_bytes_on(self, backend: str) -> int:
        """Of one token in the cache of a data shard, over all its devices."""
        return kv_bytes_per_token(self.model, self.kv_dtype_on(backend), num_devices=self.mesh.expert * self.mesh.tensor)
