"""What a training run keeps on disk, so that it goes on after an interruption as if there had been none.

Rules of this file:
- The file is written aside and renamed: whenever the run dies, a whole one is there, or none.
- It belongs to the inputs that it was made from. A run of others refuses it and says which differ.
- SIGINT and SIGTERM wait for the end of a step, since the state in the middle of one is no state to go on from.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from labelmint.core.errors import UnusableFile

CHECKPOINT_SECONDS = 30.0


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Tensors, numbers and text, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    torch.save(dict(state), aside)
    os.replace(aside, path)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Raises UnusableFile."""
    try:
        return dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UnusableFile(path, "is not a whole checkpoint; remove it to begin anew") from error


class Checkpoint:
    """The file of one run. `inputs` are texts that name what the run was made from."""

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        self._path = path
        self._inputs = dict(inputs)
        self._saved = time.monotonic()
        self._came: list[int] = []

    def load(self) -> dict[str, Any] | None:
        """The state to go on from, None where there is none. Raises UnusableFile for that of another run."""
        if not self._path.exists():
            return None
        held = load_state(self._path)
        inputs = held.get("inputs")
        if not isinstance(inputs, dict) or "state" not in held:
            raise UnusableFile(self._path, "is not a whole checkpoint; remove it to begin anew")
        other = [name for name in self._inputs if inputs.get(name) != self._inputs[name]]
        if other:
            raise UnusableFile(
                self._path, f"was begun with other {' and other '.join(other)}; run that again, or remove it"
            )
        print(f"{self._path}: going on from it", file=sys.stderr)
        return dict(held["state"])

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Holds SIGINT and SIGTERM back for `keep`, and delivers them at the end."""
        # What is ignored (under nohup) stays so.
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handled = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in handled:
            signal.signal(number, lambda came, _: self._came.append(came))
        try:
            yield
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)
            if self._came:
                signal.raise_signal(self._came[0])

    def keep(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """To be called after each step: saves now and then, and before an interruption, which is raised."""
        if not self._came and time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            return
        save_state(self._path, {"inputs": self._inputs, "state": state()})
        self._saved = time.monotonic()
        if self._came:
            print(f"\n{self._path}: kept; the same command goes on from it", file=sys.stderr)
            raise KeyboardInterrupt

    def remove(self) -> None:
        """The run is over."""
        self._path.unlink(missing_ok=True)
