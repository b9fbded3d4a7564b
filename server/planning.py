"""`grok-server plan`: whether a model fits a machine, as tables. `serve` draws the same where the engine refuses for want of memory.

The counting is done by `python -m engine.plan_query` in a process of its own, because it needs what the server must not import; it answers
with one JSON object, which is drawn here or handed on as it is.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console as Terminal
from rich.table import Table

import configs
from engine.config import ModelConfig, find_model_config, read_model_config
from engine.errors import ConfigError
from server.console import readable_bytes
from server.engine_process import child_environment

WIDTH_OF_FILES = 120  # of the tables, where they go to a file or a pipe
COMMAND = (sys.executable, "-P", "-m", "engine.plan_query")
COMPILE_COMMAND = (sys.executable, "-P", "-m", "engine.compile_plan")
WEIGHT_FORMATS = ("float32", "bfloat16", "int8", "int4")
KV_FORMATS = ("auto", "float32", "bfloat16", "int8", "fp8")
DOES_NOT_FIT = 1  # exit status


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is there."""

    device: str
    device_memory: str | None  # "48GiB" where it is another than the device's own
    tensor: int
    data: int
    is_expert_parallel: bool
    memory_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be served on it."""

    model: str  # a preset, or a directory
    weights: str | None  # None: as the directory's files hold them; int8 for a preset
    kv: str
    max_model_len: int | None  # None: the model's context
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int


def show_plan(request: Request, machine: Machine, *, as_json: bool, is_compiled: bool = False) -> int:
    """Print the plan; returns the exit status: 0 where it fits. Raises `ConfigError` for what makes no sense.

    With `is_compiled` the whole step is compiled, too, which takes minutes for a large model.
    """
    name, model = model_of(request.model)
    query = _query(request, machine, model)
    plan = ask(query)
    if is_compiled:
        if sys.stderr.isatty():
            print(f"compiling two steps of {model.num_layers} layers for {machine.tensor} devices ...", file=sys.stderr)
        compiled = ask(query, COMPILE_COMMAND)
        if compiled["backend"] != "cpu":
            plan = ask(query | {"step_bytes": max(step["temporary_bytes"] for step in compiled["steps"])})
        plan["compiled"] = compiled
    if as_json:
        print(json.dumps(plan, indent=1))
    else:
        _draw(Terminal(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES), _parts(name, plan))
    return DOES_NOT_FIT if plan["problem"] else 0


def show_refusal(plan: str) -> None:
    """Draw on stderr the plan, in JSON, for which an engine refused to start."""
    _draw(Terminal(highlight=False, stderr=True, width=None if sys.stderr.isatty() else WIDTH_OF_FILES), _parts("", json.loads(plan)))


def presets() -> list[str]:
    """Names of the models that need no files."""
    return sorted(path.stem for path in (Path(configs.__path__[0]) / "models").glob("*.json"))


def model_of(name: str) -> tuple[str, ModelConfig]:
    """A preset by its name, or the configuration beside the weights in a directory. Raises `ConfigError` where it is neither."""
    if name in presets():
        return name, ModelConfig.preset(name)
    directory = Path(name)
    if not directory.is_dir():
        raise ConfigError(f"--model: {name} is neither a directory nor one of {', '.join(presets())}")
    if find_model_config(directory) is None:
        return f"{name} (no config.json: taken for the released grok-1)", ModelConfig.preset("grok-1")
    return name, read_model_config(directory)


def ask(query: dict[str, Any], command: tuple[str, ...] = COMMAND) -> dict[str, Any]:
    """The plan for a query, in `engine/plan.py`'s form. Raises `ConfigError` with the one cause where the query makes no sense."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3"} | child_environment()  # without XLA's warnings
    process = subprocess.run(command, input=msgspec.json.encode(query), stdout=subprocess.PIPE, env=environment, check=False)
    try:
        plan = json.loads(process.stdout)
    except ValueError:
        raise ConfigError(f"{command[-1]} ended with status {process.returncode}") from None
    if "error" in plan:
        raise ConfigError(plan["error"])
    return plan


def _query(request: Request, machine: Machine, model: ModelConfig) -> dict[str, Any]:
    for flag, value, choices in (("--weights", request.weights, WEIGHT_FORMATS), ("--kv-cache-dtype", request.kv, KV_FORMATS)):
        if value is not None and value not in choices:
            raise ConfigError(f"{flag}: expected one of {', '.join(choices)}, found {value!r}")
    longest = model.sequence_len if request.max_model_len is None else request.max_model_len
    if longest > model.sequence_len:
        raise ConfigError(f"--max-model-len: the model was made for {model.sequence_len:,} tokens, found {longest:,}")
    return {
        "model": model,
        "device": machine.device,
        "device_bytes": None if machine.device_memory is None else _bytes_of(machine.device_memory),
        "num_devices": machine.tensor,
        "data_parallel": machine.data,
        "is_expert_parallel": machine.is_expert_parallel,
        "memory_share": machine.memory_share,
        "model_dir": None if request.model in presets() else str(Path(request.model).absolute()),
        "weights": request.weights,
        "kv": None if request.kv == "auto" else request.kv,
        "block_size": request.block_size,
        "scheduler": {
            "max_model_len": longest,
            "max_num_seqs": request.max_num_seqs,
            "max_num_batched_tokens": request.max_num_batched_tokens,
        },
    }


