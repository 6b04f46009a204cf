"""Which sample goes to Triton next: a bounded number of slots, shared fairly by requests and streams.

Rules of this file:
- Triton holds few samples and the others wait here, where those of a client that leaves are gone at once: what Triton
  has begun is never called off (`triton/client.py` says why), and keeps its slot until it is answered.
- Requests and streams take turns when both wait: a request passes all samples that streams have waiting, and a flood
  of requests leaves streams half of the slots. Within each kind the parties take turns, one sample a turn.
- `Turns` decides and does no I/O; `Slots` adds the waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

Kind = Literal["request", "stream"]
KINDS: tuple[Kind, ...] = get_args(Kind)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Party:
    """Whose samples take turns as one: a request, be it a batch, or a stream."""

    kind: Kind


class Turns(Generic[T]):
    """What waits, and what is next."""

    def __init__(self) -> None:
        # A dict keeps its order: the first party has the next turn and then goes to the end.
        self._rings: dict[Kind, dict[Party, deque[T]]] = {kind: {} for kind in KINDS}
        self._last: Kind = "stream"

    def add(self, party: Party, item: T) -> None:
        self._rings[party.kind].setdefault(party, deque()).append(item)

    def discard(self, party: Party, item: T) -> None:
        """Forget an item, if it still waits."""
        waiting = self._rings[party.kind].get(party, deque())
        if item in waiting:
            waiting.remove(item)
            if not waiting:
                del self._rings[party.kind][party]

    def take(self) -> T | None:
        """The next item, which waits no longer; None when nothing waits."""
        for kind in sorted(KINDS, key=lambda kind: kind == self._last):
            ring = self._rings[kind]
            if ring:
                party = next(iter(ring))
                waiting = ring.pop(party)
                item = waiting.popleft()
                if waiting:
                    ring[party] = waiting
                self._last = kind
                return item
        return None

    def depth(self, kind: Kind) -> int:
        """The number of items of a kind that wait."""
        return sum(len(waiting) for waiting in self._rings[kind].values())


class Slots:
    """`capacity` slots, each held by one sample while it is in Triton."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._turns: Turns[asyncio.Future[None]] = Turns()

    def depth(self, kind: Kind) -> int:
        """The number of samples of a kind that wait for a slot."""
        return self._turns.depth(kind)

    @asynccontextmanager
    async def slot(self, party: Party) -> AsyncIterator[None]:
        """Hold a slot, once it is this party's turn."""
        if self._free > 0:  # then nobody waits
            self._free -= 1
        else:
            await self._wait(party)
        try:
            yield
        finally:
            self._release()

    async def _wait(self, party: Party) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.add(party, granted)
        try:
            await granted
        except BaseException:
            self._turns.discard(party, granted)
            if granted.done() and not granted.cancelled():
                self._release()  # it was granted in the moment in which its client left
            raise

    def _release(self) -> None:
        while (granted := self._turns.take()) is not None:
            if not granted.done():  # else it was cancelled, and its task is about to notice
                granted.set_result(None)
                return
        self._free += 1
