"""VirtualLoop: an asyncio event loop whose time is a number that jumps from one timer to the next.

Nothing waits and nothing runs at once: what happens is decided by the timers, and timers of the same moment run in the order in which they
were set. That makes a world of coroutines a function of its seed. What the simulation needs is here: callbacks, timers, futures, tasks.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class VirtualLoop(asyncio.AbstractEventLoop):
    """`running` makes it the running loop; `advance` lets the next moment happen."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self._error: BaseException | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)

    def advance(self) -> None:
        """Run what is due at once; else the next timer and all that it sets off. Raises what `fail` was told meanwhile."""
        if not self._ready:
            self.now_s, _, timer = heapq.heappop(self._timers)
            self._ready.append(timer)
        while self._ready:
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """What no callback and no task may keep to itself."""
        self._error = self._error or error

    def drop(self) -> None:
        """Forget all that is still to come, and what went wrong."""
        self._error = None
        self._ready.clear()
        self._timers.clear()

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(max(when, self.now_s), callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (timer.when(), self._num_timers, timer))
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An error in a callback is an error of the world; without one, asyncio tells of a task that was left behind."""
        if (error := context.get("exception")) is not None:
            self.fail(error)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed by when its time comes."""
