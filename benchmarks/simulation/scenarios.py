"""The workloads for comparing scaling signals, and one simulated run of a workload.

Rules of this file:
- All random numbers come from the seed, so the same call returns the same numbers.
- A thousand jobs are simulated as a slice: one job, Triton and slot stands for `slice_of` of them, and the autoscaler
  sees the sums of the whole. This works because jobs are alike and gateways spread them evenly.
- A training job that waits leaves its own, more expensive GPU idle. This cost is added to that of Triton's GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import simpy

from simulation.autoscaler import SYNC_SECONDS, HorizontalPodAutoscaler, Keda
from simulation.clients import Job, JobSpec
from simulation.cluster import Cluster, Provisioning
from simulation.manifests import Shipped
from simulation.service import Gateway, Profile
from simulation.signals import Demand, GatewayPods, Prometheus, Signal

Array = npt.NDArray[np.float64]
HOUR = 3600.0
# A prediction, because there was no GPU: 20 ms per batch and 5 ms per sample, so 160 samples per second and GPU.
GPU = Profile.linear(0.020, 0.005)
TRAINER_WEIGHT = 4.0  # price of the training GPU (A100 class) relative to the serving GPU (L4 class)
ACCEPTANCE = 0.9  # of a gate at the 90th percentile
TIMELINE_SECONDS = 30.0
ON_DEMAND = Provisioning()


@dataclass(frozen=True)
class Scenario:
    """A workload of `seconds`. `max_replicas` and `gateways` are set if the shipped numbers are too small for it.

    `rolled_out_at`: the times in seconds at which a roll-out of the gateways begins. `vanish_at`: the time in seconds
    at which half of the nodes vanish at once.
    """

    name: str
    title: str
    jobs: tuple[JobSpec, ...]
    seconds: float
    max_replicas: int | None = None
    gateways: int | None = None
    slice_of: int = 1
    provisioning: Provisioning = ON_DEMAND
    rolled_out_at: tuple[float, ...] = ()
    vanish_at: float | None = None


def one_job() -> Scenario:
    job = JobSpec(start=0.5 * HOUR, rate=250.0, total=250 * 1800)
    return Scenario(
        "one_job", "one training job of half an hour, in two hours", (job,), 2 * HOUR, rolled_out_at=(2700.0,)
    )


def day(seed: int = 0) -> Scenario:
    """Jobs of about ten minutes arrive as a Poisson process whose rate follows a day, compressed to four hours."""
    rng = np.random.default_rng(seed)
    length, most = 4 * HOUR, 8 / 600.0  # eight concurrent jobs at noon
    jobs, time = [], 0.0
    while (time := time + rng.exponential(1 / most)) < length:
        if rng.random() < (0.5 - 0.5 * math.cos(2 * math.pi * time / length)) ** 2:
            jobs.append(JobSpec(start=time, rate=50.0, total=int(50 * rng.uniform(300, 900))))
    return Scenario(
        "day",
        "jobs that follow a day, compressed to four hours",
        tuple(jobs),
        length,
        rolled_out_at=(1.5 * HOUR, 2.5 * HOUR),
    )


def thousand_jobs() -> Scenario:
    slice_of = 200
    jobs = tuple(JobSpec(start=300.0, rate=500.0, total=500 * 600, window=16) for _ in range(1000 // slice_of))
    streams = 1000 * jobs[0].streams
    return Scenario(
        "thousand_jobs",
        "1,000 training jobs of 500 samples a second start together",
        jobs,
        1.0 * HOUR,
        max_replicas=8000,
        gateways=math.ceil(streams / 64),
        slice_of=slice_of,
        rolled_out_at=(900.0,),
    )


def spot() -> Scenario:
    jobs = tuple(JobSpec(start=300.0 + 60.0 * n, rate=150.0, total=150 * 2700) for n in range(4))
    nodes = Provisioning(lifetime_seconds=0.75 * HOUR)
    title = "four training jobs on spot nodes that live 45 minutes; once half of them vanish"
    return Scenario("spot", title, jobs, HOUR, provisioning=nodes, rolled_out_at=(2700.0,), vanish_at=0.5 * HOUR)


def scenarios() -> tuple[Scenario, ...]:
    return (one_job(), day(), thousand_jobs(), spot())


@dataclass(frozen=True)
class Outcome:
    """The result of one run. Waits are those of training steps, in seconds, each weighted by the time that it covers.

    goodput: share of the jobs' time in which they trained. cost: GPU-hours of Triton and (weighted) of the trainers
    that waited, per million delivered samples.
    """

    wait_p50: float
    wait_p95: float
    wait_p99: float
    goodput: float
    samples_per_second: float
    gpu_hours_per_million: float
    waiting_hours_per_million: float
    refused: int
    most_tritons: int

    @property
    def cost(self) -> float:
        return self.gpu_hours_per_million + TRAINER_WEIGHT * self.waiting_hours_per_million

    def figures(self) -> dict[str, float]:
        return asdict(self) | {"cost": self.cost}


# Time in seconds, samples owed, Tritons desired, Tritons ready.
Timeline = list[tuple[float, int, int, int]]


def simulate(
    scenario: Scenario, shipped: Shipped, signal: Signal | None = None, *, seed: int = 0
) -> tuple[Outcome, Timeline]:
    """Run a scenario with the shipped numbers, scaled by `signal` (None: the shipped triggers)."""
    env, rng = simpy.Environment(), np.random.default_rng(seed)
    parts = scenario.slice_of
    gateways = scenario.gateways or shipped.gateways
    most = scenario.max_replicas or shipped.max_replicas
    # Slots are proportional to the largest number of Tritons, as docs/deploying.md says.
    slots = shipped.triton_slots * shipped.gateways * most // shipped.max_replicas
    gateway = Gateway(
        env,
        slots // parts,
        shipped.max_in_flight * gateways // parts,
        max_streams=shipped.max_streams * gateways // parts,
        capacity_wait_seconds=shipped.capacity_wait_seconds,
        acceptance=ACCEPTANCE,
        grain=4,
    )
    cluster = Cluster(
        env,
        gateway,
        GPU,
        provisioning=scenario.provisioning,
        connection_age_seconds=shipped.connection_age_seconds,
        drain_seconds=shipped.drain_seconds,
        node_idle_seconds=shipped.node_idle_seconds,
        rng=rng,
    )
    pods = GatewayPods(gateways, scenario.rolled_out_at)
    seen = Prometheus(env, gateway, cluster, pods=pods, scrape_seconds=shipped.scrape_seconds, slice_of=parts)
    jobs = [Job(env, gateway, spec, rng=rng) for spec in scenario.jobs]
    scaling = _Scaling(
        env,
        cluster,
        seen,
        signal=signal or Demand(shipped.triggers),
        shipped=shipped,
        max_replicas=most,
        slice_of=parts,
    )
    if scenario.vanish_at is not None:
        env.timeout(scenario.vanish_at).callbacks.append(lambda _: cluster.take_away(0.5))
    env.run(until=scenario.seconds)

    waits = [wait for job in jobs for wait in job.waits]
    waits += [(job.open_wait(), job.open_wait()) for job in jobs if job.open_wait() > 0]
    waited, covered = np.array(waits).T if waits else np.zeros((2, 1))
    millions = sum(job.taken for job in jobs) / 1e6
    p50, p95, p99 = _weighted_quantiles(waited, covered, (0.5, 0.95, 0.99))
    trained = sum(job.taken / spec.rate for job, spec in zip(jobs, scenario.jobs, strict=True))
    outcome = Outcome(
        wait_p50=p50,
        wait_p95=p95,
        wait_p99=p99,
        goodput=trained / (trained + float(waited.sum())),
        samples_per_second=parts * 1e6 * millions / scenario.seconds,
        gpu_hours_per_million=cluster.gpu_seconds() / HOUR / millions,
        waiting_hours_per_million=float(waited.sum()) / HOUR / millions,
        refused=parts * gateway.refused,
        most_tritons=max(ready for _, _, _, ready in scaling.timeline),
    )
    return outcome, scaling.timeline


class _Scaling:
    """KEDA and its HorizontalPodAutoscaler, which scale the cluster."""

    def __init__(
        self,
        env: simpy.Environment,
        cluster: Cluster,
        seen: Prometheus,
        *,
        signal: Signal,
        shipped: Shipped,
        max_replicas: int,
        slice_of: int,
    ) -> None:
        self._env = env
        self._cluster = cluster
        self._seen = seen
        self._signal = signal
        self._slice_of = slice_of
        self._keda = Keda(shipped.polling_seconds, shipped.cooldown_seconds, shipped.min_replicas)
        self._hpa = HorizontalPodAutoscaler(max(1, shipped.min_replicas), max_replicas, shipped.up, shipped.down)
        self._replicas = 0
        self.timeline: Timeline = []
        env.process(self._poll())
        env.process(self._sync())
        env.process(self._watch())

    def _set(self, replicas: int) -> None:
        self._replicas = replicas
        self._cluster.scale(math.ceil(replicas / self._slice_of))

    def _poll(self) -> Generator[simpy.Event, None, None]:
        while True:
            active = self._signal.active(self._seen)
            self._set(self._keda.decide(self._env.now, self._replicas, active))
            yield self._env.timeout(self._keda.polling_seconds)

    def _sync(self) -> Generator[simpy.Event, None, None]:
        while True:
            yield self._env.timeout(SYNC_SECONDS)
            if self._replicas > 0:
                proposals = self._signal.proposals(self._seen, self._replicas)
                self._set(self._hpa.decide(self._env.now, self._replicas, proposals))

    def _watch(self) -> Generator[simpy.Event, None, None]:
        while True:
            owed, ready = self._seen.owed(), self._slice_of * len(self._cluster.tritons)
            self.timeline.append((self._env.now, owed, self._replicas, ready))
            yield self._env.timeout(TIMELINE_SECONDS)


def _weighted_quantiles(values: Array, weights: Array, shares: tuple[float, ...]) -> list[float]:
    """Return the smallest value at which each share of the weight is reached."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    positions = np.searchsorted(reached, np.array(shares) * reached[-1])
    return [float(values[order][min(position, len(order) - 1)]) for position in positions]
