"""What both wires work on.

Rules of this file:
- One core for the whole process: limits, demand and metrics count over both wires.
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
