"""Signal handling: stop, read the models again, or exit at once.

Rules of this file:
- The first SIGINT or SIGTERM starts a graceful shutdown. The second one exits at once.
- SIGHUP has two meanings, which are told apart: an operator sends it to have the models read again, and the system
  sends it when the terminal closes.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable


class Signals:
    """Turns signals into events. `at_once` is called before a second SIGINT or SIGTERM exits the process."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        self.at_once: Callable[[], None] = lambda: None
        # If the gateway was started in a terminal, SIGHUP from the closing terminal means stop.
        self._had_terminal = os.isatty(0)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _end(self, number: int) -> None:
        if self.stop.is_set():
            self.at_once()
            os._exit(128 + number)
        self.stop.set()

    def _hang_up(self) -> None:
        if self._had_terminal and not os.isatty(0):
            self.stop.set()
        else:
            self.reload.set()
