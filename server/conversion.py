"""`grok-server convert`: a progress bar while a checkpoint is converted, and tables of how far weights and logits are from the source's.

The work is done by `python -m engine.checkpoint convert`; what it prints is drawn here, as a bar on a terminal and as a line every few
seconds elsewhere.
"""

import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from engine.errors import CheckpointError, ConfigError
from server.checkpoint_process import checkpoint_lines
from server.console import readable_bytes

WEIGHTS = ("int8", "bfloat16", "int4")
GROUPS = (64, 128)  # rows per scale
SECONDS_BETWEEN_LINES = 10.0  # where stdout is no terminal
WIDTH_OF_FILES = 200  # of the table, where it goes to a file or a pipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPrompts:
    """Prompts whose logits are compared behind a conversion: texts, and token ids with commas or spaces between them."""

    texts: tuple[str, ...] = ()
    token_ids: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """For `python -m engine.checkpoint logits`. Raises `ConfigError` for what are no token ids."""
        arguments = [f"--prompt={text}" for text in self.texts]
        for given in self.token_ids:
            token_ids = given.replace(",", " ").split()
            if not token_ids or not all(token_id.isascii() and token_id.isdigit() and len(token_id) < 20 for token_id in token_ids):
                raise ConfigError(f"--compare-token-ids must be like 1,523,42, found {given!r}")
            arguments.append(f"--token-ids={' '.join(token_ids)}")
        return arguments


def convert_or_compare(source: Path, target: Path, *, weights: str | None, group: int, is_compared: bool, prompts: ComparedPrompts) -> None:
    """What the command does. Raises `ConfigError` for arguments that make no sense, `CheckpointError` for files."""
    compared = prompts.arguments
    if is_compared:
        if weights is not None:
            raise ConfigError("--verify compares what is there; leave --weights out, or convert first and compare then")
        show_comparison(source, target)
    else:
        if weights not in WEIGHTS:
            raise ConfigError(f"--weights must be one of {', '.join(WEIGHTS)}" + (f", found {weights}" if weights else ""))
        if group not in GROUPS:
            raise ConfigError(f"--group must be {' or '.join(map(str, GROUPS))}, found {group}")
        if compared:  # what would be in the way is told before the work
            list(checkpoint_lines("logits", str(source), "--weights", weights, "--group", str(group), *compared))
        show_conversion(source, target, weights=weights, group=group)
    if compared:
        show_logit_errors(source, target, compared)


def show_conversion(source: Path, target: Path, *, weights: str, group: int) -> None:
    """Convert and show how far it is.

    Raises `CheckpointError` with the one cause where it cannot be done. After Ctrl-C the same call takes it up again.
    """
    terminal = _terminal()
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=terminal,
        disable=not terminal.is_terminal,
    )
    totals: dict[str, Any] = {}
    started = last_line = time.monotonic()
    try:
        with closing(checkpoint_lines("convert", str(source), str(target), "--weights", weights, "--group", str(group))) as lines, bars:
            bar = bars.add_task("convert", total=None, tensors="")
            for line in lines:
                match line:
                    case {"progress": progress}:
                        tensors = f"{progress['tensors_done']}/{progress['tensors_total']}"
                        bars.update(bar, completed=progress["done"], total=progress["total"], tensors=tensors)
                        if not terminal.is_terminal and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                            last_line = time.monotonic()
                            terminal.print(_line(progress, elapsed_s=last_line - started), soft_wrap=True)
                    case {"totals": found}:
                        totals = found
                    case other:
                        raise CheckpointError(f"the conversion printed {other!r}, which is unknown here")
    except KeyboardInterrupt:
        terminal.print("interrupted; the same command takes it up again")
        raise
    terminal.print(_summary(totals, weights=weights), markup=False, soft_wrap=True)


def show_comparison(source: Path, target: Path) -> None:
    """Print how far each tensor is from its source. Raises `CheckpointError` where it is further than the form explains."""
    terminal = _terminal()
    table = Table("tensor", "from", "to", "largest error", "RMS error", box=None, header_style="bold")
    table.columns[0].overflow = "fold"
    for column in table.columns[3:]:
        column.justify = "right"
    bars = Bars(TextColumn("compare"), BarColumn(), TimeRemainingColumn(), console=terminal, disable=not terminal.is_terminal)
    totals: dict[str, Any] = {}
    try:
        with closing(checkpoint_lines("convert", "--verify", str(source), str(target))) as lines, bars:
            bar = bars.add_task("compare", total=None)
            for line in lines:
                match line:
                    case {"comparison": compared}:
                        table.add_row(*_cells(compared))
                    case {"progress": progress}:
                        bars.update(bar, completed=progress["done"], total=progress["total"])
                    case {"totals": found}:
                        totals = found
                    case other:
                        raise CheckpointError(f"the comparison printed {other!r}, which is unknown here")
    finally:
        if table.row_count:
            terminal.print(table)
    if totals["exact"] == totals["tensors"]:
        terminal.print(f"{totals['tensors']} tensors, all equal to the bit")
    else:
        terminal.print(f"{totals['tensors']} tensors, {totals['exact']} equal to the bit, RMS error at most {totals['max_rms_error']:.2%}")


def show_logit_errors(source: Path, target: Path, prompts: list[str]) -> None:
    """Print how far the logits of each prompt are from the source's. Raises `CheckpointError` where they cannot be computed."""
    terminal = _terminal()
    table = Table("prompt", "tokens", "logit error, largest", "RMS", "logits' standard deviation", "same likeliest token", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    with closing(checkpoint_lines("logits", str(source), str(target), *prompts)) as lines, terminal.status("computing logits"):
        for line in lines:
            match line:
                case {"logits": error}:
                    numbers = (f"{error[name]:.3g}" for name in ("max_error", "rms_error", "std_of_logits"))
                    prompt = Text(shorten(error["prompt"], 60, placeholder="..."))
                    table.add_row(prompt, f"{error['num_tokens']:,}", *numbers, f"{error['same_likeliest']:.1%}")
                case {"totals": _}:
                    pass
                case other:
                    raise CheckpointError(f"the comparison printed {other!r}, which is unknown here")
    terminal.print(table)


def _terminal() -> Terminal:
    return Terminal(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)


def _line(progress: dict[str, Any], *, elapsed_s: float) -> str:
    rate = progress["done"] / elapsed_s
    left_s = round((progress["total"] - progress["done"]) / rate) if rate else 0
    tensors = f"{progress['tensors_done']} of {progress['tensors_total']} tensors"
    size = f"{readable_bytes(progress['done'])} of {readable_bytes(progress['total'])}"
    return f"convert: {tensors}, {size}, {rate / 1e9:.2f} GB/s, {left_s} s left"


def _summary(totals: dict[str, Any], *, weights: str) -> str:
    text = (
        f"{totals['tensors']} tensors as {weights}, {readable_bytes(totals['bytes'])} in {totals['files']} files in {totals['directory']}"
    )
    text += f"; the source has {readable_bytes(totals['source_bytes'])}"
    if totals["files_kept"]:
        text += f"; {totals['files_kept']} files kept from an earlier run"
    return text if totals["has_tokenizer"] else f"{text}; no tokenizer.model lay beside the source: put one there to serve text"


def _cells(compared: dict[str, Any]) -> list[str]:
    if compared["is_exact"] and not compared["max_error"]:
        return [compared["name"], compared["source_form"], compared["form"], "equal", "equal"]
    errors = (f"{compared[name]:.2%}" for name in ("max_error", "rms_error"))
    return [compared["name"], compared["source_form"], compared["form"], *errors]
