"""A small model of a cluster as Prometheus sees it: pods begin and end, requests come, and each scrape is recorded.

Rules of this file:
- A situation sets the cluster's fields and lets minutes pass. Every 30 seconds the model serves and is scraped.
- A pod that Prometheus cannot scrape has `up` 0 and nothing else. A pod that is gone has nothing. Prometheus marks both
  ends as stale, so the model does too.
- A counter with labels appears with its first count, as in the gateway.
- `truth_...` are the numbers of the whole cluster, which rules must get from what the pods report.
- The model knows no rule and no alert.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count, groupby

TICKS_PER_MINUTE = 2
SECONDS_PER_TICK = 60 // TICKS_PER_MINUTE
SINGLE = "/v1/models/{model}/samples/{seed}"
QUANTILE = "labelmint_js_score_calibration_quantile_ratio"
# Of every 100 calibrated scores, how many lie up to the quantile.
CALIBRATED = {"0.5": 50, "0.9": 90}


@dataclass(eq=False)
class Pod:
    """A pod of either deployment.

    `scraped`: Prometheus can read it. `works`: it serves. `cut_off`: a gateway that reaches no Triton.
    """

    name: str
    deployment: str
    started: int
    scraped: bool = False
    works: bool = False
    cut_off: bool = False
    counters: Counter[str] = field(default_factory=Counter)

    def key(self, metric: str, labels: str = "") -> str:
        return (
            f'{metric}{{namespace="labelmint", pod="{self.name}", job="labelmint/labelmint-{self.deployment}"{labels}}}'
        )


@dataclass
class Cluster:
    """Gateways, Tritons, and what clients request of them.

    `owed` counts the samples that streams wait for, `per_minute` the single samples that clients request. One in
    `fails_every` requests fails (0: none), and `slow_in_ten` of ten take longer than 3.2 s. Requests without a Triton
    wait for `patience` minutes, then they fail with UNAVAILABLE.
    """

    owed: int = 0
    per_minute: int = 0
    fails_every: int = 0
    slow_in_ten: int = 0
    queue_seconds: float = 0.2
    patience: float = 15

    ticks: int = 0
    gateways: list[Pod] = field(default_factory=list)
    tritons: list[Pod] = field(default_factory=list)
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    _waiting: list[int] = field(default_factory=list)
    _failed: int = 0
    _slow: int = 0
    _names: count[int] = field(default_factory=lambda: count(1))
    _requests: count[int] = field(default_factory=count)

    @property
    def minutes(self) -> float:
        return self.ticks / TICKS_PER_MINUTE

    # Pods begin and end.

    def new_gateway(self, minutes: float = 0.5) -> Pod:
        """Create a gateway and let the minutes pass that it takes to start."""
        pod = Pod(f"gateway-{next(self._names)}", "gateway", self.ticks)
        self.gateways.append(pod)
        self.wait(minutes)
        pod.started, pod.scraped, pod.works = self.ticks, True, True
        return pod

    def new_triton(self, *, node: float, load: float) -> Pod:
        """Create a Triton: minutes without an address until it has a node, then minutes until its models are loaded."""
        self.wait(node)
        pod = Pod(f"triton-{next(self._names)}", "triton", self.ticks)
        self.tritons.append(pod)
        self.wait(load)
        pod.scraped = pod.works = True
        return pod

    def end(self, pod: Pod) -> None:
        (self.gateways if pod.deployment == "gateway" else self.tritons).remove(pod)

    def restart(self, pod: Pod, minutes: float) -> None:
        """The container ends, and a new one of the same pod serves after the minutes. Its counters begin at zero."""
        pod.scraped = pod.works = False
        pod.counters.clear()
        self.wait(minutes)
        pod.started, pod.scraped, pod.works = self.ticks, True, True

    # Time passes.

    def wait(self, minutes: float) -> None:
        for _ in range(round(minutes * TICKS_PER_MINUTE)):
            self._serve()
            self._scrape()
            self.ticks += 1

    def _serve(self) -> None:
        gateways = [pod for pod in self.gateways if pod.works and not pod.cut_off]
        tritons = [pod for pod in self.tritons if pod.works]
        requests, due = self.per_minute, self.ticks % TICKS_PER_MINUTE == 0
        self._waiting += [self.ticks] * (requests if due else 0)
        for index, pod in enumerate(gateways):
            pod.counters[', method="/readyz", code="200"'] += 6 + index
        if not gateways:
            return
        patience = self.patience * TICKS_PER_MINUTE
        late = [since for since in self._waiting if self.ticks - since >= patience]
        answered = self._waiting if tritons else late
        for since in answered:
            self._answer(gateways, waited=self.ticks > since, served=bool(tritons))
        self._waiting = [] if tritons else self._waiting[len(late) :]
        self._stream(gateways, tritons)

    def _answer(self, gateways: list[Pod], *, waited: bool, served: bool) -> None:
        number = next(self._requests)
        counters = gateways[number % len(gateways)].counters
        fails = not served or (self.fails_every > 0 and number % self.fails_every == 0)
        counters[f', method="{SINGLE}", code="{503 if fails else 200}"'] += 1
        slow = waited or number % 10 < self.slow_in_ten
        counters["slow" if slow else "quick"] += 1
        self._failed += fails
        self._slow += slow

    def _stream(self, gateways: list[Pod], tritons: list[Pod]) -> None:
        """Streams take samples from the Tritons; all samples, of streams and requests, keep to the calibration."""
        samples = 100 if self.owed else self.per_minute
        for pod in tritons:
            pod.counters["samples"] += samples
            pod.counters["queued"] += round(samples * self.queue_seconds * 1e6)
        for pod in gateways if tritons else []:
            pod.counters["judged"] += 100 if self.owed else 0
            pod.counters[', method="StreamSamples", code="UNAVAILABLE"'] += 1 if self.owed else 0

    # Prometheus scrapes.

    def _scrape(self) -> None:
        ready = any(pod.works for pod in self.tritons)
        gateways = [pod for pod in self.gateways if pod.scraped]
        self._record('truth_demand_samples{namespace="labelmint"}', self.owed + len(self._waiting))
        self._record('truth_triton_ready{namespace="labelmint"}', float(ready))
        self._record('truth_failed_total{namespace="labelmint"}', self._failed)
        self._record('truth_slow_total{namespace="labelmint"}', self._slow)
        for pod in [*self.gateways, *self.tritons]:
            self._record(pod.key("up"), float(pod.scraped))
        for pod in gateways:
            demand = (self.owed + len(self._waiting)) / len(gateways)
            self._record(pod.key("labelmint_triton_ready"), float(ready and not pod.cut_off))
            self._record(pod.key("labelmint_demand_samples"), demand)
            self._record(pod.key("labelmint_triton_restarts_total"), 0)
            self._record(pod.key("process_start_time_seconds"), pod.started * SECONDS_PER_TICK)
            self._scrape_counters(pod)
        for pod in self.tritons:
            if pod.scraped:
                model = ', model="faces", version="1"'
                self._record(pod.key("nv_inference_pending_request_count", model), 0)
                self._record(pod.key("nv_inference_request_success", model), pod.counters["samples"])
                self._record(pod.key("nv_inference_queue_duration_us", model), pod.counters["queued"])

    def _scrape_counters(self, pod: Pod) -> None:
        counters, single = pod.counters, f', method="{SINGLE}"'
        for labels, value in counters.items():
            if labels.startswith(","):
                self._record(pod.key("labelmint_requests_total", labels), value)
        if counters["slow"] + counters["quick"]:
            name = "labelmint_request_duration_seconds"
            self._record(pod.key(f"{name}_bucket", f'{single}, le="3.2"'), counters["quick"])
            self._record(pod.key(f"{name}_count", single), counters["slow"] + counters["quick"])
        if counters["judged"]:
            model = ', model="faces", version="1"'
            for bound, share in CALIBRATED.items():
                self._record(pod.key(f"{QUANTILE}_bucket", f'{model}, le="{bound}"'), counters["judged"] * share // 100)
            self._record(pod.key(f"{QUANTILE}_count", model), counters["judged"])

    def _record(self, key: str, value: float) -> None:
        self.series.setdefault(key, {})[self.ticks] = value

    def in_promtools_notation(self) -> list[dict[str, str]]:
        """Return the series for promtool, with one value every 30 seconds."""
        return [{"series": key, "values": _notation(values, self.ticks)} for key, values in self.series.items()]


def _notation(values: dict[int, float], ticks: int) -> str:
    """One value per tick; `_` is a missing one, and `stale` is the first missing one after a value."""
    words = [
        f"{values[tick]:.12g}" if tick in values else "stale" if tick - 1 in values else "_" for tick in range(ticks)
    ]
    return " ".join(_repeated(word, len(list(group))) for word, group in groupby(words))


def _repeated(word: str, times: int) -> str:
    if times == 1:
        return word
    return f"_x{times}" if word == "_" else f"{word}x{times - 1}"
