"""Extends sparse masks: pixels that nobody drew get the label of a quick interpreter of all drawn pixels.

Rules of this file:
- A drawn pixel keeps its class. A dataset without undrawn pixels stays as it is.
- The quick interpreter knows the strokes of the same image, so it labels this image better than any other. On the
  demo's strokes, the ten classifiers learn more from extended masks than from the strokes alone
  (benchmarks/annotate/simulate.py).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from labelmint.models.annotations import UNDRAWN, AnnotatedDataset
from labelmint.models.draw import Check, Features, counted, features_of, unchecked
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.quick import fit_quick, preview


@torch.no_grad()
def extended(
    generator: Generator, dataset: AnnotatedDataset, *, layout: str, check: Check = unchecked
) -> AnnotatedDataset:
    """Return the dataset of masks with every pixel labelled."""
    if not any((mask == UNDRAWN).any() for mask in dataset.labels.values()):
        return dataset
    interpreter = fit_quick(generator, dataset, layout, check)
    with counted(features_of(generator, dataset, layout), len(dataset.labels), "extend") as features:
        return extended_by(interpreter, dataset, features)


@torch.no_grad()
def extended_by(interpreter: StyleInterpreter, dataset: AnnotatedDataset, features: Features) -> AnnotatedDataset:
    """Return the dataset extended by a quick interpreter."""
    labels = {}
    for seed, mask in dataset.labels.items():
        found = preview(interpreter, features(seed))[0].numpy()  # [R,R]
        labels[seed] = np.where(mask == UNDRAWN, found, mask)
    return replace(dataset, labels=labels)
