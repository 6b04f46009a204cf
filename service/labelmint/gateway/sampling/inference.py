"""One sample on its way through Triton, for all who wait for it: what is decided about it.

Rules of this file:
- Everything that happens to an inference is an event, and time comes in as a number: nothing here waits, and tests need
  no event loop. `inferences.py` adds the waiting.
- Who waits for a sample waits no longer than its own deadline. The work goes on until the latest of them.
- A request that joins a stream's sample lends it its turn, since requests have turns before streams.
- While Triton is away, a call is tried again each second, for a bounded time.
"""

from __future__ import annotations

from collections.abc import Collection

from labelmint.gateway.sampling.slots import Requester

RETRY_SECONDS = 1.0


class Hold:
    """A call that needs Triton, from its first attempt at `now` on; it is held for `seconds` while Triton is away."""

    def __init__(self, now: float, seconds: float) -> None:
        self._end = now + seconds

    def unavailable(self, now: float) -> float | None:
        """An attempt found Triton away: the seconds until the next one, None where there is none any more."""
        return None if now + RETRY_SECONDS > self._end else RETRY_SECONDS


class Inference:
    """One sample of which `outputs` are wanted, in the turns of `requester`, until `deadline` (None: for ever)."""

    def __init__(self, outputs: Collection[str], *, requester: Requester, deadline: float | None) -> None:
        self.requester = requester
        self._outputs = frozenset(outputs)
        self._deadline = deadline
        self._waiting = 1
        self._ended = False

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for it any more, so that the work may stop."""
        return self._waiting == 0

    def serves(self, outputs: Collection[str]) -> bool:
        """Whether one who wants these outputs may join."""
        return self._outputs.issuperset(outputs) and not self._ended and not self.abandoned

    def join(self, requester: Requester, deadline: float | None) -> None:
        """One more waits for it."""
        self._waiting += 1
        self._deadline = None if self._deadline is None or deadline is None else max(self._deadline, deadline)
        if self.requester.kind == "stream" and requester.kind == "request":
            self.requester = requester

    def leave(self) -> None:
        """One who waited has its answer or has gone."""
        self._waiting -= 1

    def end(self) -> None:
        """Its outcome is known."""
        self._ended = True

    def seconds(self, now: float) -> float | None:
        """How long Triton may take from now on, None for ever."""
        return None if self._deadline is None else self._deadline - now


def is_over(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now
