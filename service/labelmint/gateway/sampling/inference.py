"""The decisions about one inference, which is one sample in Triton that several callers may wait for.

Rules of this file:
- Each event of an inference is a method call, and time is passed in as a number. Nothing here waits, so tests need no
  event loop. `inferences.py` adds the waiting.
- A caller waits for a sample no longer than its own deadline. The work continues until the latest of these deadlines.
- A request that joins a stream's sample lends it the request's turn, because requests pass queued samples of streams.
- While Triton is unavailable, a call is retried every second for a bounded time.
"""

from __future__ import annotations

from collections.abc import Collection

from labelmint.gateway.sampling.slots import Requester

RETRY_SECONDS = 1.0


class Hold:
    """The retries of a call first tried at `now`; it is retried for `seconds` while Triton is unavailable."""

    def __init__(self, now: float, seconds: float) -> None:
        self._end = now + seconds

    def unavailable(self, now: float) -> float | None:
        """After an attempt failed: the seconds until the next one, or None if the time for retries is over."""
        return None if now + RETRY_SECONDS > self._end else RETRY_SECONDS


class Inference:
    """The generation of `outputs` of one sample, in the turns of `requester`, until `deadline` (None: no deadline)."""

    def __init__(self, outputs: Collection[str], *, requester: Requester, deadline: float | None) -> None:
        self.requester = requester
        self._outputs = frozenset(outputs)
        self._deadline = deadline
        self._waiting = 1
        self._ended = False

    @property
    def abandoned(self) -> bool:
        """Whether no caller waits for it any more, so the work may stop."""
        return self._waiting == 0

    def serves(self, outputs: Collection[str]) -> bool:
        """Whether a caller that needs these outputs may join."""
        return self._outputs.issuperset(outputs) and not self._ended and not self.abandoned

    def join(self, requester: Requester, deadline: float | None) -> None:
        """One more caller waits for it."""
        self._waiting += 1
        self._deadline = None if self._deadline is None or deadline is None else max(self._deadline, deadline)
        if self.requester.kind == "stream" and requester.kind == "request":
            self.requester = requester

    def leave(self) -> None:
        """One caller has its result or has stopped waiting."""
        self._waiting -= 1

    def end(self) -> None:
        """The outcome is known."""
        self._ended = True

    def seconds(self, now: float) -> float | None:
        """How long Triton may take from now on; None for no limit."""
        return None if self._deadline is None else self._deadline - now


def is_over(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now
