"""`grok-server plan`: whether a model fits a machine, as tables.

The counting is done by `python -m engine.plan` in a process of its own, because it needs what the server must not import; it answers with one
JSON object, which is drawn here or handed on as it is.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console as Terminal
from rich.table import Table

import configs
from engine.config import ModelConfig, find_model_config, read_model_config
from engine.errors import ConfigError
from server.console import readable_bytes
from server.engine_process import child_environment

COMMAND = (sys.executable, "-P", "-m", "engine.plan")
DOES_NOT_FIT = 1  # exit status


def model_of(name: str) -> tuple[str, ModelConfig]:
    """A preset by its name, or the configuration beside the weights in a directory. Raises `ConfigError` where it is neither."""
    presets = sorted(path.stem for path in (Path(configs.__path__[0]) / "models").glob("*.json"))
    if name in presets:
        return name, ModelConfig.preset(name)
    directory = Path(name)
    if not directory.is_dir():
        raise ConfigError(f"--model: {name} is neither a directory nor one of {', '.join(presets)}")
    if find_model_config(directory) is None:
        return f"{name} (no config.json: taken for the released grok-1)", ModelConfig.preset("grok-1")
    return name, read_model_config(directory)


def ask(query: dict[str, Any]) -> dict[str, Any]:
    """The plan for a query, in `engine/plan.py`'s form. Raises `ConfigError` with the one cause where the query makes no sense."""
    process = subprocess.run(COMMAND, input=msgspec.json.encode(query), stdout=subprocess.PIPE, env=child_environment(), check=False)
    try:
        plan = json.loads(process.stdout)
    except ValueError:
        raise ConfigError(f"planning ended with status {process.returncode}") from None
    if "error" in plan:
        raise ConfigError(plan["error"])
    return plan


def show_plan(name: str, query: dict[str, Any], *, as_json: bool) -> int:
    """Print the plan; returns the exit status: 0 where it fits. Raises like `ask`."""
    plan = ask(query)
    if as_json:
        print(json.dumps(plan, indent=1))
    else:
        terminal = Terminal(highlight=False, width=None if sys.stdout.isatty() else 120)
        for part in _parts(name, plan):
            terminal.print(part, markup=False, soft_wrap=True) if isinstance(part, str) else terminal.print(part)
    return DOES_NOT_FIT if plan["problem"] else 0


def _parts(name: str, plan: dict[str, Any]) -> Iterable[str | Table]:
    setup, device = plan["question"]["setup"], plan["question"]["device"]
    mesh = setup["mesh"]
    num_devices = mesh["data"] * mesh["expert"] * mesh["tensor"]
    yield (
        f"{name} on {num_devices} x {device['name']} (data {mesh['data']}, expert {mesh['expert']}, tensor {mesh['tensor']}), "
        f"weights {setup['weights']}, KV cache {setup['kv']}; the released tensors are {plan['payload_bytes']:,} bytes"
    )
    yield _memory_table(plan)
    yield _capacity_table(plan)
    yield _speed_table(plan)
    if plan["problem"] is None:
        yield "It fits."
        return
    yield f"It does not fit: {plan['problem']}."
    if plan["alternatives"]:
        yield _alternatives_table(plan)
    else:
        yield "Nothing near it fits either: neither 4-bit weights nor up to 16 devices."


def _memory_table(plan: dict[str, Any]) -> Table:
    table = _table("on each device", "bytes", "parameters of the model", "placed", "stored")
    for row in plan["weights"]:
        table.add_row(row["kind"], readable_bytes(row["device_bytes"]), f"{row['num_params']:,}", row["placed"], row["stored"])
    temporaries = plan["temporaries"]
    largest = ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in sorted(temporaries.items(), key=lambda item: -item[1])[:3])
    table.add_row("temporaries", readable_bytes(sum(temporaries.values())), "", "", f"upper bound: {largest}, ...")
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
