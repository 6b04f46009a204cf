"""The low-pass filter of a checkpoint, as the taps of one direction.

Rules of this file:
- A filter buffer is read, not assumed: a kernel that is not the outer product of one row of taps is refused.
- Taps are given in whole numbers where they are such, so that the usual filter is (1, 3, 3, 1) to the bit.
"""

from __future__ import annotations

import numpy as np

from labelmint.checkpoints.name_table import Floats

_TOLERANCE = 1e-6
MAX_TAPS = 64


def filter_taps(kernel: Floats, gain: float) -> tuple[float, ...] | None:
    """The taps of `kernel` [F] or [F,F], of sum `gain`; None if it is not of that kind.

    NVlabs keep filters of 8 taps and more in one dimension, all others as the outer product.
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
