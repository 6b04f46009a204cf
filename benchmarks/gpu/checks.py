"""Compares what an arm returns with float32, and a sample alone with the same sample in batches and after others.

Rules of this file:
- Bytes are compared, so that NaN equals the same NaN.
- All figures are the same in two runs on one machine, if the arm is deterministic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
SMALL = ("image", "label", "js_map", "js_score")  # the outputs that a client gets


def same_bytes(one: Outputs, other: Outputs) -> bool:
    return one.keys() == other.keys() and all(
        x.shape == other[name].shape and torch.equal(_bytes(x), _bytes(other[name])) for name, x in one.items()
    )


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8 if x.dtype == torch.uint8 else torch.int32)


def row_of(outputs: Outputs, row: int) -> Outputs:
    return {name: x[row : row + 1] for name, x in outputs.items()}


def same_rows(batch: Outputs, alone: Sequence[Outputs]) -> bool:
    """Return whether the first samples of a batch have the bytes that they have alone."""
    return all(same_bytes(row_of(batch, row), outputs) for row, outputs in enumerate(alone))


def digest(outputs: Outputs) -> str:
    """Return the SHA-256 over what a client gets of one sample."""
    found = hashlib.sha256()
    for name in SMALL:
        if name in outputs:
            found.update(outputs[name].contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def compared(found: Sequence[Outputs], wanted: Sequence[Outputs]) -> dict[str, Any]:
    """Return how far an arm's samples are from those of float32.

    `..._agreement` is the share of equal values of a uint8 output. `..._difference` is the largest difference relative
    to the largest value; it is None if a value is not a number.
    """
    figures: dict[str, Any] = {}
    for name in wanted[0]:
        pairs = [(one[name], other[name]) for one, other in zip(found, wanted, strict=True)]
        if pairs[0][1].dtype == torch.uint8:
            figures[f"{name}_agreement"] = sum(float((a == b).double().mean()) for a, b in pairs) / len(pairs)
        else:
            worst = max(float((a - b).abs().amax() / b.abs().amax().clamp(min=1e-12)) for a, b in pairs)
            figures[f"{name}_difference"] = worst if worst == worst and worst != float("inf") else None
    features = {name: value for name, value in figures.items() if name.startswith("features_")}
    if features:
        for name in features:
            del figures[name]
        known = [value for value in features.values() if value is not None]
        figures["features_difference"] = max(known) if len(known) == len(features) else None
    return figures
