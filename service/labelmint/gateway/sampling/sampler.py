"""The sampling core: what both wire adapters call, and the only place where policy and Triton meet.

Rules of this file:
- Each seed is one Triton request; Triton's dynamic batcher makes the batches, and a sample never depends on them.
- A walk keeps its window of samples ahead of its reader, in flight or ready, and delivers them in order; a reader who
  pauses stops the walk.
- Admission is bounded: beyond `max_in_flight` samples a request is refused, beyond `max_streams` a walk. What is
  admitted waits for a slot in its fair turn (`slots.py`), no longer than its deadline.
- Who leaves, or whose deadline passes, waits for nothing: what waits for a slot then waits no more, and what Triton has
  begun ends by itself, in its slot.
- What Triton is needed for and away is held for `capacity_wait_seconds`, and counts as owed while it is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from labelmint.core.errors import InvalidRequest, Overloaded, TritonUnavailable
from labelmint.core.policy import (
    Gate,
    Mixing,
    SampleOptions,
    Walk,
    check_batch,
    check_seed,
    gate_of,
    latent_of,
    mixing_of,
    mixings_of,
    window_of,
)
from labelmint.core.served_model import ServedModel
from labelmint.gateway.sampling.cache import SampleCache
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sample import Delivery, Sample
from labelmint.gateway.sampling.slots import KINDS, Claim, Party, Slots
from labelmint.tracing import span
from labelmint.triton.client import Array, Latents, TritonClient

DEFAULT_TIMEOUT_SECONDS = 60.0  # of a request that brings no deadline
HEARTBEAT_SECONDS = 1.0
_RETRY_SECONDS = 1.0  # while Triton is away

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What the gateway takes on at once; the fields of ServeSettings with these names say more."""

    max_in_flight: int
    triton_slots: int
    max_streams: int
    max_window: int
    capacity_wait_seconds: float


@dataclass(eq=False)
class _Pipeline:
    """The samples of one walk that are ahead of its reader, by seed; `remaining` is None for a walk without end."""

    window: int
    remaining: int | None
    include_rejected: bool
    ahead: deque[asyncio.Task[Sample]] = field(default_factory=deque)

    @property
    def wanted(self) -> int:
        """How many samples may be ahead: never more than could still be asked for."""
        return self.window if self.remaining is None else min(self.window, self.remaining)

    @property
    def owed(self) -> int:
        """How many of them the reader would take now if they were ready."""
        return self.wanted - sum(self._ready(task) for task in self.ahead)

    def delivers(self, sample: Sample) -> bool:
        return sample.accepted or self.include_rejected

    def _ready(self, task: asyncio.Task[Sample]) -> bool:
        return task.done() and not task.cancelled() and task.exception() is None and self.delivers(task.result())


