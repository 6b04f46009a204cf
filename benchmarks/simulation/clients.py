"""The clients: training jobs that read streams, and callers of single samples.

Rules of this file:
- A job takes the samples of a step, computes for the time that its rate gives, and takes the next. Meanwhile its
  streams generate samples ahead of it.
- A DataLoader's prefetching beyond the streams' windows is left out, so a job waits a little earlier than a real one.
- The length of steps varies a little, because otherwise scrapes could always meet them in the same phase.
- A job's waits are those of its steps, each weighted by the time that it covers. Without weights, a job that gets few
  samples would count little, although it waits long.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import simpy

from simulation.service import Gateway

STEP_SPREAD = 0.1  # share of the seconds of a training step, up and down
RETRY_INFO_SECONDS = 5.0  # after a refusal


@dataclass(frozen=True)
class JobSpec:
    """A training job. It begins at `start` (seconds) and wants `rate` samples per second, `total` in all, `step` at a
    time."""

    start: float
    rate: float
    total: int
    step: int = 16
    streams: int = 8  # workers of its DataLoader
    window: int = 8  # the client's default


class Job:
    """A running training job; `waits` holds (seconds waited, seconds covered) of each step."""

    def __init__(self, env: simpy.Environment, gateway: Gateway, spec: JobSpec, *, rng: np.random.Generator) -> None:
        self._env = env
        self._rng = rng
        self._gateway = gateway
        self._spec = spec
        self._ready = 0
        self._asked = 0  # owed or ready
        self.taken = 0
        self.received = 0  # taken or ready
        self._arrival: simpy.Event | None = None
        self._waiting_since: float | None = None
        self.waits: list[tuple[float, float]] = []
        env.process(self._run())

    def delivered(self, count: int) -> None:
        self._ready += count
        self.received += count
        if self._arrival is not None and not self._arrival.triggered:
            self._arrival.succeed()

    def refused(self, count: int) -> None:
        self._asked -= count
        self._env.timeout(RETRY_INFO_SECONDS).callbacks.append(lambda _: self._fill())

    def open_wait(self) -> float:
        """Return the seconds that the job has waited for its current step."""
        return 0.0 if self._waiting_since is None else self._env.now - self._waiting_since

    def _fill(self) -> None:
        """Request as many samples as the windows have room for."""
        spec = self._spec
        room = min(spec.streams * spec.window, spec.total - self.taken) - self._asked
        if room > 0:
            self._asked += room
            self._gateway.ask(self, room)

    def _run(self) -> Generator[simpy.Event, None, None]:
        spec = self._spec
        yield self._env.timeout(spec.start)
        self._waiting_since = self._env.now
        while not self._gateway.open_streams(spec.streams):
            yield self._env.timeout(RETRY_INFO_SECONDS)
        self._fill()
        while self.taken < spec.total:
            need = min(spec.step, spec.total - self.taken)
            while self._ready < need:
                self._arrival = self._env.event()
                yield self._arrival
            waited = self.open_wait()
            self._waiting_since = None
            self._ready -= need
            self._asked -= need
            self.taken += need
            self._fill()
            computing = need / spec.rate * self._rng.uniform(1 - STEP_SPREAD, 1 + STEP_SPREAD)
            self.waits.append((waited, waited + computing))
            yield self._env.timeout(computing)
            self._waiting_since = self._env.now
        self._waiting_since = None
        self._gateway.close_streams(spec.streams)


class Caller:
    """A request for one sample, sent when it is constructed. `done` is an event with its latency in seconds, or None if
    it was refused."""

    def __init__(self, env: simpy.Environment, gateway: Gateway) -> None:
        self._env = env
        self._gateway = gateway
        self._since = env.now
        self.done = env.event()
        if gateway.admit(1):
            gateway.ask(self, 1)
        else:
            self.done.succeed(None)

    def delivered(self, count: int) -> None:
        self._gateway.leave(count)
        self.done.succeed(self._env.now - self._since)

    def refused(self, count: int) -> None:
        self._gateway.leave(count)
        self.done.succeed(None)
