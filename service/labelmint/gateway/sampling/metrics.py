"""The gateway's Prometheus metrics.

Rules of this file:
- The registry is passed in; nothing is registered globally.
- Label values come from fixed sets, served models and the tokens file, never from a caller's text: a flood of bad
  names must not grow the registry.
- What is true of a model is read when it is asked for: a model that is unloaded leaves no series behind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from labelmint.core.calibration import NUM_QUANTILES, Calibration
from labelmint.core.served_model import ServedModel

UNKNOWN_MODEL = "-"

_LATENCY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
# Scores depend on resolution and score kind by orders of magnitude: powers of the square root of two.
_JS_SCORES = tuple(round(2.0 ** (exponent / 2), 4) for exponent in range(-20, 33))
_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "labelmint_requests",
            "Requests answered, by transport, method, model and gRPC status code.",
            ["transport", "method", "model", "code"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "labelmint_request_duration_seconds",
            "Time from receiving a request to the end of its answer.",
            ["transport", "method"],
            buckets=_LATENCY_SECONDS,
            registry=registry,
        )
        self.samples = Counter(
            "labelmint_samples",
            "Samples generated and judged by the JS gate, by outcome: accepted or rejected.",
            ["model", "version", "outcome"],
            registry=registry,
        )
        self.js_score = Histogram(
            "labelmint_js_score_nats",
            "JS score of every generated sample, accepted or not.",
            ["model", "version"],
            buckets=_JS_SCORES,
            registry=registry,
        )
        self.js_score_quantile = Histogram(
            "labelmint_js_score_calibration_quantile_ratio",
            "Quantile of the calibration that each sample's JS score lies at, by calibrated truncation and without "
            "mixing. The share up to q is q as long as samples are what they were when they were calibrated.",
            ["model", "version"],
            buckets=_QUANTILES,
            registry=registry,
        )
        self.triton_restarts = Counter(
            "labelmint_triton_restarts",
            "Times that our own Triton was started again after it ended.",
            registry=registry,
        )
        self.samples_in_flight = Gauge(
            "labelmint_samples_in_flight",
            "Samples that Triton is working on or has queued for this gateway.",
            registry=registry,
        )
        self.queue_depth = Gauge(
            "labelmint_queue_depth_samples",
            "Samples that wait in the gateway for their turn in Triton, by kind: of requests or of streams.",
            ["kind"],
            registry=registry,
        )
        self.demand = Gauge(
            "labelmint_demand_samples",
            "Accepted samples owed to clients: of each request being answered or held, all its samples; of each "
            "stream, the smaller of its window and what remains of its count, less those that its reader could take.",
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            "labelmint_requests_in_flight",
            "Requests and streams that are being answered.",
            ["transport"],
            registry=registry,
        )
        self.cache_hits = Counter(
            "labelmint_cache_hits",
            "Samples that were answered from memory.",
            registry=registry,
        )
        self.cache_misses = Counter(
            "labelmint_cache_misses",
            "Samples that had to be minted though some are kept in memory.",
            registry=registry,
        )
        self.cache_bytes = Gauge(
            "labelmint_cache_bytes",
            "Memory that kept samples take.",
            registry=registry,
        )

    def judged(self, model: ServedModel, truncation_psi: float, mixed: bool, js_score: float, accepted: bool) -> None:
        """Count a sample that was generated and judged."""
        self.samples.labels(model.name, model.version, "accepted" if accepted else "rejected").inc()
        self.js_score.labels(model.name, model.version).observe(js_score)
        calibration = model.calibration
        if calibration is not None and not mixed and truncation_psi == calibration.truncation_psi:
            quantile = _quantile_of(calibration, js_score)
            self.js_score_quantile.labels(model.name, model.version).observe(quantile)


def _quantile_of(calibration: Calibration, js_score: float) -> float:
    """The share of the calibration's scores that are up to this one, in steps of 0.01 and rounded up; at most 1.

    A score that is exactly the threshold is at the threshold's quantile, so that a bucket ends where the gate is.
    """
    above = bisect_left(calibration.quantiles, js_score)
    return min(above, NUM_QUANTILES - 1) / (NUM_QUANTILES - 1)


class ServedModels(Collector):
    """What is known of the served models, `models()`, when the metrics are read."""

    def __init__(self, models: Callable[[], list[ServedModel]]) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        info = InfoMetricFamily("labelmint_model", "A served version of a model.", labels=["model", "version"])
        threshold = GaugeMetricFamily(
            "labelmint_calibration_threshold_nats",
            "JS score of the calibrated gate.",
            labels=["model", "version"],
        )
        acceptance = GaugeMetricFamily(
            "labelmint_calibration_acceptance_ratio",
            "Share of samples that the calibrated gate accepted when it was calibrated.",
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
                "calibration_id": "" if model.calibration is None else model.calibration.id,
            }
            info.add_metric(labels, described)
            if model.calibration is not None:
                threshold.add_metric(labels, model.calibration.threshold)
                acceptance.add_metric(labels, model.calibration.threshold_quantile)
        yield from (info, threshold, acceptance, ready)


class CallerSamples(Collector):
    """What each name of the tokens file was charged, `charged()`, when the metrics are read."""

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
