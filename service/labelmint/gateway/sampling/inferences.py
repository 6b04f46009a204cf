"""The running inferences: each is one sample in Triton, for which several callers may wait.

Rules of this file:
- `Inference` makes the decisions. Each of its events is a method call, and time is passed in as a number, so tests need
  no event loop. `Inferences` has the tasks, the waiting and the calls.
- With a cache, concurrent requests for the same sample share one inference. Without a cache nothing is shared.
- A caller waits for a sample no longer than its own deadline. The work continues until the latest of these deadlines.
- A request that joins a stream's sample lends it the request's turn, because requests pass queued samples of streams.
- A call that Triton has begun is never cancelled. It keeps its slot until Triton answers (`triton/client.py` says why).
- While Triton is unavailable, a call is retried every second for a bounded time. In between it has no slot, so a Triton
  that comes back gets as many samples as it has room for.
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
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.slots import Requester, Slots

T = TypeVar("T")

# Calls Triton for one sample. The argument is the longest time for the call in seconds, None for no limit.
Infer: TypeAlias = Callable[[float | None], Awaitable[Arrays]]

RETRY_SECONDS = 1.0


class Inference:
    """The generation of `outputs` of one sample, in the turns of `requester`, until `deadline` (None: no deadline)."""

    def __init__(self, outputs: Collection[str], *, requester: Requester, deadline: float | None) -> None:
        self.requester = requester
        self._outputs = frozenset(outputs)
        self._deadline = deadline
        self._waiting = 1
        self._ended = False

    @property
    def abandoned(self) -> bool:
        """Whether no caller waits for it any more, so the work may stop."""
        return self._waiting == 0

    def serves(self, outputs: Collection[str]) -> bool:
        """Whether a caller that needs these outputs may join."""
        return self._outputs.issuperset(outputs) and not self._ended and not self.abandoned

    def join(self, requester: Requester, deadline: float | None) -> None:
        """One more caller waits for it."""
        self._waiting += 1
        self._deadline = None if self._deadline is None or deadline is None else max(self._deadline, deadline)
        if self.requester.kind == "stream" and requester.kind == "request":
            self.requester = requester

    def leave(self) -> None:
        """One caller has its result or has stopped waiting."""
        self._waiting -= 1

    def end(self) -> None:
        """The outcome is known."""
        self._ended = True

    def seconds(self, now: float) -> float | None:
        """How long Triton may take from now on; None for no limit."""
        return None if self._deadline is None else self._deadline - now


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
        self,
        key: Hashable,
        outputs: Collection[str],
        infer: Infer,
        *,
        model: str,
        requester: Requester,
        deadline: float | None,
    ) -> Arrays:
        """The arrays of a sample named by `outputs`, from the cache or else from `infer`, which generates only these.

        `key` identifies the sample, and `model` is the name for the metrics. Raises DeadlineExceeded at `deadline`, on
        the loop's clock, and errors of `infer`.
        """
        while True:
            if (kept := self._cache.get(key, outputs)) is not None:
                self._metrics.cache_hits.inc()
                return kept
            joined = self._join(key, outputs, requester=requester, deadline=deadline)
            running = joined or self._begin(
                key, Inference(outputs, requester=requester, deadline=deadline), infer, model=model
            )
            try:
                arrays = await self._wait(key, running, deadline)
            except DeadlineExceeded:
                if joined is None or (deadline is not None and deadline <= _now()):
                    raise
                continue  # Triton dropped it at the deadline of earlier callers; this one still has time
            if joined is not None:
                self._metrics.cache_hits.inc()
            return {name: arrays[name] for name in outputs}

    async def hold(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call that needs Triton; the call is retried while Triton is unavailable."""
        end: float | None = None  # counts from the first failure, because a call may wait for its turn before
        while True:
            try:
                return await call()
            except TritonUnavailable:
                end = _now() + self._hold_seconds if end is None else end
                if _now() + RETRY_SECONDS > end:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

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

    def _begin(self, key: Hashable, inference: Inference, infer: Infer, *, model: str) -> _Running:
        task = asyncio.create_task(self._run(key, inference, infer, model=model))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # there may be no caller left
        running = _Running(inference, task)
        if self._cache.enabled:
            self._metrics.cache_misses.inc()
            self._running.setdefault(key, []).append(running)
        return running

    async def _run(self, key: Hashable, inference: Inference, infer: Infer, *, model: str) -> Arrays:
        try:
            return self._cache.keep(key, await self.hold(lambda: self._attempt(inference, infer, model)))
        finally:
            inference.end()

    async def _attempt(self, inference: Inference, infer: Infer, model: str) -> Arrays:
        async with AsyncExitStack() as stack:
            with self._metrics.slot_wait(model):
                await stack.enter_async_context(self._slots.slot(inference))
            with self._metrics.samples_in_flight.track_inprogress():
                return await infer(inference.seconds(_now()))

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
