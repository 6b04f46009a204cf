"""The check of every export format: a file must return what the torch module returns, at batch 1 and in larger batches.

Rules of this file:
- The tolerances are the same for all formats. An export that exceeds one fails, and its file is not kept.
- Each format passes a function that runs its file, so this file does not depend on any format.
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

# The largest difference to torch that counts as float rounding, relative to the tensor's largest value.
TOLERANCE = 2e-5
LABEL_AGREEMENT = 0.9999

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ExportedStep:
    """The file's bytes and, per output, the largest difference to torch relative to the output's largest value."""

    data: bytes
    difference: dict[str, float]


def compare(step: Step, run: Callable[[Sequence[Tensor]], Sequence[Array]]) -> dict[str, float]:
    """Compare the file with torch at batch 1 and, if it is served in batches, at batch 3.

    `run` takes the inputs in the step's order and returns its outputs. Returns the largest relative difference of each
    output. Raises RuntimeError if one exceeds its tolerance.
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
        # Rounding may move an image value by one step of uint8; it hardly ever changes a label or vote.
        if name == "image" and int(np.abs(want.astype(int) - got).max()) <= 1 and disagreement < 1e-3:
            return disagreement
        if 1.0 - disagreement < LABEL_AGREEMENT:
            raise RuntimeError(f"{name}: {disagreement:.2e} of the values differ between the file and torch")
        return disagreement
    error = _largest(got - want) / max(_largest(want), 1e-12)
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name}: the file differs from torch by {error:.2e} of the largest value")
    return error


def _largest(values: Array) -> float:
    """Return the largest absolute value, without a second array of this size. NaN stays NaN."""
    return max(float(values.max()), -float(values.min()))
