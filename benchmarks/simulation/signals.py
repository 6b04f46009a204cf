"""The autoscaler's inputs: metrics as Prometheus has scraped them, and the scaling signals computed from them.

Rules of this file:
- No value is newer than the last scrape; windows and rates are over scrapes, as in PromQL. A mean over each pod counts
  a pod that has ended until its last scrape leaves the window; a sum of one moment does not.
- `Demand` is the shipped signal. The others are common alternatives; each has one target, the best for it.
- GPU utilisation is a metric of pods. Requests per second and demand are sums. Queue time is Triton's queue time
  divided by its compute time, as in NVIDIA's examples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import simpy

from simulation.autoscaler import average_value_replicas, pods_metric_replicas
from simulation.cluster import Cluster
from simulation.manifests import Trigger
from simulation.service import Gateway, Triton

RATE_SECONDS = 60.0
KEPT_SECONDS = 120.0
REPLACED_SECONDS = 20.0  # a gateway starts, becomes ready, and the one that it replaces drains
SHORT_SECONDS = 30.0  # of the form `larger mean`


@dataclass(frozen=True)
class GatewayPods:
    """The pods that the simulated gateway stands for. Each reports the same share of the demand.

    `rolled_out_at`: in a roll-out, a pod is replaced every REPLACED_SECONDS; its clients move to the others at once.
    """

    count: int
    rolled_out_at: tuple[float, ...]

    def at(self, now: float) -> list[tuple[int, int]]:
        """Return the identities of the pods at a time."""
        replaced = [int((now - begun) / REPLACED_SECONDS) for begun in self.rolled_out_at if now >= begun]
        return [(number, sum(number < done for done in replaced)) for number in range(self.count)]


@dataclass(frozen=True)
class Scrape:
    """One round of scrapes. Of each ready Triton: its pending samples, and (busy, queue, compute) seconds so far."""

    time: float
    demand: float
    gateways: list[tuple[int, int]]
    delivered: float
    pending: dict[Triton, int]
    tritons: dict[Triton, tuple[float, float, float]]

    def of(self, name: str) -> dict[object, float]:
        """Return the value of a metric by pod."""
        if name == "pending":
            return dict(self.pending)
        return dict.fromkeys(self.gateways, self.demand / len(self.gateways))


class Prometheus:
    """Scrapes every `scrape_seconds`. If one simulated part stands for `slice_of` parts, sums are multiplied by it."""

    def __init__(
        self,
        env: simpy.Environment,
        gateway: Gateway,
        cluster: Cluster,
        *,
        pods: GatewayPods,
        scrape_seconds: float,
        slice_of: int = 1,
    ) -> None:
        self._pods = pods
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
            self._pods.at(self._env.now),
            self._slice_of * self._gateway.accepted,
            {triton: self._slice_of * triton.pending for triton in tritons},
            {triton: (triton.busy_seconds(), triton.queue_seconds, triton.compute_seconds) for triton in tritons},
        )

    def owed(self) -> int:
        """Return the samples owed at this moment."""
        return self._slice_of * self._gateway.owed

    def value(self, trigger: Trigger) -> float:
        """Return the current value of the trigger's query; 0 if it finds no pod."""
        if trigger.form == "sum of rates":
            return self._slice_of * self._queued(trigger.window_seconds)
        scrapes = self._since(trigger.window_seconds)
        if trigger.form == "sum of means":
            values: dict[object, list[float]] = {}
            for scrape in scrapes:
                for pod, value in scrape.of(trigger.name).items():
                    values.setdefault(pod, []).append(value)
            return sum(map(_mean, values.values()))
        if trigger.form == "larger mean":
            recent = self._since(SHORT_SECONDS)
            return max(_mean(_sums(trigger.name, some)) for some in (recent, scrapes))
        if trigger.form == "newest sum":
            scrapes = scrapes[-1:]
        sums = _sums(trigger.name, scrapes)
        return max(sums, default=0.0) if trigger.form == "largest sum" else _mean(sums)

    def _queued(self, window: float) -> float:
        """Return the queue seconds that Tritons which are still there gained per second."""
        scrapes = self._since(window)
        gained = 0.0
        for triton, (_, queue, _) in scrapes[-1].tritons.items():
            first = next(scrape for scrape in scrapes if triton in scrape.tritons)
            if first is not scrapes[-1]:
                gained += (queue - first.tritons[triton][1]) / (scrapes[-1].time - first.time)
        return gained

    def _since(self, window: float) -> list[Scrape]:
        return [scrape for scrape in self._scrapes if scrape.time > self._env.now - window] or [self._scrapes[-1]]

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


def _sums(name: str, scrapes: list[Scrape]) -> list[float]:
    """Return the sum over the pods of each scrape that has any."""
    return [sum(pods.values()) for scrape in scrapes if (pods := scrape.of(name))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


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
