"""The results that the sampler returns to the gRPC and REST servers: a sample, and a delivery of a walk.

Rules of this file:
- These classes are plain values. They never wait, and they do not depend on how a sample is generated or sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.core.errors import ContentMissing, SampleRejected
from labelmint.core.policy import Gate, Mixing, Outcome, Terms, group_id
from labelmint.core.served_model import ServedModel


@dataclass(frozen=True)
class Ignored:
    """The pixels of a label to ignore: those with a JS divergence above a quantile of the image's js_map, [R,R]."""

    js_map: npt.NDArray[np.float32]
    quantile: float


@dataclass(frozen=True)
class Sample:
    """The result for one seed: image uint8 [R,R,3], js_map float32 [R,R], and `labels`, the task's outputs by name.

    An omitted image or js_map is None; omitted labels are an empty mapping. `content` has what the conditions of the
    request measured. The encoders apply `ignored` to the label.
    """

    model: ServedModel
    seed: int
    mixing: Mixing | None
    terms: Terms
    image: npt.NDArray[np.uint8] | None
    labels: Mapping[str, npt.NDArray[Any]]
    js_map: npt.NDArray[np.float32] | None
    js_score: float
    content: Mapping[str, float] = field(default_factory=dict)
    ignored: Ignored | None = None

    @property
    def label(self) -> npt.NDArray[np.uint8] | None:
        """The label image uint8 [R,R], without ignored pixels; None if the task has none or it was omitted."""
        return self.labels.get("label")

    @property
    def gate(self) -> Gate:
        return self.terms.gate

    @property
    def accepted(self) -> bool:
        return self.gate.accepts(self.js_score)

    @property
    def outcome(self) -> Outcome:
        return self.terms.outcome(self.js_score, self.content)

    @property
    def delivered(self) -> bool:
        return self.terms.delivers(self.js_score, self.content)

    @property
    def class_index(self) -> int | None:
        """The class that the generator drew; None for a generator without classes."""
        return self.terms.options.class_index

    @property
    def group_id(self) -> str:
        """The id of the shape that this sample shares with other mixed samples; empty for an unmixed one."""
        if self.mixing is None:
            return ""
        psi = self.gate.truncation_psi
        return group_id(self.model, self.seed, self.mixing, truncation_psi=psi, class_index=self.class_index)

    def refusal(self) -> SampleRejected | ContentMissing | None:
        """Why the sample is not delivered, as the error of a request for it alone; None if it is delivered."""
        if self.delivered:
            return None
        if self.accepted or self.terms.options.include_rejected:
            return self.terms.conditions.missing(self.seed, self.content)
        return SampleRejected(self.seed, self.js_score, self.gate.threshold, self.gate.calibration_id)


@dataclass(frozen=True)
class Delivery:
    """One sample of a walk, with the seed to resume at after it. A sample of None is a heartbeat or ends the walk."""

    sample: Sample | None
    next_seed: int
    rejected_count: int = 0
    filtered_count: int = 0
