"""The gateway's Prometheus metrics.

Rules of this file:
- The registry is passed in; nothing is registered globally.
- Label values come from fixed sets and served models, never from a caller's text: a flood of bad names must not
  grow the registry.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

UNKNOWN_MODEL = "-"

_LATENCY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
# Scores depend on resolution and score kind by orders of magnitude: powers of the square root of two.
_JS_SCORES = tuple(round(2.0 ** (exponent / 2), 4) for exponent in range(-20, 33))


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
            ["model", "outcome"],
            registry=registry,
        )
        self.js_score = Histogram(
            "labelmint_js_score_nats",
            "JS score of every generated sample, accepted or not.",
            ["model"],
            buckets=_JS_SCORES,
            registry=registry,
        )
        self.samples_in_flight = Gauge(
            "labelmint_samples_in_flight",
            "Samples that Triton is working on or has queued for this gateway.",
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            "labelmint_requests_in_flight",
            "Requests and streams that are being answered.",
            ["transport"],
            registry=registry,
        )
