"""What the signals of the process ask for: to stop, to read the models again, to exit at once.

Rules of this file:
- The first SIGINT or SIGTERM asks for an orderly end, the second one exits.
- A terminal that is closed sends SIGHUP, as an operator does who wants the models read again; the two are told apart.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable


class Signals:
    """What signals ask for. `at_once` is called before the process exits because the end was asked for twice."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        self.at_once: Callable[[], None] = lambda: None
        # A terminal that is closed sends SIGHUP too; who serves from there wants the end.
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
