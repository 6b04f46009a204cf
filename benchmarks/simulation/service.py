"""Tritons and gateways: samples wait for slots, go to Tritons in turn, and are served in batches by two steps.

Rules of this file:
- The unit of events is the batch of a step. Samples are counted, not tracked: a few samples of one party move together.
- The dynamic batcher takes the waiting samples, up to the largest batch, as soon as its step is free (no queue delay is
  set).
- Both steps of a Triton may run at the same time. They then slow each other down, because they share one device.
- All gateways are simulated as one, because clients spread over them evenly. Turns, limits and waiting samples are as
  in gateway/sampling.
- Every requested sample is delivered, refused or owed; `Gateway.owed` counts the owed ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simpy

MAX_BATCH = 16
STEPS = (0, 1)  # generator, style_interpreter
RETRY_SECONDS = 1.0  # of the gateway, while Triton is unavailable


@dataclass(frozen=True)
class Profile:
    """The speed of one Triton: `seconds[step][n - 1]` for a batch of n alone, the speed (0 to 1] of each of two steps
    that run at the same time, and the `outside_seconds` of a call in the gateway's single thread."""

    seconds: tuple[tuple[float, ...], tuple[float, ...]]
    speed_together: float
    outside_seconds: float = 0.0

    @classmethod
    def measured(
        cls, sizes: list[int], seconds: list[list[float]], speed_together: float, *, outside_seconds: float
    ) -> Profile:
        """Return a profile from the seconds of a few batch sizes for each step, interpolated between them."""
        every = np.arange(1, MAX_BATCH + 1)
        first, second = (tuple(np.interp(every, sizes, step).tolist()) for step in seconds)
        return cls((first, second), speed_together, outside_seconds)

    @classmethod
    def linear(cls, fixed_seconds: float, sample_seconds: float) -> Profile:
        """Return the profile of a device that both steps share.

        Each step takes half of `fixed_seconds` per batch and of `sample_seconds` per sample.
        """
        step = tuple((fixed_seconds + sample_seconds * n) / 2 for n in range(1, MAX_BATCH + 1))
        return cls((step, step), 0.5)

    @property
    def rate(self) -> float:
        """Return samples per second with full batches, if the steps share one device."""
        return MAX_BATCH / sum(step[-1] for step in self.seconds)


class Requester(Protocol):
    """A party that has one turn for all its samples: a request, or the streams of a training job."""

    def delivered(self, count: int) -> None: ...

    def refused(self, count: int) -> None: ...


# A number of samples of one party, and the time since when they wait in a queue.
Chunk = tuple[Requester, int, float]


class Triton:
    """One replica. It calls `finished(party, count)` for samples that leave the second step."""

    def __init__(self, env: simpy.Environment, profile: Profile, finished: Callable[[Requester, int], None]) -> None:
        self._env = env
        self._profile = profile
        self._finished = finished
        self._queues: tuple[deque[Chunk], deque[Chunk]] = (deque(), deque())
        self._running: list[list[Chunk] | None] = [None, None]
        self._left = [0.0, 0.0]  # seconds of work, alone
        self._since = env.now
        self._timer = 0
        self.pending = 0  # samples in the queues of both steps
        self._busy_seconds = 0.0
        self.queue_seconds = 0.0  # summed over the samples that left a queue
        self.compute_seconds = 0.0  # summed over the samples that left a step

    def submit(self, party: Requester, count: int) -> None:
        self._queues[0].append((party, count, self._env.now))
        self.pending += count
        if self._running[0] is None:
            self._advance()
            self._go_on()

    def busy_seconds(self) -> float:
        """Return the seconds in which a step ran, up to now."""
        self._advance()
        return self._busy_seconds

    def lost(self) -> list[tuple[Requester, int]]:
        """Remove the Triton. Returns the samples that were in it."""
        self._timer += 1
        batches = [*self._queues, *(batch for batch in self._running if batch is not None)]
        gone = [(party, count) for batch in batches for party, count, _ in batch]
        self._queues = (deque(), deque())
        self._running = [None, None]
        self.pending = 0
        return gone

    def _advance(self) -> None:
        now = self._env.now
        elapsed = now - self._since
        first, second = self._running
        if first is not None or second is not None:
            worked = elapsed * self._speed()
            # The time of a step that is not running is set when it starts.
            self._left[0] -= worked
            self._left[1] -= worked
            self._busy_seconds += elapsed
        self._since = now

    def _speed(self) -> float:
        return 1.0 if None in self._running else self._profile.speed_together

    def _go_on(self) -> None:
        """Start the steps that can start, and set the timer for the next end."""
        for step in STEPS:
            if self._running[step] is None and self._queues[step]:
                self._start(step)
        self._timer += 1
        left = [self._left[step] for step in STEPS if self._running[step] is not None]
        if left:
            timeout = self._env.timeout(max(0.0, min(left) / self._speed()), value=self._timer)
            timeout.callbacks.append(self._ended)

    def _start(self, step: int) -> None:
        now, queue = self._env.now, self._queues[step]
        batch: list[Chunk] = []
        size = 0
        while queue and size < MAX_BATCH:
            party, count, since = queue.popleft()
            taken = min(count, MAX_BATCH - size)
            if taken < count:
                queue.appendleft((party, count - taken, since))
            batch.append((party, taken, since))
            size += taken
            self.queue_seconds += taken * (now - since)
        self.pending -= size
        self._running[step] = batch
        self._left[step] = self._profile.seconds[step][size - 1]

    def _ended(self, timer: simpy.Event) -> None:
        if timer.value != self._timer:
            return  # an outdated timer: another one has been set since
        self._advance()
        now = self._env.now
        leaving: list[Chunk] = []
        for step in STEPS:
            batch = self._running[step]
            if batch is None or self._left[step] > 1e-9:
                continue
            self._running[step] = None
            size = sum(count for _, count, _ in batch)
            self.compute_seconds += size * self._profile.seconds[step][size - 1]
            if step == 0:
                self._queues[1].extend((party, count, now) for party, count, _ in batch)
                self.pending += size
            else:
                leaving = batch
        self._go_on()
        for party, count, _ in leaving:
            self._finished(party, count)


