"""What it costs the leader of a group to tell the others of a step: `python -m benchmarks.group`.

Real connections to processes that read and do nothing else. A step is a launch and a choice; its size depends on the bucket and on the
longest context, whose block tables it carries. Writes `benchmarks/results/group.json`.
"""

import json
import multiprocessing
import os
import platform
import time
from pathlib import Path
from statistics import median

import numpy as np

from engine.batch import StepLayout
from engine.group.channel import GroupChannel, connect, listen
from engine.group.messages import Choose, Launch, encode
from engine.transport import MAX_FRAME_BYTES, to_frame

RESULT = Path(__file__).parent / "results" / "group.json"
NUM_STEPS = 1000
PAUSE_S = 0.002  # between steps, as if something were computed
BLOCK_SIZE = 16
CONTEXTS = (1024, 8192)
BUCKETS = (16, 256)
FOLLOWERS = (1, 3)


def main() -> None:
    cases = [
        cost(context=context, num_tokens=num_tokens, num_followers=num_followers)
        for context in CONTEXTS
        for num_tokens in BUCKETS
        for num_followers in FOLLOWERS
    ]
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "machine": platform.machine(), "python": platform.python_version()}
    RESULT.write_text(json.dumps({"command": "python -m benchmarks.group", "machine": machine, "cases": cases}, indent=1) + "\n")


def cost(*, context: int, num_tokens: int, num_followers: int) -> dict[str, float]:
    """Microseconds per step."""
    layout = StepLayout(num_tokens=num_tokens, num_seqs=min(num_tokens, 64), blocks_per_seq=context // BLOCK_SIZE)
    packed = np.zeros(layout.packed_len, np.int32)
    with listen("127.0.0.1", 0) as listener:
        port = int(listener.getsockname()[1])
        followers = [multiprocessing.Process(target=follow, args=(port,), daemon=True) for _ in range(num_followers)]
        for follower in followers:
            follower.start()
        channels = [GroupChannel(listener.accept()[0], max_frame_bytes=MAX_FRAME_BYTES) for _ in followers]
    costs: list[float] = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        for message in (Launch(0, 0, 1, packed.tobytes()), Choose(0, ())):
            frame = to_frame(encode(message))
            for channel in channels:
                channel.send_frame(frame)
        costs.append((time.perf_counter() - start) * 1e6)
        time.sleep(PAUSE_S)
    for channel in channels:
        channel.close()
    for follower in followers:
        follower.join()
    costs.sort()
    case = {"context": context, "bucket": num_tokens, "step_bytes": packed.nbytes, "followers": num_followers}
    case |= {"median_us": round(median(costs), 1), "p90_us": round(costs[len(costs) * 9 // 10], 1)}
    print(case)
    return case


def follow(port: int) -> None:
    for _ in GroupChannel(connect("127.0.0.1", port, timeout_s=10), max_frame_bytes=MAX_FRAME_BYTES).payloads():
        pass


if __name__ == "__main__":
    main()
