"""The gateway's Prometheus metrics.

Rules of this file:
- The registry is passed in. Nothing is registered globally.
- Label values come from fixed sets, served models and the tokens file, never from a caller's text. Otherwise a flood of
  invalid names would grow the registry.
- Facts about a model are read at each scrape, so an unloaded model leaves no such series behind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from labelmint.core.calibration import NUM_QUANTILES, Calibration
from labelmint.core.served_model import ServedModel

UNKNOWN_MODEL = "-"

_LATENCY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
# Powers of the square root of two, because resolution and score kind change scores by orders of magnitude: the last one
# is above the sum of entropies of 255 classes at 1024x1024.
_JS_SCORES = tuple(round(2.0 ** (exponent / 2), 4) for exponent in range(-20, 46))
_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.requests = counter(
            "labelmint_requests",
            "Requests answered, by transport, method, model and gRPC status code.",
            ["transport", "method", "model", "code"],
        )
        self.request_seconds = histogram(
            "labelmint_request_duration_seconds",
            "Time from receiving a request to the end of its response.",
            ["transport", "method"],
            buckets=_LATENCY_SECONDS,
        )
        self.samples = counter(
            "labelmint_samples",
            "Samples judged by the JS gate, cached ones included, by outcome: accepted, rejected, or filtered "
            "(accepted by the gate, but without the content that the request asked for).",
            ["model", "version", "outcome"],
        )
        self.js_score = histogram(
            "labelmint_js_score_nats",
            "JS score of every sample that the gate judged, accepted or not.",
            ["model", "version"],
            buckets=_JS_SCORES,
        )
        self.js_score_quantile = histogram(
            "labelmint_js_score_calibration_quantile_ratio",
            "Quantile of the calibration at each sample's JS score, for unmixed samples at the calibrated truncation. "
            "The share of samples up to q stays q as long as their distribution is the calibrated one.",
            ["model", "version"],
            buckets=_QUANTILES,
        )
        self.triton_restarts = counter(
            "labelmint_triton_restarts",
            "Number of times that the gateway restarted its own Triton after it had exited.",
        )
        self.samples_in_flight = gauge(
            "labelmint_samples_in_flight",
            "Samples that hold a slot: in progress or queued in Triton.",
        )
        self.queue_depth = gauge(
            "labelmint_queue_depth_samples",
            "Samples queued in the gateway for a slot in Triton, by kind: of requests or of streams.",
            ["kind"],
        )
        self.demand = gauge(
            "labelmint_demand_samples",
            "Accepted samples owed to clients. A request being answered or kept waiting owes all its samples. A stream "
            "owes the smaller of its window and the rest of its count, minus the samples that its reader could take.",
        )
        self.requests_in_flight = gauge(
            "labelmint_requests_in_flight", "Requests and streams in progress.", ["transport"]
        )
        self.cache_hits = counter(
            "labelmint_cache_hits", "Samples served from the cache or from an inference that another request had begun."
        )
        self.cache_misses = counter(
            "labelmint_cache_misses",
            "Samples that were generated because the cache did not have them; stays 0 without a cache.",
        )
        self.cache_bytes = gauge("labelmint_cache_bytes", "Bytes of the samples in the cache.")

    def judged(self, model: ServedModel, truncation_psi: float, mixed: bool, *, js_score: float, outcome: str) -> None:
        self.samples.labels(model.name, model.version, outcome).inc()
        self.js_score.labels(model.name, model.version).observe(js_score)
        calibration = model.calibration
        if calibration is not None and not mixed and truncation_psi == calibration.truncation_psi:
            quantile = _quantile_of(calibration, js_score)
            self.js_score_quantile.labels(model.name, model.version).observe(quantile)


def _quantile_of(calibration: Calibration, js_score: float) -> float:
    """The share of the calibration's scores up to this one, rounded up in steps of 0.01; at most 1.

    A score equal to the threshold gets the threshold's quantile, so a histogram bucket ends exactly at the gate.
    """
    above = bisect_left(calibration.quantiles, js_score)
    return min(above, NUM_QUANTILES - 1) / (NUM_QUANTILES - 1)


class ServedModels(Collector):
    """The metrics of the served models, `models()`, collected at each scrape."""

    def __init__(self, models: Callable[[], list[ServedModel]]) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        info = InfoMetricFamily("labelmint_model", "A served version of a model.", labels=["model", "version"])
        threshold = GaugeMetricFamily(
            "labelmint_calibration_threshold_nats",
            "Calibrated threshold of the JS score.",
            labels=["model", "version"],
        )
        acceptance = GaugeMetricFamily(
            "labelmint_calibration_acceptance_ratio",
            "Share of samples that the calibrated gate accepted during calibration.",
            labels=["model", "version"],
        )
        models = self._models()
        ready = GaugeMetricFamily(
            "labelmint_triton_ready", "1 while Triton answers and has a model ready, else 0.", value=float(bool(models))
        )
        for model in models:
            labels = [model.name, model.version]
            described = {
                "digest": model.digest,
                "pipeline": model.pipeline,
                "task": model.task.name,
                "layout": model.layout,
                "score_kind": model.score_kind,
                "executor": model.executor.name,
                "calibration_id": "" if model.calibration is None else model.calibration.id,
            }
            info.add_metric(labels, described)
            if model.calibration is not None:
                threshold.add_metric(labels, model.calibration.threshold)
                acceptance.add_metric(labels, model.calibration.threshold_quantile)
        yield from (info, threshold, acceptance, ready)


class CallerSamples(Collector):
    """The samples charged to each name of the tokens file, `charged()`, collected at each scrape."""

    def __init__(self, charged: Callable[[], Mapping[str, int]]) -> None:
        self._charged = charged

    def collect(self) -> Iterator[CounterMetricFamily]:
        samples = CounterMetricFamily(
            "labelmint_caller_samples",
            "Samples charged to a name of the tokens file, rejected ones included.",
            labels=["caller"],
        )
        for name, count in self._charged().items():
            samples.add_metric([name], count)
        yield samples
