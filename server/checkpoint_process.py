"""Runs `python -m engine.checkpoint` and hands on its lines.

A process of its own, because it needs what the server must not import. `server/inspection.py` and `server/conversion.py` draw the lines.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Generator
from typing import Any

from engine.errors import CheckpointError
from server.engine_process import child_environment

COMMAND = (sys.executable, "-P", "-m", "engine.checkpoint")


def checkpoint_lines(*arguments: str) -> Generator[dict[str, Any], None, None]:
    """Every line but an error, parsed. Close it to end the process.

    Raises `CheckpointError` with the one cause that the process names, or with how it ended.
    """
    process = subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=child_environment())
    assert process.stdout is not None
    try:
        for text in process.stdout:
            line = json.loads(text)
            if "error" in line:
                raise CheckpointError(line["error"])
            yield line
        status = process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        process.stdout.close()
    if status:
        raise CheckpointError(f"reading the checkpoint ended with status {status}" if status > 0 else signal.strsignal(-status) or "killed")
