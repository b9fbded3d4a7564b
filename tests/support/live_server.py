"""A real uvicorn on a loopback port, in a thread of this process.

In-process ASGI transports deliver a body only when it is complete, so whatever is about streaming, timing or disconnects runs against this.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def serve_in_thread(app: Any, **options: Any) -> Iterator[str]:
    """Run `app` on a free port of 127.0.0.1 and give its base URL; `options` are uvicorn's."""
    options = {"log_config": None, "access_log": False, "lifespan": "on", "timeout_graceful_shutdown": 2} | options
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        _wait_until_started(server, thread)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=15)


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    give_up = time.monotonic() + 15
    while not server.started:
        if not thread.is_alive() or time.monotonic() > give_up:
            raise RuntimeError("the test server did not start")
        time.sleep(0.005)
