"""How fast weights come from the disk to the devices, against `cat`, and what memory it takes beside the weights themselves.

    python scripts/write_wide_checkpoint.py --out DIR
    python -m benchmarks.loading --model DIR [--rounds N]

Rounds alternate between `cat FILES > /dev/null` and loading the same files over 8 fake CPU devices (`tensor_parallel_size` 8, int8 kept as
it is, the rest in float32), each with the files out of the page cache, and each load in a process of its own. A load counts from the first
read to the last array. Memory is the process's anonymous memory (RssAnon of /proc/self/status), looked at every 10 ms, less what it was
before and less the arrays; the bytes that came from the disk are the kernel's count. Printed, and kept in
`benchmarks/results/loading.json`. Needs as much memory as the weights and a little more.

Last, one process of two, with 4 of the 8 devices, loads alone: what it reads from the disk is to be its half.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.tensors import Checkpoint
from engine.config import MeshConfig, read_model_config

RESULTS = Path(__file__).parent / "results" / "loading.json"
NUM_DEVICES = 8
SECONDS_BETWEEN_LOOKS = 0.01
SECONDS_BETWEEN_ROUNDS = 15  # for whoever else works on this machine


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading against cat, and the memory that it takes.")
    parser.add_argument("--model", type=Path, required=True, help="a directory that scripts/write_wide_checkpoint.py wrote")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one-load", action="store_true", help=argparse.SUPPRESS)  # the process of one load
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)  # of two processes, of which this is
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model, read_model_config(arguments.model))
    if arguments.one_load:
        if arguments.coordinator is not None:
            join(arguments.coordinator, arguments.rank)
        print(json.dumps(load(checkpoint, arguments.model) if not arguments.rank else {}), flush=True)
        sys.stdin.read()  # until it is killed: processes of a group go together
        return

    from benchmarks.serving import machine, summary, use_real_time_class

    is_real_time = use_real_time_class()
    rounds: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        rounds.append(one_round(checkpoint, arguments.model))
        time.sleep(SECONDS_BETWEEN_ROUNDS)
    half = one_of_two(checkpoint, arguments.model)
    figures = {name: summary([row[name] for row in rounds]) for name in rounds[0]}
    largest = sorted((tensor.num_bytes for tensor in checkpoint.tensors.values()), reverse=True)[:2]
    table = Table("figure", "median", "min", "max", title=f"{checkpoint.file_bytes / 1e9:.2f} GB in {len(checkpoint.file_sizes)} files")
    for name, figure in figures.items():
        table.add_row(name, *(f"{figure[key]:.3f}" for key in ("median", "min", "max")))
    Console().print(table, f"the two largest tensors: {sum(largest) / 1e9:.3f} GB; one process of two: {half}")
    setting = {
        "files": len(checkpoint.file_sizes),
        "bytes": checkpoint.file_bytes,
        "two_largest_tensors_bytes": sum(largest),
        "devices": f"{NUM_DEVICES} fake CPU devices, tensor parallel",
        "weights": "int8 as released, the rest float32",
        "rounds": arguments.rounds,
        "real_time_class": is_real_time,
    }
    RESULTS.write_text(
        json.dumps({"machine": machine(), "setting": setting, "figures": figures, "one process of two": half}, indent=1) + "\n"
    )


def one_round(checkpoint: Checkpoint, model_dir: Path) -> dict[str, float]:
    """`cat`, then a load."""
    forget(checkpoint)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, checkpoint.file_sizes)], stdout=nowhere, check=True)
    cat_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    forget(checkpoint)
    with process(model_dir, num_devices=NUM_DEVICES) as child:
        loaded = result(child)

    gigabytes = checkpoint.file_bytes / 1e9
    row = {
        "cat, GB/s": gigabytes / cat_s,
        "load, GB/s": gigabytes / loaded["seconds"],
        "load / cat": cat_s / loaded["seconds"],
        "cat, CPU seconds": sum(after[:2]) - sum(before[:2]),
        "load, CPU seconds": loaded["cpu_seconds"],
        "cat, GB from the disk": (after.ru_inblock - before.ru_inblock) * 512 / 1e9,
        "load, GB from the disk": loaded["disk_bytes"] / 1e9,
        "arrays, GB": loaded["array_bytes"] / 1e9,
        "anonymous memory beside the arrays, GB": loaded["extra_bytes"] / 1e9,
        "mapped files after the load, GB": loaded["mapped_bytes"] / 1e9,
    }
    print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
    return row


def one_of_two(checkpoint: Checkpoint, model_dir: Path) -> dict[str, float]:
    """The load of a process that has half of the devices, while the one with the others does nothing."""
    forget(checkpoint)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--coordinator", coordinator, "--rank")
    with (
        process(model_dir, *options, "0", num_devices=NUM_DEVICES // 2) as loading,
        process(model_dir, *options, "1", num_devices=NUM_DEVICES // 2),
    ):
        loaded = result(loading)
    return {
        "GB from the disk": round(loaded["disk_bytes"] / 1e9, 3),
        "arrays, GB": round(loaded["array_bytes"] / 1e9, 3),
        "anonymous memory beside the arrays, GB": round(loaded["extra_bytes"] / 1e9, 3),
        "GB/s": round(loaded["array_bytes"] / loaded["seconds"] / 1e9, 3),
    }


@contextmanager
def process(model_dir: Path, *options: str, num_devices: int) -> Iterator[subprocess.Popen[str]]:
    """One that loads, and ends with the context."""
    command = [sys.executable, "-m", "benchmarks.loading", "--one-load", "--model", str(model_dir), *options]
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    with subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def result(child: subprocess.Popen[str]) -> dict[str, float]:
    """What a process tells of its load. Raises `ValueError` where it ended without."""
    assert child.stdout is not None
    return json.loads(child.stdout.readline())


def join(coordinator: str, rank: int) -> None:
    """Make this process one of two that know each other's devices."""
    import jax

    jax.distributed.initialize(coordinator, num_processes=2, process_id=rank)
    jax.devices()


