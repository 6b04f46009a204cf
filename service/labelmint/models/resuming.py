"""The checkpoint of a training run: with it, an interrupted run continues as if it had never been interrupted.

Rules of this file:
- The file is written under a temporary name and renamed. So a run that dies leaves a complete checkpoint or none.
- A checkpoint belongs to the inputs of its run. A run with other inputs refuses it and says which inputs differ.
- SIGINT and SIGTERM take effect at the end of a step, because a run cannot resume from the middle of one.
"""

from __future__ import annotations

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
from labelmint.files import replacing

CHECKPOINT_SECONDS = 30.0


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state of tensors, numbers and text, replacing an existing file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        torch.save(dict(state), aside)


def load_state(path: Path) -> dict[str, Any]:
    """Read a file that `save_state` wrote. Raises UnusableFile."""
    try:
        return dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UnusableFile(path, "is not a complete checkpoint; remove it to start again") from error


class Checkpoint:
    """The checkpoint file of one run. `inputs` are texts that identify the inputs of the run."""

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        self._path = path
        self._inputs = dict(inputs)
        self._saved = time.monotonic()
        self._came: list[int] = []

    def load(self) -> dict[str, Any] | None:
        """Return the state to resume from, or None if there is none. Raises UnusableFile for that of another run."""
        if not self._path.exists():
            return None
        held = load_state(self._path)
        inputs = held.get("inputs")
        if not isinstance(inputs, dict) or "state" not in held:
            raise UnusableFile(self._path, "is not a complete checkpoint; remove it to start again")
        other = [name for name in self._inputs if inputs.get(name) != self._inputs[name]]
        if other:
            raise UnusableFile(
                self._path, f"is from a run with other {' and other '.join(other)}; repeat that run, or remove it"
            )
        print(f"{self._path}: resuming from it", file=sys.stderr)
        return dict(held["state"])

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Hold SIGINT and SIGTERM back for `keep`. At the end, deliver the first that arrived."""
        # An ignored signal (under nohup) stays ignored.
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
        """Call this after each step. It saves every CHECKPOINT_SECONDS, and before it raises a signal that came."""
        if not self._came and time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            return
        save_state(self._path, {"inputs": self._inputs, "state": state()})
        self._saved = time.monotonic()
        if self._came:
            print(f"\n{self._path}: saved; the same command goes on from it", file=sys.stderr)
            raise KeyboardInterrupt

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
