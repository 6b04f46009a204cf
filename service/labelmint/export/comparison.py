"""What every export format is held to: the file answers what the torch module answers, alone and in a batch.

Rules of this file:
- The bars are the same for all formats, and a file that misses one is not kept.
- A format gives a function that runs its file; nothing here knows what the file is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labelmint.export.modules import Step, example_inputs

# Largest difference to torch that is float rounding and not a mistake, relative to the tensor's largest value.
TOLERANCE = 2e-5
LABEL_AGREEMENT = 0.9999

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ExportedStep:
    """The file's bytes and, per output, the largest difference to torch relative to the output's largest value."""

    data: bytes
    difference: dict[str, float]


def compare(step: Step, run: Callable[[Sequence[Tensor]], Sequence[Array]]) -> dict[str, float]:
    """Run the file at batch 1 and, if it is served in batches, 3 against torch: largest relative difference per output.

    `run` takes the inputs in the step's order and gives its outputs. Raises RuntimeError beyond a bar.
    """
    difference = dict.fromkeys((spec.name for spec in step.outputs), 0.0)
    for size in (1, 3) if step.max_batch > 1 else (1,):
        arguments = example_inputs(step, size, seed=size)
        with torch.no_grad():
            expected = step(*arguments)
        for spec, want, got in zip(step.outputs, expected, run(arguments), strict=True):
            error = _difference(spec.name, want.numpy(), got)
            difference[spec.name] = max(difference[spec.name], error)
    return difference


def _difference(name: str, want: Array, got: Array) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise RuntimeError(f"{name}: exported {got.dtype}{got.shape}, torch {want.dtype}{want.shape}")
    if want.dtype == np.uint8:
        disagreement = float((want != got).mean())
        # An image may differ by the rounding of a value at a step of uint8; a label or vote hardly ever.
        if name == "image" and int(np.abs(want.astype(int) - got).max()) <= 1 and disagreement < 1e-3:
            return disagreement
        if 1.0 - disagreement < LABEL_AGREEMENT:
            raise RuntimeError(f"{name}: {disagreement:.2e} of the values differ between the file and torch")
        return disagreement
    error = float(np.abs(want - got).max() / max(float(np.abs(want).max()), 1e-12))
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name}: the file differs from torch by {error:.2e} of the largest value")
    return error