def _bytes_of(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"--device-memory: expected a size like 48GiB, found {text!r}") from None


def _draw(terminal: Terminal, parts: Iterable[str | Table]) -> None:
    for part in parts:
        if isinstance(part, str):
            terminal.print(part, markup=False, soft_wrap=True)
        else:
            terminal.print(part, "")


def _parts(name: str, plan: dict[str, Any]) -> Iterable[str | Table]:
    setup, device = plan["question"]["setup"], plan["question"]["device"]
    mesh, is_host = setup["mesh"], device["is_host"]
    shape = f"data {mesh['data']}, expert {mesh['expert']}, tensor {mesh['tensor']}"
    num_devices = mesh["data"] * mesh["expert"] * mesh["tensor"]
    yield (
        f"{name or 'The model'} on {num_devices} x {device['name']} ({shape}), weights {setup['weights']}, KV cache {setup['kv']}; "
        f"the released tensors are {plan['payload_bytes']:,} bytes"
    )
    yield _memory_table(plan)
    yield _capacity_table(plan)
    if plan["speeds"]:
        yield _speed_table(plan)
    if (compiled := plan.get("compiled")) is not None:
        yield from _compiled_parts(compiled)
    if plan["problem"] is None:
        yield "It fits."
        return
    yield f"It does not fit: {plan['problem']}."
    if plan["alternatives"]:
        yield _alternatives_table(plan)
    else:
        yield "Nothing near it fits either: neither fewer bits nor a shorter context" + ("." if is_host else ", nor up to 16 devices.")


def _memory_table(plan: dict[str, Any]) -> Table:
    table = _table("on each device", "bytes", "parameters of the model", "placed", "stored")
    for row in plan["weights"]:
        table.add_row(row["kind"], readable_bytes(row["device_bytes"]), f"{row['num_params']:,}", row["placed"], row["stored"])
    temporaries = plan["temporaries"]
    largest = ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in sorted(temporaries.items(), key=lambda item: -item[1])[:3])
    question = plan["question"]
    label = "at least" if question["device"]["is_host"] else "upper bound" if question["step_bytes"] is None else "compiled"
    table.add_row("temporaries", readable_bytes(sum(temporaries.values())), "", "", f"{label}: {largest}")
    table.add_row(
        "left for the KV cache", readable_bytes(max(0, plan["cache_bytes"])), "", "", f"of {readable_bytes(plan['usable_bytes'])}"
    )
    return table


def _capacity_table(plan: dict[str, Any]) -> Table:
    table = _table("KV cache", "tokens", *(f"sequences of {row['context']:,}" for row in plan["capacities"]))
    counts = (f"{row['num_sequences']:,}" for row in plan["capacities"])
    table.add_row(f"{plan['kv_bytes_per_token']:,} bytes per token and device", f"{plan['cache_tokens']:,}", *counts)
    return table


def _speed_table(plan: dict[str, Any]) -> Table:
    table = _table("estimated tokens/s at batch", *(str(row["batch"]) for row in plan["speeds"]))
    table.add_row("at the full bandwidth", *(f"{row['ideal_tokens_per_s']:,.0f}" for row in plan["speeds"]))
    table.add_row("at 75 % of it, and 12 us per all-reduce", *(f"{row['expected_tokens_per_s']:,.0f}" for row in plan["speeds"]))
    return table


def _compiled_parts(compiled: dict[str, Any]) -> Iterable[str | Table]:
    backend = compiled["backend"]
    for step in compiled["steps"]:
        yield (
            f"A greedy step of {step['num_tokens']} tokens, {compiled['num_layers']} layers: traced and compiled for the {backend} in "
            f"{step['seconds']:,.0f} s; on each device {readable_bytes(step['argument_bytes'])} of arguments and "
            f"{readable_bytes(step['temporary_bytes'])} of temporaries"
        )
        table = _table("collectives", "per layer", "in the step", "bytes each")
        for row in step["exchanges"]:
            per_layer = "" if row["per_layer"] is None else f"{row['per_layer']:g}"
            table.add_row(f"{row['kind']}, {row['scope'] or 'added'}", per_layer, f"{row['count']:,}", readable_bytes(row["num_bytes"]))
        yield table
    if backend == "cpu":
        yield (
            "The collectives are the program's own on any backend; the temporaries are those of the CPU's compiler, which makes floats of "
            "the weights. For the planned device's: install jax's CUDA plugin, which needs no GPU."
        )


def _alternatives_table(plan: dict[str, Any]) -> Table:
    table = _table("what would fit", "weights on each device", "tokens of cache")
    for row in plan["alternatives"]:
        table.add_row(row["change"], readable_bytes(row["weight_bytes"]), f"{row['cache_tokens']:,}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, *others, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
