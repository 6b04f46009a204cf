"""A bounded memory of minted samples, for jobs that ask for the same seeds every epoch.

Rules of this file:
- What is kept is what Triton answered: the gate is applied anew, so one entry serves every gate.
- The key has the model's digest, so that a model that changed is never mistaken for what it was.
- Equal requests at one time are minted once: the second waits for the first, and mints itself if that one failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping
from weakref import WeakValueDictionary

from cachetools import LRUCache

from labelmint.gateway.metrics import Metrics
from labelmint.triton.client import Array

Arrays = Mapping[str, Array]


class SampleCache:
    """The arrays of the samples that were asked for last, at most `max_bytes` of them; 0 keeps none."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._kept: LRUCache[Hashable, Arrays] = LRUCache(max_bytes, getsizeof=_bytes)
        self._minting: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self._metrics = metrics

    async def get(self, key: Hashable, outputs: Collection[str], mint: Callable[[], Awaitable[Arrays]]) -> Arrays:
        """The arrays of a sample that `outputs` names, from memory or else from `mint`, which makes just those."""
        if self._kept.maxsize == 0:
            return await mint()
        if (arrays := self._found(key, outputs)) is not None:
            return arrays
        lock = self._minting.setdefault(key, asyncio.Lock())
        async with lock:
            if (arrays := self._found(key, outputs)) is not None:
                return arrays
            self._metrics.cache_misses.inc()
            arrays = await mint()
            for array in arrays.values():
                array.flags.writeable = False  # others will read it
            if _bytes(arrays) <= self._kept.maxsize:
                self._kept[key] = arrays
            self._metrics.cache_bytes.set(self._kept.currsize)
            return arrays

    def _found(self, key: Hashable, outputs: Collection[str]) -> Arrays | None:
        arrays = self._kept.get(key)
        if arrays is None or not arrays.keys() >= set(outputs):
            return None
        self._metrics.cache_hits.inc()
        return {name: arrays[name] for name in outputs}


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
