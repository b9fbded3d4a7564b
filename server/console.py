"""What the operator sees while the server starts, runs and stops.

On a terminal: progress bars and a table; elsewhere plain lines, few enough for a log file. All of it goes to stdout; log lines are
`server/observability.py`'s and go to stderr. Shows names and sizes, no prompts and no paths.
"""

import json
import math
import os
import shlex
import time
from collections.abc import Mapping
from typing import Any

import structlog
from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from engine.config import GroupConfig
from engine.types import EngineInfo, Progress

SECONDS_BETWEEN_LINES = 2.0
BAR_WIDTH = 16  # leaves room for all the rest in 80 columns

log = structlog.get_logger(__name__)


class Terminal(RichConsole):
    """stdout that may fail: its reader can go away, its disk can be full, its terminal can hang up, and the server serves on."""

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        """Writes; every way to print ends here, the progress bars' too."""
        try:
            super().__exit__(exc_type, exc_value, traceback)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """From now on write to nowhere. The descriptor is replaced, so that the interpreter's last flush fails neither."""
        self.quiet = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


class Console:
    """The `Watcher` of the engine's life, for people."""

    def __init__(
        self,
        *,
        url: str,
        model_name: str,
        has_tokenizer: bool,
        needs_key: bool = False,
        metrics_url: str | None = None,
        limits: Mapping[str, int | float | None] | None = None,
    ) -> None:
        """`limits` are all bounds on what clients may send and hold, by the names of their settings."""
        self._terminal = Terminal(highlight=False)
        self._url = url
        self._model_name = model_name
        self._has_tokenizer = has_tokenizer
        self._needs_key = needs_key
        self._metrics_url = metrics_url
        self._limits = limits or {}
        self._bars: Bars | None = None
        self._bar_of_phase: dict[str, TaskID] = {}
        self._last_line_s: dict[str, float] = {}  # when each phase had its last plain progress line
        self._was_ready = False

    def starting(self) -> None:
        self._line(f"Starting {self._model_name} on {self._url}")
        if self._metrics_url is not None:
            self._line(f"Metrics on {self._metrics_url}")
        if self._terminal.is_terminal:
            cells = [f"{name} {readable_number(value)}" for name, value in self._limits.items()]
            self._terminal.print(Columns(cells, title="limits", column_first=True, padding=(0, 3)), markup=False)

    def following(self, node_rank: int, group: GroupConfig) -> None:
        """In place of `starting`, on a machine that serves no HTTP."""
        self._line(f"Starting node {node_rank} of {group.num_nodes} for {self._model_name}, led by {group.host}:{group.port}")

    def log_limits(self) -> None:
        """One line, where there is no terminal that has a table of them."""
        if not self._terminal.is_terminal:
            log.info("limits", **self._limits)

    def engine_progressed(self, progress: Progress) -> None:
        """A line per program. Of the rest, a bar per phase on a terminal; else a line at its start and end and every few seconds."""
        if self._terminal.is_terminal:
            self._move_bar(progress)
        if progress.unit == "programs" or (not self._terminal.is_terminal and self._is_time_for_line(progress)):
            left = "" if progress.left_s is None or progress.done == progress.total else f", {readable_seconds(progress.left_s)} left"
            self._line(f"{progress.phase}: {_amount(progress)}{left} {progress.detail}".rstrip())

    def engine_ready(self, info: EngineInfo) -> None:
        """The first time, everything a newcomer needs; later, a log line."""
        self.close()
        if self._was_ready:
            log.info("engine ready again", load_s=round(info.load_s, 2), compile_s=round(info.compile_s, 2))
            return
        self._was_ready = True
        self._terminal.print(_facts(self._model_name, info))
        self._line(f"Ready on {self._url} after loading for {info.load_s:.1f} s and, meanwhile, compiling for {info.compile_s:.1f} s. Try:")
        self._line(f"\n  {curl(self._url, self._model_name, has_tokenizer=self._has_tokenizer, needs_key=self._needs_key)}\n")

    def engine_died(self, cause: str, *, pause_s: float) -> None:
        self.close()
        log.error("the engine died and is started again", cause=cause, pause_s=pause_s)

    def stopping(self, num_open: int, *, timeout_s: float) -> None:
        self.close()
        waiting = f"; {num_open} running sequences get up to {timeout_s:g} s, a second signal stops at once" if num_open else ""
        self._line(f"Stopping{waiting}")

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._bar_of_phase.clear()

    def _is_time_for_line(self, progress: Progress) -> bool:
        now_s = time.monotonic()
        is_soon = now_s - self._last_line_s.get(progress.phase, -math.inf) < SECONDS_BETWEEN_LINES
        if is_soon and progress.done < progress.total:
            return False
        self._last_line_s[progress.phase] = now_s
        return True

    def _move_bar(self, progress: Progress) -> None:
        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(BAR_WIDTH),
                TextColumn("{task.fields[amount]}"),
                TimeRemainingColumn(),
            )
            self._bars = Bars(*columns, console=self._terminal)
            self._bars.start()
        if progress.phase not in self._bar_of_phase:
            self._bar_of_phase[progress.phase] = self._bars.add_task(progress.phase, total=progress.total, amount="")
        self._bars.update(self._bar_of_phase[progress.phase], completed=progress.done, total=progress.total, amount=_amount(progress))

    def _line(self, text: str) -> None:
        """One line that no terminal width breaks, so that it can be copied."""
        self._terminal.print(text, markup=False, soft_wrap=True)


