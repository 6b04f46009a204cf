"""Which sample goes to Triton next: a bounded number of slots, shared fairly by requests and streams.

Rules of this file:
- Triton holds few samples and the others wait here, where those of a client that leaves are gone at once: what Triton
  has begun is never called off (`triton/client.py` says why), and keeps its slot until it is answered.
- Requests and streams take turns when both wait: a request passes all samples that streams have waiting, and a flood
  of requests leaves streams half of the slots. Within each kind the requesters take turns, one sample a turn.
- Every second turn of requests is the oldest one's: a large batch ends, however many requests come after it.
- `Turns` decides and does no I/O; `Slots` adds the waiting.
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
    """Whose samples take turns as one: a request, be it a batch, or a stream."""

    kind: Kind
    number: int = field(default_factory=_numbers)  # in the order of their coming


class Turns(Generic[T]):
    """What waits, and what is next."""

    def __init__(self) -> None:
        # A dict keeps its order: the first requester has the next turn and then goes to the end.
        self._rings: dict[Kind, dict[Requester, deque[T]]] = {kind: {} for kind in KINDS}
        self._last: Kind = "stream"
        self._oldest_is_next = True  # of the requests

    def add(self, requester: Requester, item: T) -> None:
        self._rings[requester.kind].setdefault(requester, deque()).append(item)

    def discard(self, requester: Requester, item: T) -> None:
        """Forget an item, if it still waits."""
        waiting = self._rings[requester.kind].get(requester, deque())
        if item in waiting:
            waiting.remove(item)
            if not waiting:
                del self._rings[requester.kind][requester]

    def take(self) -> T | None:
        """The next item, which waits no longer; None when nothing waits."""
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
        """The number of items of a kind that wait."""
        return sum(len(waiting) for waiting in self._rings[kind].values())


class Waiter(Protocol):
    """What waits for a slot, in the turns of its requester."""

    requester: Requester


class Slots:
    """`capacity` slots, each held by one sample while it is in Triton."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._turns: Turns[Waiter] = Turns()
        self._granted: dict[Waiter, asyncio.Future[None]] = {}  # of those who wait

    def depth(self, kind: Kind) -> int:
        """The number of samples of a kind that wait for a slot."""
        return self._turns.depth(kind)

    @asynccontextmanager
    async def slot(self, waiter: Waiter) -> AsyncIterator[None]:
        """Hold a slot, once it is the turn of the waiter's requester."""
        if self._free > 0:  # then nobody waits
            self._free -= 1
        else:
            await self._wait(waiter)
        try:
            yield
        finally:
            self._release()

    def moved(self, waiter: Waiter, before: Requester) -> None:
        """The waiter's requester was `before`: where it waits, it now waits in the turns of the new one."""
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
                self._release()  # it was granted in the moment in which its client left
            raise
        finally:
            self._granted.pop(waiter, None)

    def _release(self) -> None:
        while (waiter := self._turns.take()) is not None:
            granted = self._granted.pop(waiter)
            if not granted.done():  # else it was cancelled, and its task is about to notice
                granted.set_result(None)
                return
        self._free += 1
