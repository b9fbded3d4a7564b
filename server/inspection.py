"""`grok-server inspect`: the tensors of a checkpoint as a table.

The reading and checking is done by `python -m engine.checkpoint inspect` in a process of its own, because it needs what the server must not
import; it prints one JSON object per line, which is drawn here.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from engine.errors import CheckpointError
from server.console import readable_bytes
from server.engine_process import child_environment

COMMAND = (sys.executable, "-P", "-m", "engine.checkpoint", "inspect")
WIDTH_OF_FILES = 200  # of the table, where it goes to a file or a pipe


def show_checkpoint(model_dir: Path, *, is_verified: bool) -> None:
    """Print the table, with `is_verified` after a progress bar over every byte.

    Raises `CheckpointError` with the one cause where the checkpoint cannot be served.
    """
    terminal = Terminal(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    table = Table("file", "tensor", "dtype", "shape", "scales", "size", box=None, header_style="bold")
    table.columns[1].overflow = "fold"
    table.columns[-1].justify = "right"
    totals: dict[str, Any] = {}
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=terminal,
        disable=not terminal.is_terminal,
    )
    command = [*COMMAND, str(model_dir), *(["--verify"] if is_verified else [])]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=child_environment())
    try:
        assert process.stdout is not None
        with bars:
            bar = bars.add_task("verify", total=None, visible=False)
            for line in process.stdout:
                match json.loads(line):
                    case {"tensor": tensor}:
                        table.add_row(*_cells(tensor))
                    case {"progress": progress}:
                        bars.update(bar, completed=progress["done"], total=progress["total"], visible=True)
                    case {"totals": found}:
                        totals = found
                    case {"error": message}:
                        raise CheckpointError(message)
                    case other:
                        raise CheckpointError(f"the inspection printed {other!r}, which is unknown here")
        status = process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if status:
        raise CheckpointError(
            f"inspecting the checkpoint ended with status {status}" if status > 0 else signal.strsignal(-status) or "killed"
        )
    terminal.print(table)
    terminal.print(_summary(totals), markup=False, soft_wrap=True)


def _cells(tensor: dict[str, Any]) -> list[str]:
    scales = tensor["scales"]
    return [
        tensor["file"],
        tensor["name"],
        tensor["dtype"],
        _shape(tensor["shape"]),
        "" if scales is None else _shape(scales),
        readable_bytes(tensor["bytes"]),
    ]


def _shape(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _summary(totals: dict[str, Any]) -> str:
    text = f"{totals['tensors']} tensors, {totals['params']:,} parameters, {readable_bytes(totals['bytes'])}"
    if totals.get("row_parallel_scale_groups") is not None:
        text += f", {totals['row_parallel_scale_groups']} row-parallel scale groups"
    if verified := totals.get("verified"):
        text += "; verified: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in verified.items())
    return text
