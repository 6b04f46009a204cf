"""Which sample goes to Triton next: a bounded number of slots, shared fairly by requests and streams.

Rules of this file:
- Triton holds few samples and the others wait here, where those of a client that leaves are gone at once: what Triton
  has begun is never called off (`triton/client.py` says why), and keeps its slot until it is answered.
- Requests and streams take turns when both wait: a request passes all samples that streams have waiting, and a flood
  of requests leaves streams half of the slots. Within each kind the parties take turns, one sample a turn.
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
from typing import Generic, Literal, TypeVar, get_args

Kind = Literal["request", "stream"]
KINDS: tuple[Kind, ...] = get_args(Kind)

T = TypeVar("T")
_numbers: Callable[[], int] = count().__next__


@dataclass(frozen=True, eq=False)
class Party:
    """Whose samples take turns as one: a request, be it a batch, or a stream."""

    kind: Kind
    number: int = field(default_factory=_numbers)  # in the order of their coming


class Turns(Generic[T]):
    """What waits, and what is next."""

    def __init__(self) -> None:
        # A dict keeps its order: the first party has the next turn and then goes to the end.
        self._rings: dict[Kind, dict[Party, deque[T]]] = {kind: {} for kind in KINDS}
        self._last: Kind = "stream"
        self._oldest_is_next = True  # of the requests

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
                if kind == "request":
                    if self._oldest_is_next:
                        party = min(ring, key=lambda party: party.number)
                    self._oldest_is_next = not self._oldest_is_next
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


@dataclass(eq=False)
class Claim:
    """One sample's claim to a slot, in the turns of `party`; after `deadline`, on the loop's clock, nobody wants it."""

    party: Party
    deadline: float | None = None
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    turns: Turns[Claim] | None = None  # in which it waits

    def join(self, other: Claim) -> None:
        """Stand also for `other`, which is for the same sample: until the later deadline, and in the turn of a request
        where one of them is a request's."""
        self.deadline = None if self.deadline is None or other.deadline is None else max(self.deadline, other.deadline)
        if self.party.kind == "stream" and other.party.kind == "request":
            if self.turns is not None:
                self.turns.discard(self.party, self)
                self.turns.add(other.party, self)
            self.party = other.party


class Slots:
    """`capacity` slots, each held by one sample while it is in Triton."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._turns: Turns[Claim] = Turns()

    def depth(self, kind: Kind) -> int:
        """The number of samples of a kind that wait for a slot."""
        return self._turns.depth(kind)

    @asynccontextmanager
    async def slot(self, claim: Claim) -> AsyncIterator[None]:
        """Hold a slot, once it is the turn of the claim's party. A claim is good for one."""
        if self._free > 0:  # then nobody waits
            self._free -= 1
        else:
            await self._wait(claim)
        try:
            yield
        finally:
            self._release()

    async def _wait(self, claim: Claim) -> None:
        claim.turns = self._turns
        self._turns.add(claim.party, claim)
        try:
            await claim.granted
        except BaseException:
            self._turns.discard(claim.party, claim)
            if claim.granted.done() and not claim.granted.cancelled():
                self._release()  # it was granted in the moment in which its client left
            raise
        finally:
            claim.turns = None

    def _release(self) -> None:
        while (claim := self._turns.take()) is not None:
            claim.turns = None
            if not claim.granted.done():  # else it was cancelled, and its task is about to notice
                claim.granted.set_result(None)
                return
        self._free += 1
