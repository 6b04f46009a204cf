"""Waiting for a state that comes in its own time: everything that waits for a metric, a log line or a process.

Rules of this file:
- The limit is long enough for a busy machine. It ends only tests that fail.
- A condition is asked again and again, so that a test never depends on the moment at which it looks.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

SECONDS = 60.0
PAUSE_SECONDS = 0.05

T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = SECONDS) -> T:
    """Return the first true value of `condition`. Raises AssertionError with the last one after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen in {seconds:g} s; the last value was {value!r}"
        time.sleep(PAUSE_SECONDS)
    return value


async def until(condition: Callable[[], T | Awaitable[T]], seconds: float = SECONDS) -> T:
    """Return what `wait_for` returns, for conditions that may be awaited, without blocking the event loop."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        value = await value if inspect.isawaitable(value) else value
        if value:
            return value
        assert time.monotonic() < deadline, f"it did not happen in {seconds:g} s; the last value was {value!r}"
        await asyncio.sleep(PAUSE_SECONDS)