class Gateway:
    """All gateways together: at most `slots` samples in Triton and `max_streams` streams. While there is no Triton,
    samples wait for up to `capacity_wait_seconds`. `acceptance` is the share of samples that the JS gate accepts; for
    the others, new ones are generated. Samples of one party go to a Triton `grain` at a time, or more if there are many
    per Triton."""

    def __init__(
        self,
        env: simpy.Environment,
        slots: int,
        max_in_flight: int,
        *,
        max_streams: int,
        capacity_wait_seconds: float,
        acceptance: float = 1.0,
        grain: int = 1,
    ) -> None:
        self._env = env
        self._slots = self._free = slots
        self._max_in_flight = max_in_flight
        self._max_streams = max_streams
        self._capacity_wait_seconds = capacity_wait_seconds
        self._rejection = 1.0 - acceptance
        self._rejected = 0.5  # carried fraction of a sample: right on average without random numbers
        self._grain = grain
        self._waiting: dict[Requester, deque[list[float]]] = {}  # in the order of turns: [count, since] each
        self._tritons: deque[Triton] = deque()
        self._streams = 0
        self._in_flight = 0
        self.asked = self.accepted = self.refused = self.minted = 0
        env.process(self._expire())

    @property
    def owed(self) -> int:
        """`labelmint_demand_samples`."""
        return self.asked - self.accepted - self.refused

    @property
    def in_triton(self) -> int:
        """Return the number of samples that occupy a slot."""
        return self._slots - self._free

    @property
    def waiting(self) -> int:
        """Return the number of samples that wait for a slot, `labelmint_queue_depth_samples`."""
        return int(sum(count for chunks in self._waiting.values() for count, _ in chunks))

    def open_streams(self, count: int) -> bool:
        """Open `count` more streams if the limit allows it. Returns whether they are open."""
        if self._streams + count > self._max_streams:
            return False
        self._streams += count
        return True

    def close_streams(self, count: int) -> None:
        self._streams -= count

    def admit(self, count: int) -> bool:
        """Admit a request for `count` samples if the limit allows it. Returns False if it is refused."""
        if self._in_flight > 0 and self._in_flight + count > self._max_in_flight:
            self.asked += count
            self.refused += count
            return False
        self._in_flight += count
        return True

    def leave(self, count: int) -> None:
        """End an admitted request: it has its answer."""
        self._in_flight -= count

    def ask(self, party: Requester, count: int) -> None:
        """Queue samples of an admitted request, or of streams whose windows have room."""
        if count > 0:
            self.asked += count
            self._wait(party, count, self._env.now)
            self._grant()

    def add(self, triton: Triton) -> None:
        self._tritons.append(triton)
        self._grant()

    def remove(self, triton: Triton) -> None:
        if triton in self._tritons:
            self._tritons.remove(triton)

    def finished(self, party: Requester, count: int) -> None:
        """Deliver those of Triton's finished samples that pass the gate."""
        self.minted += count
        self._free += count
        self._rejected += count * self._rejection
        again = int(self._rejected)
        self._rejected -= again
        again = min(again, count)
        if again:
            self._wait(party, again, self._env.now)
        if count > again:
            self.accepted += count - again
            party.delivered(count - again)
        self._grant()

    def retry(self, party: Requester, count: int) -> None:
        """Send samples of a Triton that vanished to another one, a little later. They keep their slots."""

        def again(_: simpy.Event) -> None:
            self._free += count
            self._wait(party, count, self._env.now)
            self._grant()

        self._env.timeout(RETRY_SECONDS).callbacks.append(again)

    def _wait(self, party: Requester, count: int, since: float) -> None:
        self._waiting.setdefault(party, deque()).append([count, since])

    def _grant(self) -> None:
        while self._free > 0 and self._waiting and self._tritons:
            party = next(iter(self._waiting))
            chunks = self._waiting.pop(party)
            fair = max(self._grain, self._free // (len(self._waiting) + 1))
            count = int(min(chunks[0][0], self._free, fair))
            chunks[0][0] -= count
            if chunks[0][0] == 0:
                chunks.popleft()
            if chunks:
                self._waiting[party] = chunks  # at the end, so that the others get their turns
            self._free -= count
            each = max(self._grain, -(-count // len(self._tritons)))
            while count > 0:
                part = min(each, count)
                count -= part
                self._tritons.rotate(-1)
                self._tritons[-1].submit(party, part)

    def _expire(self) -> Generator[simpy.Event, None, None]:
        """While there is no Triton, refuse samples that have waited too long (UNAVAILABLE)."""
        while True:
            yield self._env.timeout(RETRY_SECONDS)
            if self._tritons:
                continue
            end = self._env.now - self._capacity_wait_seconds
            for party in list(self._waiting):
                chunks = self._waiting[party]
                old = int(sum(count for count, since in chunks if since < end))
                if old:
                    kept = deque(chunk for chunk in chunks if chunk[1] >= end)
                    if kept:
                        self._waiting[party] = kept
                    else:
                        del self._waiting[party]
                    self.refused += old
                    party.refused(old)