def curl(url: str, model_name: str, *, has_tokenizer: bool, needs_key: bool = False) -> str:
    """A command that can be pasted as it is, once `$API_KEY` is set where one is needed."""
    body: dict[str, object] = {"model": model_name}
    if has_tokenizer:
        body |= {"prompt": "Once upon a time", "max_tokens": 64}
    else:
        body |= {"prompt": [1], "max_tokens": 16, "logprobs": 0, "return_tokens_as_token_ids": True}
    key = ' -H "authorization: Bearer $API_KEY"' if needs_key else ""
    return f"curl {url}/v1/completions{key} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"


def readable_number(value: int | float | None) -> str:
    """`1,024`, `2.5`, `none`."""
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def readable_bytes(count: int) -> str:
    """`12.3 MB`; powers of ten, as disks and releases are described."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def readable_seconds(seconds: float) -> str:
    """`3 s`, `2 min 5 s`, `1 h 4 min`."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _amount(progress: Progress) -> str:
    """`3 of 770 tensors, 4.8 GB of 318.2 GB, 2.1 GB/s`, as far as it is known."""
    if progress.unit != "bytes":
        return f"{progress.done:,} of {progress.total:,} {progress.unit}"
    tensors = f"{progress.tensors_done:,} of {progress.tensors_total:,} tensors, " if progress.tensors_total else ""
    rate = f", {readable_bytes(round(progress.per_second))}/s" if progress.per_second else ""
    return f"{tensors}{readable_bytes(progress.done)} of {readable_bytes(progress.total)}{rate}"


def _facts(model_name: str, info: EngineInfo) -> Table:
    table = Table(show_header=False)
    table.add_row("model", f"{model_name}: {info.num_params:,} parameters, {readable_bytes(info.weight_bytes)} of weights")
    compiled = f"{info.num_programs} programs, {info.num_cached_programs} of them compiled before"
    table.add_row("computes in", f"{info.dtype} on {info.num_devices} x {info.backend}; {compiled}")
    num_tokens = info.num_blocks * info.block_size
    table.add_row("KV cache", f"{info.num_blocks:,} blocks of {info.block_size}: {num_tokens:,} tokens in {info.kv_dtype}")
    table.add_row("one sequence", f"{info.max_model_len:,} tokens, prompt and output")
    table.add_row("at once", f"{info.max_num_seqs:,} sequences, {info.max_num_batched_tokens:,} tokens a step")
    return table
