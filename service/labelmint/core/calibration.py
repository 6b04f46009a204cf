"""A calibration: the measured distribution of JS scores and the threshold taken from it.

Rules of this file:
- A calibration states what it was measured on: truncation, score kind, model digest and seeds.
- Its id is a hash of its content. A response that carries the id therefore says exactly which calibration judged it.
- The kind of a model's score is chosen at its export, because the exported step computes the score.

The kinds of scores. At each pixel, p_n is the distribution over the classes that head n gives, and H the entropy in
nats. JS is H(mean of p_n) - mean of H(p_n), at least 0 and at most the logarithm of the number of heads.

- `sum`: the sum of JS over the pixels; DatasetGAN (Zhang et al. 2021), section 3.2.
- `top10_mean`: the mean of JS over the tenth of the pixels where it is highest; DatasetGAN's released code.
- `mixture_entropy`: the sum of H(mean of p_n) over the pixels, the entropy of what an ensemble predicts;
  Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles".
- `mean_entropy`: the sum of the mean of H(p_n) over the pixels, the uncertainty on which the heads agree; Depeweg et
  al. 2018, "Decomposition of Uncertainty in Bayesian Deep Learning for Efficient and Risk-sensitive Learning".

For keypoints, H and JS of a pixel are sums over the keypoints, each with a distribution of two outcomes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

CALIBRATION = "calibration"  # the parameter of a model's configuration with the calibration as JSON
MIN_SEEDS = 1_000  # with fewer seeds the 90th percentile is unreliable
THRESHOLD_QUANTILE = 0.9  # the paper drops the most uncertain 10 %
NUM_QUANTILES = 101
ScoreKind = Literal["sum", "top10_mean", "mixture_entropy", "mean_entropy"]
SCORE_KINDS: tuple[str, ...] = get_args(ScoreKind)


@dataclass(frozen=True)
class Calibration:
    """Scores are in nats; `quantiles` holds the scores at 0, 0.01, ... 1.

    `class_index` is the class that a conditional generator drew; None for a generator without classes.
    """

    model_digest: str
    score_kind: str
    truncation_psi: float
    threshold: float
    threshold_quantile: float
    quantiles: tuple[float, ...]
    first_seed: int
    seed_count: int
    class_index: int | None = None

    def __post_init__(self) -> None:
        """Validate the fields, which may come from a file; raises ValueError or TypeError."""
        if not isinstance(self.model_digest, str) or not isinstance(self.score_kind, str):
            raise ValueError("a calibration must name the digest and the score kind of a model")
        for name, highest in (("truncation_psi", 2.0), ("threshold_quantile", 1.0)):
            if not 0.0 <= getattr(self, name) <= highest:
                raise ValueError(f"a calibration's {name} must be within 0 and {highest:g}, not {getattr(self, name)}")
        for name, lowest in (("first_seed", 0), ("seed_count", MIN_SEEDS)):
            if type(getattr(self, name)) is not int or not lowest <= getattr(self, name) <= 1 << 32:
                raise ValueError(f"a calibration's {name} must be an integer >= {lowest}, not {getattr(self, name)!r}")
        if self.class_index is not None and (type(self.class_index) is not int or self.class_index < 0):
            raise ValueError(f"a calibration's class_index must be an integer >= 0, not {self.class_index!r}")
        if len(self.quantiles) != NUM_QUANTILES:
            raise ValueError(f"a calibration must have {NUM_QUANTILES} quantiles, not {len(self.quantiles)}")
        if not np.all(np.isfinite(self.quantiles)) or np.any(np.diff(self.quantiles) < 0):
            raise ValueError("calibration quantiles must be finite and ascending")
        if not np.isfinite(self.threshold):
            raise ValueError(f"a calibration's threshold must be finite, not {self.threshold}")

    @cached_property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def score_at(self, quantile: float) -> float:
        """The score at a quantile in 0..1, interpolated linearly between the 101 measured quantiles."""
        return float(np.interp(quantile, np.linspace(0.0, 1.0, NUM_QUANTILES), self.quantiles))

    def described(self) -> dict[str, Any]:
        """The fields that gRPC and REST return for a calibration, under the names of the proto."""
        data = asdict(self)
        for name in ("model_digest", "score_kind", "class_index"):  # the model or the request says it
            del data[name]
        return {"id": self.id, **data}

    def to_json(self) -> str:
        data = asdict(self)
        if self.class_index is None:  # left out, so that ids stay what they were before there were classes
            del data["class_index"]
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        data: dict[str, Any] = json.loads(text)
        return cls(**{**data, "quantiles": tuple(data["quantiles"])})


def calibrate(
    scores: Sequence[float],
    *,
    model_digest: str,
    score_kind: str,
    truncation_psi: float,
    first_seed: int,
    class_index: int | None = None,
) -> Calibration:
    """Compute the calibration of measured scores; raises ValueError for fewer than `MIN_SEEDS` scores."""
    if len(scores) < MIN_SEEDS:
        raise ValueError(f"a calibration needs at least {MIN_SEEDS} seeds, not {len(scores)}")
    quantiles = np.quantile(np.asarray(scores, dtype=np.float64), np.linspace(0.0, 1.0, NUM_QUANTILES))
    return Calibration(
        model_digest=model_digest,
        score_kind=score_kind,
        truncation_psi=truncation_psi,
        threshold=float(quantiles[round(THRESHOLD_QUANTILE * (NUM_QUANTILES - 1))]),
        threshold_quantile=THRESHOLD_QUANTILE,
        quantiles=tuple(float(score) for score in quantiles),
        first_seed=first_seed,
        seed_count=len(scores),
        class_index=class_index,
    )
