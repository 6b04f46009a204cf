"""A bounded memory of minted samples, for jobs that ask for the same seeds every epoch.

Rules of this file:
- What is kept is what Triton answered: the gate is applied anew, so one entry serves every gate. Outputs that were
  asked for one after the other stand in one entry side by side.
- The key has the model's digest, so that a model that changed is never mistaken for what it was.
- Equal requests at one time are minted once, as long as anybody waits for it. Each waits no longer than its own
  deadline, and a request that joins a stream's sample lends it its turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Hashable, Mapping
from copy import copy
from typing import Any, TypeAlias

from cachetools import LRUCache

from labelmint.core.errors import DeadlineExceeded, LabelmintError
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.slots import Claim
from labelmint.triton.client import Array

Arrays: TypeAlias = Mapping[str, Array]
Mint: TypeAlias = Callable[[Claim], Coroutine[Any, Any, Arrays]]


class SampleCache:
    """The arrays of the samples that were asked for last, at most `max_bytes` of them; 0 keeps none."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._kept: LRUCache[Hashable, Arrays] = LRUCache(max_bytes, getsizeof=_bytes)
        self._mintings: dict[Hashable, list[_Minting]] = {}
        self._metrics = metrics

    async def get(self, key: Hashable, outputs: Collection[str], claim: Claim, mint: Mint) -> Arrays:
        """The arrays of a sample that `outputs` names, from memory or else from `mint`, which makes just those.

        Raises DeadlineExceeded at the claim's deadline, and what `mint` raises.
        """
        if self._kept.maxsize == 0:
            return await _Minting(outputs, claim, mint).wait(claim.deadline)
        while (arrays := self._found(key, outputs)) is None:
            deadline = claim.deadline
            mintings = self._mintings.setdefault(key, [])
            joined = next((minting for minting in mintings if minting.makes(outputs)), None)
            if joined is None:
                self._metrics.cache_misses.inc()
                minting = _Minting(outputs, claim, lambda claim: self._keep(key, claim, mint))
                mintings.append(minting)
            else:
                minting = joined
                minting.claim.join(claim)
            try:
                arrays = await minting.wait(deadline)
            except DeadlineExceeded:  # Triton may have dropped it for the deadline of somebody else
                if joined is None or (deadline is not None and deadline <= asyncio.get_running_loop().time()):
                    raise
            else:
                if joined is not None:
                    self._metrics.cache_hits.inc()
                return {name: arrays[name] for name in outputs}
            finally:
                if not minting.waiting:
                    self._forget(key, minting)
        self._metrics.cache_hits.inc()
        return arrays

    def _found(self, key: Hashable, outputs: Collection[str]) -> Arrays | None:
        arrays = self._kept.get(key)
        if arrays is None or not arrays.keys() >= set(outputs):
            return None
        return {name: arrays[name] for name in outputs}

    async def _keep(self, key: Hashable, claim: Claim, mint: Mint) -> Arrays:
        arrays = await mint(claim)
        for array in arrays.values():
            array.flags.writeable = False  # others will read it
        for kept in ({**self._kept.get(key, {}), **arrays}, arrays):
            if _bytes(kept) <= self._kept.maxsize:
                self._kept[key] = kept
                break
        self._metrics.cache_bytes.set(self._kept.currsize)
        return arrays

    def _forget(self, key: Hashable, minting: _Minting) -> None:
        mintings = self._mintings.get(key, [])
        if minting in mintings:
            mintings.remove(minting)
        if not mintings:
            self._mintings.pop(key, None)


class _Minting:
    """A sample that is being made, for all who wait for it."""

    def __init__(self, outputs: Collection[str], claim: Claim, mint: Mint) -> None:
        self.claim = claim
        self.waiting = 0
        self._outputs = frozenset(outputs)
        self._task = asyncio.create_task(mint(claim))
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to hear it

    def makes(self, outputs: Collection[str]) -> bool:
        """Whether who wants these outputs may wait for it."""
        return self._outputs.issuperset(outputs) and not self._task.done()

    async def wait(self, deadline: float | None) -> Arrays:
        """What was made; raises DeadlineExceeded. The last who leaves ends the work, which may take until it has."""
        loop = asyncio.get_running_loop()
        self.waiting += 1
        try:
            await asyncio.wait([self._task], timeout=None if deadline is None else deadline - loop.time())
            if not self._task.done():
                raise DeadlineExceeded()
            return self._task.result()
        except LabelmintError as error:
            raise copy(error) from error  # one of its own for each caller: exceptions collect tracebacks
        finally:
            self.waiting -= 1
            if not self.waiting:
                self._task.cancel()


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
