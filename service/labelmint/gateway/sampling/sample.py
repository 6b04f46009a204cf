"""What the sampler hands to the wires: one seed's sample, and a delivery of a walk.

Rules of this file:
- These are values: nothing here waits, and nothing here knows how a sample was made or how it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.core.errors import SampleRejected
from labelmint.core.policy import Gate, Mixing, group_id
from labelmint.core.served_model import ServedModel


@dataclass(frozen=True)
class Sample:
    """One seed's outcome: image uint8 [R,R,3], js_map float32 [R,R], and `labels`, the outputs of the model's task by
    name. What was left out is None; labels that were left out are empty."""

    model: ServedModel
    seed: int
    mixing: Mixing | None
    gate: Gate
    image: npt.NDArray[np.uint8] | None
    labels: Mapping[str, npt.NDArray[Any]]
    js_map: npt.NDArray[np.float32] | None
    js_score: float

    @property
    def label(self) -> npt.NDArray[np.uint8] | None:
        """The label image uint8 [R,R]; None where the task has none or it was left out."""
        return self.labels.get("label")

    @property
    def accepted(self) -> bool:
        return self.gate.accepts(self.js_score)

    @property
    def group_id(self) -> str:
        """Names the shape that this sample shares with others; empty for an unmixed one."""
        if self.mixing is None:
            return ""
        return group_id(self.model, self.seed, self.mixing, self.gate.truncation_psi)

    def rejection(self) -> SampleRejected:
        return SampleRejected(self.seed, self.js_score, self.gate.threshold, self.gate.calibration_id)


@dataclass(frozen=True)
class Delivery:
    """One sample of a walk, or None as a sign of life while none is accepted, with the cursor after it."""

    sample: Sample | None
    next_seed: int
    rejected_count: int
