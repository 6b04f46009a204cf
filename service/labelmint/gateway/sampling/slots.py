"""Fair queueing for Triton: requests and streams share a bounded number of slots.

Rules of this file:
- Triton gets few samples at a time, and the others queue here. If a client disconnects, its queued samples are dropped
  at once. A sample that Triton has begun is never cancelled (`triton/client.py` says why): it keeps its slot until
  Triton answers.
- Requests and streams alternate while both have samples queued. A request therefore passes all queued samples of
  streams, and a flood of requests leaves streams half of the slots. Within each kind the requesters take turns, with
  one sample per turn.
- Every second turn of the requests goes to the oldest request, so a large batch ends however many requests follow it.
- `Turns` makes the decisions, without I/O. `Slots` adds the waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Literal, Protocol, TypeVar, get_args

Kind = Literal["request", "stream"]
KINDS: tuple[Kind, ...] = get_args(Kind)

T = TypeVar("T")
_numbers: Callable[[], int] = count().__next__


@dataclass(frozen=True, eq=False)
class Requester:
    """A request (single or batch) or a stream. Its samples share its turns."""

    kind: Kind
    number: int = field(default_factory=_numbers)  # in order of arrival


class Turns(Generic[T]):
    """The queued items, and the choice of the next one."""

    def __init__(self) -> None:
        # A dict keeps insertion order. The first requester has the next turn and then moves to the end.
        self._rings: dict[Kind, dict[Requester, deque[T]]] = {kind: {} for kind in KINDS}
        self._last: Kind = "stream"
        self._oldest_is_next = True  # whether the oldest request has the requests' next turn

    def add(self, requester: Requester, item: T) -> None:
        self._rings[requester.kind].setdefault(requester, deque()).append(item)

    def discard(self, requester: Requester, item: T) -> None:
        """Remove an item if it is still queued."""
        waiting = self._rings[requester.kind].get(requester, deque())
        if item in waiting:
            waiting.remove(item)
            if not waiting:
                del self._rings[requester.kind][requester]

    def take(self) -> T | None:
        """Remove and return the next item; None if the queue is empty."""
        for kind in sorted(KINDS, key=lambda kind: kind == self._last):
            ring = self._rings[kind]
            if ring:
                requester = next(iter(ring))
                if kind == "request":
                    if self._oldest_is_next:
                        requester = min(ring, key=lambda requester: requester.number)
                    self._oldest_is_next = not self._oldest_is_next
                waiting = ring.pop(requester)
                item = waiting.popleft()
                if waiting:
                    ring[requester] = waiting
                self._last = kind
                return item
        return None

    def depth(self, kind: Kind) -> int:
        """The number of queued items of a kind."""
        return sum(len(waiting) for waiting in self._rings[kind].values())


class Waiter(Protocol):
    """A sample that waits for a slot, in the turns of its requester."""

    requester: Requester


class Slots:
    """`capacity` slots, each occupied by one sample while it is in Triton."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._turns: Turns[Waiter] = Turns()
        self._granted: dict[Waiter, asyncio.Future[None]] = {}  # for the queued waiters

    def depth(self, kind: Kind) -> int:
        return self._turns.depth(kind)

    @asynccontextmanager
    async def slot(self, waiter: Waiter) -> AsyncIterator[None]:
        """Wait for the turn of the waiter's requester, then occupy a slot."""
        if self._free > 0:  # then the queue is empty
            self._free -= 1
        else:
            await self._wait(waiter)
        try:
            yield
        finally:
            self._release()

    def moved(self, waiter: Waiter, before: Requester) -> None:
        """The waiter's requester was `before` and has changed: if the waiter is queued, move it to the new turns."""
        if waiter.requester is not before and waiter in self._granted:
            self._turns.discard(before, waiter)
            self._turns.add(waiter.requester, waiter)

    async def _wait(self, waiter: Waiter) -> None:
        granted = self._granted[waiter] = asyncio.get_running_loop().create_future()
        self._turns.add(waiter.requester, waiter)
        try:
            await granted
        except BaseException:
            self._turns.discard(waiter.requester, waiter)
            if granted.done() and not granted.cancelled():
                self._release()  # the slot was granted just as the client disconnected
            raise
        finally:
            self._granted.pop(waiter, None)

    def _release(self) -> None:
        while (waiter := self._turns.take()) is not None:
            granted = self._granted.pop(waiter)
            if not granted.done():  # otherwise it was cancelled, and its task is about to notice
                granted.set_result(None)
                return
        self._free += 1
