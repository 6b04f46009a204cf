"""A bounded in-memory cache of samples, for jobs that request the same seeds in every epoch.

Rules of this file:
- The cache stores Triton's arrays, and the gate is applied at each request, so one entry serves every gate. The outputs
  of one sample share an entry, even if separate requests fetched them.
- The key contains the model's digest and executor, so a changed model never gets the entries of its old state.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import TypeAlias

from cachetools import LRUCache

from labelmint.gateway.sampling.metrics import Metrics
from labelmint.triton.client import Array

Arrays: TypeAlias = Mapping[str, Array]


class SampleCache:
    """An LRU cache of samples' arrays, limited to `max_bytes`; 0 disables it."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._kept: LRUCache[Hashable, Arrays] = LRUCache(max_bytes, getsizeof=_bytes)
        self._metrics = metrics

    @property
    def enabled(self) -> bool:
        return self._kept.maxsize > 0

    def get(self, key: Hashable, outputs: Collection[str]) -> Arrays | None:
        """The arrays named by `outputs`, or None unless all of them are cached."""
        arrays = self._kept.get(key)
        if arrays is None or not arrays.keys() >= set(outputs):
            return None
        return {name: arrays[name] for name in outputs}

    def keep(self, key: Hashable, arrays: Arrays) -> Arrays:
        """Add arrays to the entry of their sample, or replace it if both do not fit; returns the arrays."""
        if not self.enabled:
            return arrays
        for array in arrays.values():
            array.flags.writeable = False  # other requests will share it
        for kept in ({**self._kept.get(key, {}), **arrays}, arrays):
            if _bytes(kept) <= self._kept.maxsize:
                self._kept[key] = kept
                break
        self._metrics.cache_bytes.set(self._kept.currsize)
        return arrays


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