class Sampler:
    def __init__(
        self, catalog: Catalog, triton: TritonClient, metrics: Metrics, cache: SampleCache, limits: Limits
    ) -> None:
        self.catalog = catalog
        self._triton = triton
        self._metrics = metrics
        self._cache = cache
        self._limits = limits
        self._slots = Slots(limits.triton_slots)
        self._admitted_samples = 0
        self._owed_before_model = 0
        self._pipelines: set[_Pipeline] = set()
        metrics.demand.set_function(self.demand)
        for kind in KINDS:
            metrics.queue_depth.labels(kind).set_function(partial(self._slots.depth, kind))

    def demand(self) -> int:
        """Accepted samples that are owed to clients, as the metric's help defines it."""
        pipelines = sum(pipeline.owed for pipeline in self._pipelines)
        return self._owed_before_model + self._admitted_samples + pipelines

    async def find(self, name: str, version: str, owed: int = 1) -> ServedModel:
        """The model that a request for `owed` samples is about, held for it while Triton is away.

        Raises ModelNotFound, TritonUnavailable or Overloaded. Who only asks what a model is counts as one sample, since
        samples follow: a cluster without Triton gets one.
        """
        limits = self._limits
        if self._owed_before_model > limits.max_in_flight + limits.max_streams * limits.max_window:
            raise Overloaded("too much waits for Triton already; try again later")
        self._owed_before_model += owed
        try:
            return await self._held(lambda: self.catalog.get(name, version))
        finally:
            self._owed_before_model -= owed

    def owed_at_first(self, window: int, count: int) -> int:
        """What a stream owes before its first sample; raises InvalidRequest."""
        wanted = window_of(window, self._limits.max_window)
        return min(wanted, count) if count > 0 else wanted

    async def sample(
        self, model: ServedModel, seed: int, options: SampleOptions, timeout_seconds: float | None = None
    ) -> Sample:
        """The sample of one seed; raises SampleRejected unless it is accepted or `include_rejected` is set."""
        check_seed(seed)
        mixing = mixing_of(model, options)
        gate = gate_of(model, options)
        with self._admitted(1) as party:
            sample = await self._mint(party, model, seed, mixing, gate, options, self._deadline(timeout_seconds))
        if not sample.accepted and not options.include_rejected:
            raise sample.rejection()
        return sample

    async def batch(
        self,
        model: ServedModel,
        seeds: Sequence[int],
        style_seeds: Sequence[int],
        options: SampleOptions,
        timeout_seconds: float | None = None,
    ) -> list[Sample]:
        """The samples of all seeds, in order, rejected ones included: the caller looks at `accepted`.

        `style_seeds` is empty, or holds one for each seed.
        """
        checked = check_batch(seeds)
        mixings = mixings_of(model, options, style_seeds, len(checked))
        gate = gate_of(model, options)
        deadline = self._deadline(timeout_seconds)
        with self._admitted(len(checked)) as party:
            tasks = [
                asyncio.create_task(self._mint(party, model, seed, mixing, gate, options, deadline))
                for seed, mixing in zip(checked, mixings, strict=True)
            ]
            try:
                return list(await asyncio.gather(*tasks))
            except BaseException:
                await _cancel(tasks)
                raise

    async def walk(
        self,
        model: ServedModel,
        walk: Walk,
        count: int,
        options: SampleOptions,
        window: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[Delivery, None]:
        """Deliver the samples of a walk in order, `count` of them or, when 0, to the last seed.

        Rejected samples are delivered only with `include_rejected`, and are counted either way. A delivery without a
        sample comes when none was delivered for HEARTBEAT_SECONDS, and at the end if the last seeds were rejected.
        `timeout_seconds` bounds the whole walk.
        """
        if count < 0:
            raise InvalidRequest("count", f"{count} is negative; give 0 for a walk without end")
        mixing = mixing_of(model, options)
        gate = gate_of(model, options)
        loop = asyncio.get_running_loop()
        deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        pipeline = _Pipeline(window_of(window, self._limits.max_window), count or None, options.include_rejected)
        party = Party("stream")
        seeds = walk.seeds()
        next_seed = told_seed = walk.start
        rejected = 0
        with self._registered(pipeline):
            try:
                told_at = loop.time()
                while pipeline.wanted > 0:
                    while len(pipeline.ahead) < pipeline.wanted and (seed := next(seeds, None)) is not None:
                        minting = self._mint(party, model, seed, mixing, gate, options, deadline)
                        pipeline.ahead.append(asyncio.create_task(minting))
                    if not pipeline.ahead:
                        break
                    first = pipeline.ahead[0]
                    if not first.done():
                        await asyncio.wait([first], timeout=max(0.0, told_at + HEARTBEAT_SECONDS - loop.time()))
                    done = first.done()
                    sample = first.result() if done else None
                    delivered = sample is not None and pipeline.delivers(sample)
                    if sample is not None:
                        next_seed = sample.seed + 1
                        rejected += not sample.accepted
                    if delivered or loop.time() - told_at >= HEARTBEAT_SECONDS:
                        yield Delivery(sample if delivered else None, next_seed, rejected)
                        told_seed, told_at = next_seed, loop.time()
                    if done:  # it counts as ahead until its reader has taken it
                        pipeline.ahead.popleft()
                    if delivered and pipeline.remaining is not None:
                        pipeline.remaining -= 1
                if next_seed != told_seed:
                    yield Delivery(None, next_seed, rejected)
            finally:
                await _cancel(list(pipeline.ahead))

    @contextmanager
    def _admitted(self, count: int) -> Iterator[Party]:
        """Take `count` places or raise Overloaded; a batch larger than the limit is admitted when it is alone."""
        admitted, limit = self._admitted_samples, self._limits.max_in_flight
        if admitted > 0 and admitted + count > limit:
            raise Overloaded(f"{admitted} samples are in flight and the limit is {limit}; try again in a second")
        self._admitted_samples += count
        try:
            yield Party("request")
        finally:
            self._admitted_samples -= count

    @contextmanager
    def _registered(self, pipeline: _Pipeline) -> Iterator[None]:
        limit = self._limits.max_streams
        if len(self._pipelines) >= limit:
            raise Overloaded(f"{limit} streams are open, which is the limit; try again later or on another replica")
        self._pipelines.add(pipeline)
        try:
            yield
        finally:
            self._pipelines.remove(pipeline)

    async def _mint(
        self,
        party: Party,
        model: ServedModel,
        seed: int,
        mixing: Mixing | None,
        gate: Gate,
        options: SampleOptions,
        deadline: float | None,
    ) -> Sample:
        outputs = options.outputs(model)

        async def mint(claim: Claim) -> dict[str, Array]:
            async with AsyncExitStack() as stack:
                with span("wait for slot"):
                    await stack.enter_async_context(self._slots.slot(claim))
                with self._metrics.samples_in_flight.track_inprogress():
                    latents = _latents(model, seed, mixing, gate)
                    seconds = None if claim.deadline is None else claim.deadline - asyncio.get_running_loop().time()
                    return await self._infer(model, latents, outputs, seconds)

        key = (model.digest, seed, mixing, gate.truncation_psi)
        arrays = await self._cache.get(key, outputs, Claim(party, deadline), mint)
        sample = Sample(
            model=model,
            seed=seed,
            mixing=mixing,
            gate=gate,
            image=arrays.get("image"),
            labels={name: arrays[name] for name in model.task.label_outputs if name in arrays},
            js_map=arrays.get("js_map"),
            js_score=float(arrays["js_score"][0]),
        )
        self._metrics.judged(model, gate.truncation_psi, mixing is not None, sample.js_score, sample.accepted)
        return sample

    async def _infer(
        self, model: ServedModel, latents: Latents, outputs: Sequence[str], timeout_seconds: float | None
    ) -> dict[str, Array]:
        """What Triton makes of one sample; raises ModelVersionGone where that is not, or no longer, this version's."""

        async def infer() -> dict[str, Array]:
            try:
                return await self._triton.infer(
                    model.triton_name, model.version, latents, outputs, timeout_seconds, digest=model.digest
                )
            except TritonUnavailable:
                await self.catalog.check_lost(model)
                raise

        arrays = await self._held(infer)
        self.catalog.check_pinned(model)
        return arrays

    async def _held(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call that needs Triton, which is tried again while Triton is away."""
        now = asyncio.get_running_loop().time
        end = now() + self._limits.capacity_wait_seconds
        while True:
            try:
                return await call()
            except TritonUnavailable:
                if now() + _RETRY_SECONDS > end:
                    raise
            await asyncio.sleep(_RETRY_SECONDS)

    def _deadline(self, timeout_seconds: float | None) -> float:
        """When a request ends at the latest, on the loop's clock; nothing waits for ever."""
        if timeout_seconds is None:
            timeout_seconds = DEFAULT_TIMEOUT_SECONDS + self._limits.capacity_wait_seconds
        return asyncio.get_running_loop().time() + timeout_seconds


def _latents(model: ServedModel, seed: int, mixing: Mixing | None, gate: Gate) -> Latents:
    latent = latent_of(seed, model.z_dim)
    if mixing is None:
        return Latents(latent, latent, model.num_ws, gate.truncation_psi)
    return Latents(latent, latent_of(mixing.style_seed, model.z_dim), mixing.crossover, gate.truncation_psi)


async def _cancel(tasks: Sequence[asyncio.Task[Sample]]) -> None:
    for task in tasks:
        task.cancel()
    # The outcomes of abandoned samples are of no interest, but they must have ended.
    await asyncio.gather(*tasks, return_exceptions=True)
