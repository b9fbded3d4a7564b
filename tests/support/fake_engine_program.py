"""The engine process with a `FakeCore` inside: `python fake_engine_program.py --fd N [--start ok|fail|crash|slow] [--step-s S]`."""

import argparse
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Never

from fake_core import FakeCore, options_info

from engine.__main__ import die_with_parent, run_engine
from engine.config import EngineOptions
from engine.errors import CheckpointError
from engine.messages import Follow
from engine.transport import BlockingChannel
from engine.types import Progress


class FakeBuilder:
    """Starts as it is told to; has nothing to prepare."""

    def __init__(self, start: str, *, step_s: float) -> None:
        self._start = start
        self._step_s = step_s

    def prepare(self, options: EngineOptions, *, backend: str) -> None:
        pass

    def build(self, options: EngineOptions, report: Callable[[Progress], None]) -> FakeCore:
        report(Progress(phase="load", done=1, total=4, unit="bytes", tensors_done=1, tensors_total=3, elapsed_s=0.5))
        if self._start == "fail":
            raise CheckpointError("tensor00003_000: expected int8 of 8 x 64, found a shopping list")
        if self._start == "crash":
            raise RuntimeError("a bug in the start")
        if self._start == "slow":
            time.sleep(3600)
        return FakeCore(options_info(options), step_s=self._step_s)

    def follow(self, message: Follow, report: Callable[[Progress], None]) -> Never:  # noqa: ARG002
        raise RuntimeError("nobody leads a fake engine")


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--start", choices=["ok", "fail", "crash", "slow"], default="ok")
    parser.add_argument("--step-s", type=float, default=0.005)
    arguments = parser.parse_args()

    channel = BlockingChannel(socket.socket(fileno=arguments.fd))
    try:
        status = run_engine(channel, builder=FakeBuilder(arguments.start, step_s=arguments.step_s), on_disconnect=lambda: os._exit(0))
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


main()
