"""Extends sparse masks: pixels that nobody drew get the label of a quick interpreter of all drawn pixels.

Rules of this file:
- A drawn pixel keeps its class. A dataset without undrawn pixels stays as it is.
- The quick interpreter knows the strokes of the same image, so it labels this image better than any other. On the
  demo's strokes, the ten classifiers learn more from extended masks than from the strokes alone
  (benchmarks/annotate/simulate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from labelmint.models.annotations import UNDRAWN, AnnotatedDataset
from labelmint.models.draw import draw
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.pixels import Bytes
from labelmint.models.quick import Sums, preview, quick_interpreter, quick_spec, sums_of


@torch.no_grad()
def extended(
    generator: Generator, dataset: AnnotatedDataset, *, layout: str, check: Callable[[int, Bytes], None]
) -> AnnotatedDataset:
    """Return the dataset of masks with every pixel labelled; `check` is called as in `fit`."""
    if not any((mask == UNDRAWN).any() for mask in dataset.labels.values()):
        return dataset
    basis, sums = sums_of(generator, dataset, layout, check)
    interpreter = quick_interpreter(quick_spec(generator, dataset, layout), basis, Sums.together(sums.values()))

    def features(seed: int) -> Mapping[int, Tensor]:
        class_index = dataset.class_indices.get(seed)
        return draw(generator, seed, dataset.truncation_psi, layout=layout, class_index=class_index)[1]

    return extended_by(interpreter, dataset, features)


@torch.no_grad()
def extended_by(
    interpreter: StyleInterpreter, dataset: AnnotatedDataset, features: Callable[[int], Mapping[int, Tensor]]
) -> AnnotatedDataset:
    """Return the dataset extended by a quick interpreter; `features` gives {r: float32 [1,C_r,r,r]} of a seed."""
    labels = {}
    for seed, mask in dataset.labels.items():
        found = preview(interpreter, features(seed))[0].numpy()  # [R,R]
        labels[seed] = np.where(mask == UNDRAWN, found, mask)
    return replace(dataset, labels=labels)
