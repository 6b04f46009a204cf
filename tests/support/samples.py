"""Samples as plain values, for tests of the code that uses samples."""

from dataclasses import replace

import numpy as np

from labelmint.core.policy import SampleOptions, terms_of
from labelmint.core.task import KEYPOINTS
from labelmint.gateway.sampling.sample import Sample
from tests.support.served import MODEL


def segmented() -> Sample:
    """A random image of 8x8 pixels with a random label of two classes."""
    rng = np.random.default_rng(0)
    return Sample(
        model=MODEL,
        seed=7,
        mixing=None,
        terms=terms_of(MODEL, SampleOptions(max_js=5.0)),
        image=rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
        labels={"label": rng.integers(0, 2, (8, 8), dtype=np.uint8)},
        js_map=rng.random((8, 8), dtype=np.float32),
        js_score=3.0,
    )


def marked(sample: Sample, name: str) -> Sample:
    """The sample as that of a model with two keypoints, of which the first is called `name`."""
    model = replace(MODEL, task=KEYPOINTS, label_names=(name, "chin"), palette=((255, 0, 0), (0, 0, 255)))
    positions, confidence = np.array([[1.0, 2.0], [6.0, 7.0]], np.float32), np.array([0.9, 0.4], np.float32)
    return replace(sample, model=model, labels={"keypoints": positions, "confidence": confidence})
