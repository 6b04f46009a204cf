"""Reads the low-pass filter of a checkpoint as the taps of one direction.

Rules of this file:
- The filter buffer is read, not assumed. A kernel that is not the outer product of one row of taps is refused.
- Taps in whole-number ratios are returned as whole numbers, so the usual filter is exactly (1, 3, 3, 1).
"""

from __future__ import annotations

import numpy as np

from labelmint.checkpoints.name_table import Floats

_TOLERANCE = 1e-6
MAX_TAPS = 64


def filter_taps(kernel: Floats, gain: float) -> tuple[float, ...] | None:
    """Return the taps of `kernel` [F] or [F,F] with sum `gain`, or None if it is not such a filter.

    NVlabs store filters of 8 or more taps in one dimension, and shorter ones as the outer product.
    """
    if kernel.ndim not in (1, 2) or len(set(kernel.shape)) != 1 or not 1 <= kernel.shape[0] <= MAX_TAPS:
        return None
    scaled = kernel.astype(np.float64) / gain
    if abs(scaled.sum() - 1.0) > _TOLERANCE * kernel.size:
        return None
    taps = scaled if kernel.ndim == 1 else scaled.sum(axis=0)
    if kernel.ndim == 2 and np.abs(np.outer(taps, taps) - scaled).max() > _TOLERANCE:
        return None
    smallest = np.abs(taps[np.abs(taps) > _TOLERANCE]).min()
    whole = np.round(taps / smallest)
    if np.abs(taps / smallest - whole).max() < 1e-4:
        taps = whole
    return tuple(float(tap) for tap in taps)
