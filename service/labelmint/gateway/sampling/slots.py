"""Fair queueing for Triton: requests and streams share a bounded number of slots, and the room of the Tritons.

Rules of this file:
- Triton gets few samples at a time, and the others queue here. If a client disconnects, its queued samples are dropped
  at once. A sample that Triton has begun is never cancelled (`triton/client.py` says why): it keeps its slot until
  Triton answers.
- A sample gets a slot only if the Tritons have room for its model (`triton/window.py`). If they have none, samples of
  other models pass it, and it keeps its turn.
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
from functools import cache
from itertools import count
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

Kind = Literal["request", "stream"]
KINDS: tuple[Kind, ...] = get_args(Kind)

T = TypeVar("T")
_numbers: Callable[[], int] = count().__next__


class Model(NamedTuple):
    """The model of a requester's samples, as Triton knows it."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True, eq=False)
class Requester:
    """A request (single or batch) or a stream of one model. Its samples share its turns."""

    kind: Kind
    model: Model
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

    def take(self, may: Callable[[Requester], bool]) -> T | None:
        """Remove and return the next item of the requesters that `may` have a turn; None if these have no item."""
        for kind in sorted(KINDS, key=lambda kind: kind == self._last):
            ring = self._rings[kind]
            requester = next(filter(may, ring), None)
            if requester is not None:
                if kind == "request":
                    if self._oldest_is_next:
                        requester = min(filter(may, ring), key=lambda requester: requester.number)
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
    """At most `limit` slots, each occupied by one sample while it is in Triton, or fewer if the Tritons lack `room`.

    `room` returns how many more samples of a model the Tritons should get.
    """

    def __init__(self, limit: int, room: Callable[[Model], int]) -> None:
        self._free = limit
        self._room = room
        self._turns: Turns[Waiter] = Turns()
        self._granted: dict[Waiter, asyncio.Future[None]] = {}  # for the queued waiters
        self._starting = 0  # samples that got a slot and are not in Triton yet, so `room` does not count them

    def depth(self, kind: Kind) -> int:
        return self._turns.depth(kind)

    @asynccontextmanager
    async def slot(self, waiter: Waiter) -> AsyncIterator[None]:
        """Wait for the turn of the waiter's requester, then occupy a slot. The sample must go to Triton at once."""
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

    def grant(self) -> None:
        """Give the free slots to the next waiters, as far as there is room. Call it when there may be more room."""
        room = cache(self._room)
        while self._free > 0 and (waiter := self._turns.take(lambda requester: room(requester.model) > self._starting)):
            granted = self._granted.pop(waiter)
            if not granted.done():  # otherwise it was cancelled, and its task is about to notice
                self._free -= 1
                self._starting += 1
                granted.set_result(None)

    async def _wait(self, waiter: Waiter) -> None:
        granted = self._granted[waiter] = asyncio.get_running_loop().create_future()
        self._turns.add(waiter.requester, waiter)
        self.grant()
        try:
            await granted
        except BaseException:
            self._turns.discard(waiter.requester, waiter)
            if granted.done() and not granted.cancelled():
                self._starting -= 1
                self._release()  # the slot was granted just as the client disconnected
            raise
        finally:
            self._granted.pop(waiter, None)
        self._starting -= 1
        if not self._starting:  # samples of other models may have waited for those that started
            asyncio.get_running_loop().call_soon(self.grant)

    def _release(self) -> None:
        self._free += 1
        self.grant()
