"""`make fuzz`: hostile requests against a real server with the default model, several at a time, for some minutes.

Ends with status 1 if an answer broke a rule of `verdict.py`, took too long, changed the canary's tokens, or if the server's memory kept
growing. The seed makes the same requests again; how they meet is the machine's.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from hostile import HostileRequest, hostile_requests
from rich.console import Console
from rich.progress import Progress
from server_process import running_server
from verdict import complaint

CANARY = {"prompt": "Once upon a time", "max_tokens": 16, "seed": 3, "return_token_ids": True}
PATIENCE_S = 60  # for one answer
NUM_AT_ONCE = 8
ROUND_S = 10  # between two canaries
MAX_GROWTH = 1.3  # of the server's memory from the end of the first quarter on


async def canary(http: httpx.AsyncClient) -> list[int]:
    answer = await http.post("/v1/completions", json=CANARY)
    answer.raise_for_status()
    return answer.json()["choices"][0]["token_ids"]


async def send(http: httpx.AsyncClient, request: HostileRequest, *, counts: Counter[int], complaints: list[str]) -> None:
    try:
        answer = await http.post(request.path, content=request.body, headers=request.headers)
        counts[answer.status_code] += 1
        wrong = complaint(request.path, answer.status_code, answer.headers, answer.content)
    except httpx.HTTPError as error:
        wrong = f"no answer: {error!r}"
    if wrong:
        complaints.append(f"{request.path}, {request.what}: {wrong}")


def resident_bytes(pid: int) -> int:
    """Of a process and all its children."""
    children = (Path(f"/proc/{pid}/task") / str(pid) / "children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 + sum(resident_bytes(int(child)) for child in children)


async def fuzz(url: str, pid: int, *, seed: int, minutes: float, console: Console) -> list[str]:
    """What went wrong."""
    complaints: list[str] = []
    counts: Counter[int] = Counter()
    sizes: list[int] = []
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        requests = hostile_requests((await http.get("/openapi.json")).json(), seed=seed)
        before = await canary(http)
        end = time.monotonic() + 60 * minutes
        with Progress(console=console) as progress:
            bar = progress.add_task("fuzzing", total=60 * minutes)
            while (left := end - time.monotonic()) > 0 and not complaints:
                until = time.monotonic() + min(ROUND_S, left)

                async def work(until: float = until) -> None:
                    while time.monotonic() < until:
                        await send(http, next(requests), counts=counts, complaints=complaints)

                await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
                if await canary(http) != before:
                    complaints.append("the canary's tokens have changed")
                sizes.append(resident_bytes(pid))
                progress.update(bar, completed=60 * minutes - max(left - ROUND_S, 0))
    console.print(f"seed {seed}: {sum(counts.values()):,} requests, by status {dict(sorted(counts.items()))}")
    first, last = sizes[len(sizes) // 4], sizes[-1]
    console.print(f"memory of all processes: {first / 1e6:,.0f} MB after a quarter, {last / 1e6:,.0f} MB at the end")
    if last > MAX_GROWTH * first:
        complaints.append(f"memory grew from {first:,} to {last:,} bytes")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as directory, running_server(Path(directory)) as server:
        complaints = asyncio.run(fuzz(server.url, server.pid, seed=arguments.seed, minutes=arguments.minutes, console=console))
    for each in complaints:
        console.print(each, style="red")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