def forget(checkpoint: Checkpoint) -> None:
    """Have the kernel drop the files from its page cache."""
    for path in checkpoint.file_sizes:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(checkpoint: Checkpoint, model_dir: Path) -> dict[str, float]:
    """One load in this process, which must not have loaded anything before."""
    import jax

    from engine.checkpoint.load import load_params
    from engine.sharding import make_meshes

    config = read_model_config(model_dir)
    (mesh,) = make_meshes(MeshConfig(tensor=NUM_DEVICES), config)
    for device in jax.local_devices():
        jax.device_put(1, device).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start_bytes = status_bytes("RssAnon")
    with highest(lambda: status_bytes("RssAnon")) as peak:
        start = time.perf_counter()
        params = load_params(checkpoint, config, dtype="float32", mesh=mesh, keep_int8=True, report=lambda _: None)
        seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    array_bytes = sum({shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards(params)}.values())
    return {
        "seconds": seconds,
        "cpu_seconds": sum(after[:2]) - sum(before[:2]),
        "disk_bytes": (after.ru_inblock - before.ru_inblock) * 512,
        "array_bytes": array_bytes,
        "extra_bytes": peak[0] - start_bytes - array_bytes,
        "mapped_bytes": status_bytes("RssFile"),
    }


def shards(params: Any) -> Iterator[Any]:
    """What each device holds of each array. Devices that hold the same may share the memory on a CPU."""
    import jax

    for leaf in jax.tree.leaves(params):
        yield from leaf.addressable_shards


@contextmanager
def highest(look: Callable[[], int]) -> Iterator[list[int]]:
    """A list whose one number is the largest that `look` gave while the context lasted."""
    found = [look()]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            found[0] = max(found[0], look())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()
        found[0] = max(found[0], look())


def status_bytes(name: str) -> int:
    """A size in /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
