"""`grok-server inspect`: the tensors of a checkpoint as a table.

The reading and checking is done by `python -m engine.checkpoint inspect`; what it prints is drawn here.
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from engine.errors import CheckpointError
from server.checkpoint_process import checkpoint_lines
from server.console import readable_bytes

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
    with closing(checkpoint_lines("inspect", str(model_dir), *(["--verify"] if is_verified else []))) as lines, bars:
        bar = bars.add_task("verify", total=None, visible=False)
        for line in lines:
            match line:
                case {"tensor": tensor}:
                    table.add_row(*_cells(tensor))
                case {"progress": progress}:
                    bars.update(bar, completed=progress["done"], total=progress["total"], visible=True)
                case {"totals": found}:
                    totals = found
                case other:
                    raise CheckpointError(f"the inspection printed {other!r}, which is unknown here")
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
