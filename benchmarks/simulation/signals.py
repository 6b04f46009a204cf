"""What an autoscaler sees: metrics as Prometheus has scraped them, and the signals made of them.

Rules of this file:
- Nothing is newer than the last scrape; windows and rates are over scrapes, as PromQL's are.
- `Demand` is what ships. The others are what people scale by; each has one target, chosen where it does best.
- GPU utilisation is a metric of pods; requests per second and demand are sums; queue time is Triton's, over its time of
  computing, which is how NVIDIA's examples scale.
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
    """One round of scrapes; counters of samples and seconds, and per ready Triton (busy, queue, compute) seconds."""

    time: float
    demand: float
    pending: float
    queue_seconds: float
    delivered: float
    tritons: dict[Triton, tuple[float, float, float]]


class Prometheus:
    """Scrapes every `scrape_seconds`. Where one simulated part stands for `slice_of`, sums are multiplied by it."""

    def __init__(
        self, env: simpy.Environment, gateway: Gateway, cluster: Cluster, scrape_seconds: float, slice_of: int = 1
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
        """Samples owed at this moment."""
        return self._slice_of * self._gateway.owed

    def value(self, trigger: Trigger) -> float:
        """What the trigger's query answers now."""
        if trigger.name in ("demand", "pending"):
            since = self._env.now - trigger.window_seconds
            scrapes = [scrape for scrape in self._scrapes if scrape.time > since] or [self._scrapes[-1]]
            return sum(getattr(scrape, trigger.name) for scrape in scrapes) / len(scrapes)
        if trigger.name == "queue-time":
            first, last = self._ends(trigger.window_seconds)
            # Rounded: a difference of sums over Tritons that come and go is not exactly zero, as that of a series is.
            gained = round(last.queue_seconds - first.queue_seconds, 6)
            return gained / max(last.time - first.time, self._scrape_seconds)
        raise ValueError(f"trigger {trigger.name!r} is not simulated")

    def delivered_rate(self) -> float:
        """Accepted samples a second."""
        first, last = self._ends(RATE_SECONDS)
        return (last.delivered - first.delivered) / max(last.time - first.time, self._scrape_seconds)

    def utilisation(self) -> list[float]:
        """Share of the time in which each ready Triton ran something, 0 to 1."""
        first, last = self._ends(RATE_SECONDS)
        shares = []
        for triton, (busy, _, _) in last.tritons.items():
            if triton in first.tritons:
                shares.append((busy - first.tritons[triton][0]) / (last.time - first.time))
        return shares * self._slice_of

    def queue_to_compute(self) -> list[float]:
        """Seconds waited by seconds computed, of what each ready Triton finished lately."""
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
    """Proposes numbers of replicas; `active` is what KEDA starts the first for."""

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
    """A signal that Triton itself tells is not there without a Triton."""

    def active(self, seen: Prometheus) -> bool:
        return True


@dataclass(frozen=True)
class Utilisation(_AlwaysOne):
    target: float  # 0 to 1

    def proposals(self, seen: Prometheus, current: int) -> list[int]:
        return [pods_metric_replicas(seen.utilisation(), self.target, current)]


@dataclass(frozen=True)
class Rate(_AlwaysOne):
    target: float  # accepted samples a second and Triton

    def proposals(self, seen: Prometheus, current: int) -> list[int]:
        return [average_value_replicas(seen.delivered_rate(), self.target, current)]


@dataclass(frozen=True)
class QueueTime(_AlwaysOne):
    target: float  # seconds waited a second computed

    def proposals(self, seen: Prometheus, current: int) -> list[int]:
        return [pods_metric_replicas(seen.queue_to_compute(), self.target, current)]
