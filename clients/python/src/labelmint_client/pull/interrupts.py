"""Steps that a signal does not cut in two.

Rules of this file:
- What a signal does is decided by whoever set its handler; it is only put off until the step has ended.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def put_off() -> Iterator[None]:
    """The first SIGINT or SIGTERM in the block is handled when the block has ended, the second at once.

    Without effect in other threads than the main one, which alone handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers = {int(each): handler for each in _SIGNALS if callable(handler := signal.getsignal(each))}

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            handlers[number](number, frame)

    try:
        for each in handlers:
            signal.signal(each, wait)
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    if waiting:
        handlers[waiting[0]](waiting[0], None)
