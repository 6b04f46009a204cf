"""The gateway's Prometheus metrics.

Rules of this file:
- The registry is passed in. Nothing is registered globally.
- Label values come from fixed sets, served models and the tokens file, never from a caller's text. Otherwise a flood of
  invalid names would grow the registry.
- Facts about a model are read at each scrape, so an unloaded model leaves no such series behind.
- The durations of HTTP requests and gRPC calls have the names that OpenTelemetry's conventions give them. Everything
  else is `labelmint_`.
- The parts of a sample's time, the wait for a slot, Triton and the encoding, are each a histogram and a span.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from labelmint import conventions, tracing
from labelmint.core.calibration import NUM_QUANTILES, Calibration
from labelmint.core.errors import LabelmintError
from labelmint.core.served_model import ServedModel

UNKNOWN_MODEL = "-"

_LATENCY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
_PART_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Powers of the square root of two, because resolution and score kind change scores by orders of magnitude: the last one
# is above the sum of entropies of 255 classes at 1024x1024.
_JS_SCORES = tuple(round(2.0 ** (exponent / 2), 4) for exponent in range(-20, 46))
_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


# The attributes that are labels. Their values come from fixed sets.
_HTTP_ATTRIBUTES = ("http.request.method", "url.scheme", "http.route", "http.response.status_code", "error.type")
_RPC_ATTRIBUTES = ("rpc.system.name", "rpc.method", "rpc.response.status_code", "rpc.grpc.status_code", "error.type")


def _label_names(attributes: tuple[str, ...]) -> list[str]:
    return [name.replace(".", "_") for name in attributes]


def _values(attributes: conventions.Attributes, names: tuple[str, ...]) -> list[str]:
    """The values of the labels. In Prometheus, a label with an empty value is the same as none."""
    return [str(attributes.get(name, "")) for name in names]


def error_type(error: BaseException) -> str:
    """The type of an error, from a fixed set: the reason of ours, CANCELLED, or the name of the exception's class."""
    if isinstance(error, LabelmintError):
        return error.reason
    if isinstance(error, asyncio.CancelledError):
        return "CANCELLED"
    return f"{type(error).__module__}.{type(error).__qualname__}"


class Metrics:
    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` measures the parts of a sample's time, in seconds."""
        self.registry = registry
        self._clock = clock
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
        self.http_seconds = histogram(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests, as http.server.request.duration of OpenTelemetry's conventions.",
            _label_names(_HTTP_ATTRIBUTES),
            buckets=conventions.DURATION_SECONDS,
        )
        self.rpc_seconds = histogram(
            "rpc_server_call_duration_seconds",
            "Duration of gRPC calls, as rpc.server.call.duration of OpenTelemetry's conventions.",
            _label_names(_RPC_ATTRIBUTES),
            buckets=conventions.DURATION_SECONDS,
        )
        part = partial(histogram, labelnames=["model", "error_type"], buckets=_PART_SECONDS)
        self.slot_wait_seconds = part(
            "labelmint_slot_wait_duration_seconds", "Time that a sample waited in the gateway for a slot in Triton."
        )
        self.triton_seconds = part(
            "labelmint_triton_duration_seconds",
            "Time from sending a sample to Triton to its answer, with further attempts at other Tritons.",
        )
        self.encoding_seconds = part(
            "labelmint_encoding_duration_seconds",
            "Time to encode the samples of one message, or of one step of an archive, with the wait for a thread.",
        )
        self.samples = counter(
            "labelmint_samples",
            "Samples judged by the JS gate, cached ones included, by outcome: accepted, rejected, or filtered "
            "(accepted by the gate, but without the content that the request asked for). Seeds that streams skip by "
            "the index count with the outcome of their samples.",
            ["model", "version", "outcome"],
        )
        self.index_seeds = counter(
            "labelmint_index_seeds",
            "Seeds that streams skipped without asking Triton, because the index has their outcome.",
            ["model"],
        )
        self.js_score = histogram(
            "labelmint_js_score_nats",
            "JS score of every sample that the gate judged, accepted or not, except those that the index chose.",
            ["model", "version"],
            buckets=_JS_SCORES,
        )
        self.js_score_quantile = histogram(
            "labelmint_js_score_calibration_quantile_ratio",
            "Quantile of the calibration (each generator class has its own) at each sample's JS score, for unmixed "
            "samples at the calibrated truncation. "
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

    def slot_wait(self, model: str) -> AbstractContextManager[None]:
        """Measure the enclosed wait of a sample for a slot."""
        return self._part("wait for slot", self.slot_wait_seconds, model)

    def triton(self, model: str) -> AbstractContextManager[None]:
        """Measure the enclosed call of Triton."""
        return self._part("triton infer", self.triton_seconds, model)

    def encoding(self, model: str) -> AbstractContextManager[None]:
        """Measure the enclosed encoding of samples."""
        return self._part("encode", self.encoding_seconds, model)

    @contextmanager
    def _part(self, name: str, seconds: Histogram, model: str) -> Iterator[None]:
        """Observe the duration of the enclosed block as a span and in a histogram, also if the block fails."""
        started, failure = self._clock(), ""
        with tracing.span(name, {"labelmint.model": model}) as tell:
            try:
                yield
            except BaseException as error:
                failure = error_type(error)
                tell({conventions.ERROR_TYPE: failure})
                raise
            finally:
                seconds.labels(model, failure).observe(self._clock() - started)

    def http_ended(self, attributes: conventions.Attributes, *, model: str, outcome: str, seconds: float) -> None:
        """Count a request that ended. `attributes` are those of the conventions, `outcome` is a status or a word."""
        route = str(attributes.get("http.route", "-"))
        self.requests.labels("rest", route, model, outcome).inc()
        self.request_seconds.labels("rest", route).observe(seconds)
        self.http_seconds.labels(*_values(attributes, _HTTP_ATTRIBUTES)).observe(seconds)

    def rpc_ended(self, method: str, code: grpc.StatusCode, *, model: str, seconds: float) -> None:
        """Count a gRPC call of `package.Service/Method` that ended."""
        name = method.rpartition("/")[2]
        self.requests.labels("grpc", name, model, code.name).inc()
        self.request_seconds.labels("grpc", name).observe(seconds)
        attributes = {**conventions.rpc_call(method), **conventions.rpc_status(code)}
        attributes[conventions.ERROR_TYPE] = conventions.rpc_server_error(code)
        self.rpc_seconds.labels(*_values(attributes, _RPC_ATTRIBUTES)).observe(seconds)

    def counted(self, model: ServedModel, outcome: str) -> None:
        """Count a sample that was judged."""
        self.samples.labels(model.name, model.version, outcome).inc()

    def skipped(self, model: ServedModel, *, rejected: int, filtered: int) -> None:
        """Count seeds that the index judged, with the outcome that their samples have."""
        self.index_seeds.labels(model.name).inc(rejected + filtered)
        for outcome, count in (("rejected", rejected), ("filtered", filtered)):
            if count:
                self.samples.labels(model.name, model.version, outcome).inc(count)

    def judged(
        self, model: ServedModel, truncation_psi: float, mixed: bool, *, class_index: int | None, js_score: float
    ) -> None:
        """Observe the score of a sample that was minted whatever its score is."""
        self.js_score.labels(model.name, model.version).observe(js_score)
        calibration = model.calibration_of(class_index)
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
