"""The running inferences: each waits for a slot, calls Triton, and serves all callers that joined it.

Rules of this file:
- `Inference` makes the decisions. This file has the tasks, the waiting and the calls.
- With a cache, concurrent requests for the same sample share one inference. Without a cache nothing is shared.
- A call that Triton has begun is never cancelled. It keeps its slot until Triton answers (`triton/client.py` says why).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable
from contextlib import AsyncExitStack
from copy import copy
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from labelmint.core.errors import DeadlineExceeded, LabelmintError, TritonUnavailable
from labelmint.gateway.sampling.cache import Arrays, SampleCache
from labelmint.gateway.sampling.inference import Hold, Inference, is_over
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.slots import Requester, Slots
from labelmint.tracing import span

T = TypeVar("T")

# Calls Triton for one sample. The argument is the longest time for the call in seconds, None for no limit.
Infer: TypeAlias = Callable[[float | None], Awaitable[Arrays]]


@dataclass(frozen=True, eq=False)
class _Running:
    inference: Inference
    task: asyncio.Task[Arrays]


class Inferences:
    def __init__(self, slots: Slots, cache: SampleCache, metrics: Metrics, *, hold_seconds: float) -> None:
        """`hold_seconds`: for how long a call is retried while Triton is unavailable."""
        self._slots = slots
        self._cache = cache
        self._metrics = metrics
        self._hold_seconds = hold_seconds
        self._running: dict[Hashable, list[_Running]] = {}

    async def get(
        self, key: Hashable, outputs: Collection[str], infer: Infer, *, requester: Requester, deadline: float | None
    ) -> Arrays:
        """The arrays of a sample named by `outputs`, from the cache or else from `infer`, which generates only these.

        `key` identifies the sample. Raises DeadlineExceeded at `deadline`, on the loop's clock, and errors of `infer`.
        """
        while True:
            if (kept := self._cache.get(key, outputs)) is not None:
                self._metrics.cache_hits.inc()
                return kept
            joined = self._join(key, outputs, requester=requester, deadline=deadline)
            running = joined or self._begin(key, outputs, infer, requester=requester, deadline=deadline)
            try:
                arrays = await self._wait(key, running, deadline)
            except DeadlineExceeded:
                if joined is None or is_over(deadline, _now()):
                    raise
                continue  # Triton dropped it at the deadline of earlier callers; this one still has time
            if joined is not None:
                self._metrics.cache_hits.inc()
            return {name: arrays[name] for name in outputs}

    async def hold(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call that needs Triton; the call is retried while Triton is unavailable."""
        hold = Hold(_now(), self._hold_seconds)
        while True:
            try:
                return await call()
            except TritonUnavailable:
                if (pause := hold.unavailable(_now())) is None:
                    raise
            await asyncio.sleep(pause)

    def _join(
        self, key: Hashable, outputs: Collection[str], *, requester: Requester, deadline: float | None
    ) -> _Running | None:
        for running in self._running.get(key, ()):
            if running.inference.serves(outputs):
                before = running.inference.requester
                running.inference.join(requester, deadline)
                self._slots.moved(running.inference, before)
                return running
        return None

    def _begin(
        self, key: Hashable, outputs: Collection[str], infer: Infer, *, requester: Requester, deadline: float | None
    ) -> _Running:
        inference = Inference(outputs, requester=requester, deadline=deadline)
        task = asyncio.create_task(self._run(key, inference, infer))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # there may be no caller left
        running = _Running(inference, task)
        if self._cache.enabled:
            self._metrics.cache_misses.inc()
            self._running.setdefault(key, []).append(running)
        return running

    async def _run(self, key: Hashable, inference: Inference, infer: Infer) -> Arrays:
        try:
            async with AsyncExitStack() as stack:
                with span("wait for slot"):
                    await stack.enter_async_context(self._slots.slot(inference))
                with self._metrics.samples_in_flight.track_inprogress():
                    arrays = await self.hold(lambda: infer(inference.seconds(_now())))
            return self._cache.keep(key, arrays)
        finally:
            inference.end()

    async def _wait(self, key: Hashable, running: _Running, deadline: float | None) -> Arrays:
        """The outcome; raises DeadlineExceeded. The task is cancelled when the last caller stops waiting."""
        try:
            await asyncio.wait([running.task], timeout=None if deadline is None else deadline - _now())
            if not running.task.done():
                raise DeadlineExceeded()
            return running.task.result()
        except LabelmintError as error:
            raise copy(error) from error  # a copy for each caller, because exceptions collect tracebacks
        finally:
            running.inference.leave()
            if running.inference.abandoned:
                running.task.cancel()
                self._forget(key, running)

    def _forget(self, key: Hashable, running: _Running) -> None:
        others = [each for each in self._running.pop(key, ()) if each is not running]
        if others:
            self._running[key] = others


def _now() -> float:
    return asyncio.get_running_loop().time()
