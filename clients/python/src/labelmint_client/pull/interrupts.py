"""Delays signals until the end of a step that must not be interrupted.

Rules of this file:
- The caller's own handler still handles the signal. This module only delays the call of the handler.
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
    """Handle the first SIGINT or SIGTERM in the block only after the block. A second one is handled at once.

    This has an effect in the main thread only, because only the main thread handles signals.
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
