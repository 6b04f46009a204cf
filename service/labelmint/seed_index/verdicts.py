"""The verdict on each seed of an index: what a request with given terms would do with its sample. Pure functions.

Rules of this file:
- A verdict is exactly that of `Terms.outcome` and `Terms.delivers` on the sample itself. The values are widened and
  compared as those of a sample are: in float64, an area as a count divided by the number of pixels.
- A score that is not a number is rejected, and a value that is not a number is within no bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.core.policy import Terms
from labelmint.seed_index.layout import Described

# The bits of a verdict. A rejected or filtered seed may be delivered too, or neither; an accepted one always is.
REJECTED, FILTERED, DELIVERED = 1, 2, 4

Verdicts = npt.NDArray[np.uint8]


def columns_for(described: Described, terms: Terms) -> tuple[str, ...]:
    """The columns that a verdict needs."""
    return described.score_column, *(described.label_column(each.name) for each in terms.conditions.each)


def verdicts(described: Described, terms: Terms, columns: Mapping[str, npt.NDArray[Any]]) -> Verdicts:
    """The verdict on each row of `columns`, those of `columns_for`: uint8, bits as above, [N]."""
    with np.errstate(invalid="ignore"):
        accepted = columns[described.score_column].astype(np.float64) <= terms.gate.threshold
        fits = np.ones_like(accepted)
        for each in terms.conditions.each:
            measured = columns[described.label_column(each.name)].astype(np.float64)
            if terms.conditions.measure == "area":
                measured /= described.resolution**2
            low, high = each.bounds
            fits &= (low <= measured) & (measured <= high)
    passed = np.ones_like(accepted) if terms.options.include_rejected else accepted
    found = (passed & fits) * np.uint8(DELIVERED)
    found |= ~accepted * np.uint8(REJECTED)
    found |= (accepted & ~fits) * np.uint8(FILTERED)
    return found
