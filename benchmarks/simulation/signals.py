"""The autoscaler's inputs: metrics as Prometheus has scraped them, and the scaling signals computed from them.

Rules of this file:
- No value is newer than the last scrape; windows and rates are over scrapes, as in PromQL.
- `Demand` is the shipped signal. The others are common alternatives; each has one target, the best for it.
- GPU utilisation is a metric of pods. Requests per second and demand are sums. Queue time is Triton's queue time
  divided by its compute time, as in NVIDIA's examples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import simpy

from simulation.autoscaler import average_value_replicas, pods_metric_replicas
from simulation.cluster import Cluster
from simulation.manifests import Trigger
from simulation.service import Gateway, Triton

RATE_SECONDS = 60.0
KEPT_SECONDS = 120.0


@dataclass(frozen=True)
class Scrape:
    """One round of scrapes: counters of samples and seconds, and (busy, queue, compute) seconds per ready Triton."""

    time: float
    demand: float
    pending: float
    queue_seconds: float
    delivered: float
    tritons: dict[Triton, tuple[float, float, float]]


class Prometheus:
    """Scrapes every `scrape_seconds`. If one simulated part stands for `slice_of` parts, sums are multiplied by it."""

    def __init__(
        self, env: simpy.Environment, gateway: Gateway, cluster: Cluster, *, scrape_seconds: float, slice_of: int = 1
    ) -> None:
        self._env = env
        self._gateway = gateway
        self._cluster = cluster
        self._scrape_seconds = scrape_seconds
        self._slice_of = slice_of
        self._scrapes: deque[Scrape] = deque()
        env.process(self._run())

    def _run(self) -> Generator[simpy.Event, None, None]:
        while True:
            self._scrapes.append(self._scrape())
            while self._scrapes[0].time < self._env.now - KEPT_SECONDS:
                self._scrapes.popleft()
            yield self._env.timeout(self._scrape_seconds)

    def _scrape(self) -> Scrape:
        tritons = self._cluster.tritons
        return Scrape(
            self._env.now,
            self.owed(),
            self._slice_of * sum(triton.pending for triton in tritons),
            self._slice_of * (self._cluster.past_queue_seconds + sum(triton.queue_seconds for triton in tritons)),
            self._slice_of * self._gateway.accepted,
            {triton: (triton.busy_seconds(), triton.queue_seconds, triton.compute_seconds) for triton in tritons},
        )

    def owed(self) -> int:
        """Return the samples owed at this moment."""
        return self._slice_of * self._gateway.owed

    def value(self, trigger: Trigger) -> float:
        """Return the current value of the trigger's query."""
        if trigger.name in ("demand", "pending"):
            since = self._env.now - trigger.window_seconds
            scrapes = [scrape for scrape in self._scrapes if scrape.time > since] or [self._scrapes[-1]]
            return sum(getattr(scrape, trigger.name) for scrape in scrapes) / len(scrapes)
        if trigger.name == "queue-time":
            first, last = self._ends(trigger.window_seconds)
            # Rounded, because a difference of sums over changing Tritons is not exactly zero, unlike that of one
            # series.
            gained = round(last.queue_seconds - first.queue_seconds, 6)
            return gained / max(last.time - first.time, self._scrape_seconds)
        raise ValueError(f"trigger {trigger.name!r} is not simulated")

    def delivered_rate(self) -> float:
        """Return accepted samples per second."""
        first, last = self._ends(RATE_SECONDS)
        return (last.delivered - first.delivered) / max(last.time - first.time, self._scrape_seconds)

    def utilisation(self) -> list[float]:
        """Return the share of the time in which each ready Triton ran a step, 0 to 1."""
        first, last = self._ends(RATE_SECONDS)
        shares = []
        for triton, (busy, _, _) in last.tritons.items():
            if triton in first.tritons:
                shares.append((busy - first.tritons[triton][0]) / (last.time - first.time))
        return shares * self._slice_of

    def queue_to_compute(self) -> list[float]:
        """Return queue seconds per compute second, of the samples that each ready Triton finished lately."""
        first, last = self._ends(RATE_SECONDS)
        ratios = []
        for triton, (_, queue, compute) in last.tritons.items():
            if triton in first.tritons:
                computed = compute - first.tritons[triton][2]
                ratios.append((queue - first.tritons[triton][1]) / computed if computed > 0 else 0.0)
        return ratios * self._slice_of

    def _ends(self, window: float) -> tuple[Scrape, Scrape]:
        last = self._scrapes[-1]
        first = next(scrape for scrape in self._scrapes if scrape.time >= last.time - window)
        return (first, last) if first is not last or len(self._scrapes) == 1 else (self._scrapes[-2], last)


class Signal(Protocol):
    """Proposes numbers of replicas. KEDA starts the first replica if the signal is `active`."""

    def active(self, seen: Prometheus) -> bool: ...

    def proposals(self, seen: Prometheus, current: int) -> list[int]: ...


@dataclass(frozen=True)
class Demand:
    """The shipped triggers."""

    triggers: tuple[Trigger, ...]

    def active(self, seen: Prometheus) -> bool:
        return any(seen.value(trigger) > trigger.activation for trigger in self.triggers)

    def proposals(self, seen: Prometheus, current: int) -> list[int]:
        return [average_value_replicas(seen.value(each), each.threshold, current) for each in self.triggers]


class _AlwaysOne:
    """A signal that Triton exports: it does not exist without a Triton, so one must always run."""

    def active(self, seen: Prometheus) -> bool:
        return True


@dataclass(frozen=True)
class Utilisation(_AlwaysOne):
    target: float  # 0 to 1

    def proposals(self, seen: Prometheus, current: int) -> list[int]:
        return [pods_metric_replicas(seen.utilisation(), self.target, current)]


@dataclass(frozen=True)
class Rate(_AlwaysOne):
    target: float  # accepted samples per second and Triton

    def proposals(self, seen: Prometheus, current: int) -> list[int]:
        return [average_value_replicas(seen.delivered_rate(), self.target, current)]


@dataclass(frozen=True)
class QueueTime(_AlwaysOne):
    target: float  # queue seconds per compute second

    def proposals(self, seen: Prometheus, current: int) -> list[int]:
        return [pods_metric_replicas(seen.queue_to_compute(), self.target, current)]
