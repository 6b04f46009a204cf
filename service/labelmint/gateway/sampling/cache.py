"""A bounded memory of samples, for jobs that ask for the same seeds every epoch.

Rules of this file:
- What is kept is what Triton answered: the gate is applied anew, so one entry serves every gate. Outputs that were
  asked for one after the other stand in one entry side by side.
- The key has the model's digest, so that a model that changed is never mistaken for what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import TypeAlias

from cachetools import LRUCache

from labelmint.gateway.sampling.metrics import Metrics
from labelmint.triton.client import Array

Arrays: TypeAlias = Mapping[str, Array]


class SampleCache:
    """The arrays of the samples that were asked for last, at most `max_bytes` of them; 0 keeps none."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._kept: LRUCache[Hashable, Arrays] = LRUCache(max_bytes, getsizeof=_bytes)
        self._metrics = metrics

    @property
    def enabled(self) -> bool:
        return self._kept.maxsize > 0

    def get(self, key: Hashable, outputs: Collection[str]) -> Arrays | None:
        """The arrays that `outputs` names, if all of them are kept."""
        arrays = self._kept.get(key)
        if arrays is None or not arrays.keys() >= set(outputs):
            return None
        return {name: arrays[name] for name in outputs}

    def keep(self, key: Hashable, arrays: Arrays) -> Arrays:
        """Keep arrays beside those of the same sample or, where both do not fit, in their place; returns them."""
        if not self.enabled:
            return arrays
        for array in arrays.values():
            array.flags.writeable = False  # others will read it
        for kept in ({**self._kept.get(key, {}), **arrays}, arrays):
            if _bytes(kept) <= self._kept.maxsize:
                self._kept[key] = kept
                break
        self._metrics.cache_bytes.set(self._kept.currsize)
        return arrays


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
