"""The sampling core, which the gRPC and the REST server share.

Rules of this file:
- There is one core per process, so limits, demand and metrics cover gRPC and REST together.
"""

from __future__ import annotations

from dataclasses import dataclass

from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sampler import Sampler


@dataclass(frozen=True)
class SamplingCore:
    sampler: Sampler
    metrics: Metrics
    lifecycle: Lifecycle
