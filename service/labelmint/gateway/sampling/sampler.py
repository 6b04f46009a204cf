"""The sampler, which the gRPC and REST servers call, and the only place that combines policy with Triton.

Rules of this file:
- Each seed is one Triton request. Triton's dynamic batcher forms the batches, and a sample never depends on its batch.
- A walk generates up to its window of samples ahead of its reader and delivers them in order. If the reader pauses, the
  walk stops too.
- Admission control: a request is refused beyond `max_in_flight` samples, a walk beyond `max_streams`. Admitted samples
  wait for a slot by fair queueing (`slots.py`), but no longer than their deadline.
- Only this file charges a caller with a token: a request before its samples are generated, a walk as it proceeds.
- While Triton is unavailable, a request waits up to `capacity_wait_seconds`. Its samples count as owed meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from labelmint.core.content import listed
from labelmint.core.errors import ContentNotFound, InvalidRequest, Overloaded, TritonUnavailable
from labelmint.core.policy import (
    Mixing,
    Outcome,
    SampleOptions,
    Terms,
    Walk,
    check_batch,
    check_seed,
    latent_of,
    mixing_of,
    mixings_of,
    terms_of,
    window_of,
)
from labelmint.core.served_model import ServedModel
from labelmint.gateway.sampling.access import current_caller
from labelmint.gateway.sampling.cache import Arrays, SampleCache
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.indexed import Indexed, SeedPage
from labelmint.gateway.sampling.inferences import Inferences
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sample import Delivery, Ignored, Sample
from labelmint.gateway.sampling.slots import KINDS, Model, Requester, Slots
from labelmint.triton.client import Latents, TritonClient

DEFAULT_TIMEOUT_SECONDS = 60.0  # of a request without a deadline
HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Limits:
    """The limits of admission control; ServeSettings describes the fields of these names."""

    max_in_flight: int
    triton_slots: int
    max_streams: int
    max_window: int
    max_empty_seeds: int
    capacity_wait_seconds: float


@dataclass(frozen=True)
class _Spec:
    """The inputs that determine a sample, and the terms on which it is delivered."""

    model: ServedModel
    seed: int
    mixing: Mixing | None
    terms: Terms

    @property
    def key(self) -> Hashable:
        """The cache key, which identifies the arrays of the sample."""
        return self.model.digest, self.model.executor, self.seed, self.mixing, self.terms.gate.truncation_psi

    def latents(self) -> Latents:
        z_dim, num_ws, psi = self.model.z_dim, self.model.num_ws, self.terms.gate.truncation_psi
        latent = latent_of(self.seed, z_dim)
        if self.mixing is None:
            return Latents(latent, latent, num_ws, psi)
        return Latents(latent, latent_of(self.mixing.style_seed, z_dim), self.mixing.crossover, psi)

    def sample(self, arrays: Arrays) -> Sample:
        terms, options = self.terms, self.terms.options
        quantile = options.ignore_js_quantile
        return Sample(
            model=self.model,
            seed=self.seed,
            mixing=self.mixing,
            terms=terms,
            image=arrays.get("image"),
            labels={} if options.omit_label else {name: arrays[name] for name in self.model.task.label_outputs},
            js_map=arrays["js_map"] if options.include_js_map else None,
            js_score=float(arrays["js_score"][0]),
            content=terms.conditions.measured(arrays),
            ignored=None if quantile is None else Ignored(arrays["js_map"], quantile),
        )


@dataclass(eq=False)
class _Pipeline:
    """The samples of one walk ahead of its reader, ordered by seed; `remaining` is None for a walk without a count."""

    window: int
    remaining: int | None
    ahead: deque[asyncio.Task[Sample]] = field(default_factory=deque)

    @property
    def wanted(self) -> int:
        """How many samples may be ahead, at most the rest of the count."""
        return self.window if self.remaining is None else min(self.window, self.remaining)

    @property
    def owed(self) -> int:
        """How many samples the reader could take but are not ready."""
        return self.wanted - sum(self._ready(task) for task in self.ahead)

    def fill(self, tasks: Iterator[asyncio.Task[Sample]]) -> bool:
        """Begin samples up to the window; returns whether there is a sample to wait for."""
        while len(self.ahead) < self.wanted and (task := next(tasks, None)) is not None:
            self.ahead.append(task)
        return self.wanted > 0 and bool(self.ahead)

    def taken(self, delivered: bool) -> None:
        """The reader has taken the first sample, or it was rejected or filtered."""
        self.ahead.popleft()
        if delivered and self.remaining is not None:
            self.remaining -= 1

    def _ready(self, task: asyncio.Task[Sample]) -> bool:
        return task.done() and not task.cancelled() and task.exception() is None and task.result().delivered


@dataclass
class _Progress:
    """How far a walk is: the counts since its start, and those since its last delivery or its last sample."""

    next_seed: int
    told: int  # next_seed of the last delivery
    rejected: int = 0
    filtered: int = 0
    unpaid: int = 0  # seeds since the last delivery
    empty: int = 0  # seeds since the last sample

    def pass_(self, seed: int, outcome: Outcome, delivered: bool) -> None:
        self.next_seed = seed + 1
        self.rejected += outcome == "rejected"
        self.filtered += outcome == "filtered"
        self.unpaid += 1
        self.empty = 0 if delivered else self.empty + 1

    def delivery(self, sample: Sample | None) -> Delivery:
        self.told, self.unpaid = self.next_seed, 0
        return Delivery(sample, self.next_seed, self.rejected, self.filtered)


class Sampler:
    def __init__(
        self,
        catalog: Catalog,
        triton: TritonClient,
        metrics: Metrics,
        *,
        cache: SampleCache,
        limits: Limits,
        index: Indexed | None = None,
    ) -> None:
        self.catalog = catalog
        self.index = index or Indexed()
        self._triton = triton
        self._metrics = metrics
        self._limits = limits
        self._slots = Slots(limits.triton_slots, lambda model: triton.room(*model))
        triton.on_more_room = self._slots.grant
        self._inferences = Inferences(self._slots, cache, metrics, hold_seconds=limits.capacity_wait_seconds)
        self._admitted_samples = 0
        self._owed_before_model = 0
        self._pipelines: set[_Pipeline] = set()
        metrics.demand.set_function(self.demand)
        for kind in KINDS:
            metrics.queue_depth.labels(kind).set_function(partial(self._slots.depth, kind))

    def demand(self) -> int:
        """Accepted samples owed to clients, as the help text of the metric defines it."""
        pipelines = sum(pipeline.owed for pipeline in self._pipelines)
        return self._owed_before_model + self._admitted_samples + pipelines

    async def find(self, name: str, version: str, owed: int = 1) -> ServedModel:
        """The model for a request of `owed` samples; the request waits while Triton is unavailable.

        Raises ModelNotFound, TritonUnavailable or Overloaded. A request for a model's description counts as one sample,
        because requests for samples usually follow. The demand then makes a cluster without a Triton start one.
        """
        limits = self._limits
        if self._owed_before_model > limits.max_in_flight + limits.max_streams * limits.max_window:
            raise Overloaded("too many samples are waiting for Triton already; try again later")
        self._owed_before_model += owed
        try:
            return await self._inferences.hold(lambda: self.catalog.get(name, version))
        finally:
            self._owed_before_model -= owed

    def owed_at_first(self, window: int, count: int) -> int:
        """How many samples a stream owes before its first one; raises InvalidRequest."""
        wanted = window_of(window, self._limits.max_window)
        return min(wanted, count) if count > 0 else wanted

    async def sample(
        self, model: ServedModel, seed: int, options: SampleOptions, *, timeout_seconds: float | None = None
    ) -> Sample:
        """The sample of one seed.

        Raises SampleRejected if the gate rejects it, unless `include_rejected` is set. Raises ContentMissing if it does
        not satisfy the conditions of the options.
        """
        _charge(1)
        spec = _Spec(model, check_seed(seed), mixing_of(model, options), terms_of(model, options))
        with self._admitted(model, 1) as requester:
            sample = await self._make(spec, requester, self._deadline(timeout_seconds))
        if (refusal := sample.refusal()) is not None:
            raise refusal
        return sample

    async def batch(
        self,
        model: ServedModel,
        seeds: Sequence[int],
        options: SampleOptions,
        *,
        style_seeds: Sequence[int] = (),
        timeout_seconds: float | None = None,
    ) -> list[Sample]:
        """The samples of all seeds, in order, with those that are rejected or filtered; the caller checks `refusal`.

        `style_seeds` is empty, or has one style seed per seed.
        """
        _charge(len(seeds))
        checked = check_batch(seeds)
        mixings = mixings_of(model, options, style_seeds, count=len(checked))
        terms, deadline = terms_of(model, options), self._deadline(timeout_seconds)
        with self._admitted(model, len(checked)) as requester:
            tasks = [
                asyncio.create_task(self._make(_Spec(model, seed, mixing, terms), requester, deadline))
                for seed, mixing in zip(checked, mixings, strict=True)
            ]
            try:
                return list(await asyncio.gather(*tasks))
            except BaseException:
                await _cancel(tasks)
                raise

    async def list_seeds(
        self,
        model: ServedModel,
        seeds: tuple[int, int],
        options: SampleOptions,
        *,
        page_size: int = 0,
        timeout_seconds: float | None = None,
    ) -> SeedPage:
        """A page of the seeds that a walk with these options delivers, as `Indexed.list`; nothing is charged for it."""
        timeout = DEFAULT_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
        self.index.report(self.catalog.known())
        return await self.index.list(model, seeds, options, page_size=page_size, timeout_seconds=timeout)

    async def walk(
        self,
        model: ServedModel,
        walk: Walk,
        options: SampleOptions,
        *,
        count: int,
        window: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[Delivery, None]:
        """Deliver the samples of a walk in order: `count` of them or, if `count` is 0, up to the last seed.

        Rejected samples are delivered only with `include_rejected`, and filtered ones never, but both are counted. A
        delivery without a sample is sent if none was delivered for HEARTBEAT_SECONDS, and at the end if the last seeds
        gave no sample. `timeout_seconds` bounds the whole walk. Raises ContentNotFound if the options have conditions
        and `max_empty_seeds` seeds in a row gave no sample.
        """
        if count < 0:
            raise InvalidRequest("count", f"{count} is negative; give 0 for no limit")
        pipeline = _Pipeline(window_of(window, self._limits.max_window), count or None)
        tasks = self._begin(model, walk, options, timeout_seconds=timeout_seconds)
        now = asyncio.get_running_loop().time
        progress = _Progress(walk.start, walk.start)
        with self._registered(pipeline):
            try:
                delivered_at = now()
                while pipeline.fill(tasks):
                    first = pipeline.ahead[0]
                    if not first.done():
                        await asyncio.wait([first], timeout=max(0.0, delivered_at + HEARTBEAT_SECONDS - now()))
                    done = first.done()
                    sample = first.result() if done else None
                    delivers = sample is not None and sample.delivered
                    if sample is not None:
                        progress.pass_(sample.seed, sample.outcome, delivers)
                    given_up = bool(options.where) and progress.empty >= self._limits.max_empty_seeds
                    if delivers or given_up or now() - delivered_at >= HEARTBEAT_SECONDS:
                        await _pace(progress.unpaid)
                        yield progress.delivery(sample if delivers else None)
                        delivered_at = now()
                    if given_up:
                        raise ContentNotFound(progress.empty, listed(options.where))
                    if done:  # the sample counts as ahead until the reader has taken it
                        pipeline.taken(delivers)
                if progress.next_seed != progress.told:
                    await _pace(progress.unpaid)
                    yield progress.delivery(None)
            finally:
                await _cancel(pipeline.ahead)

    def _begin(
        self, model: ServedModel, walk: Walk, options: SampleOptions, *, timeout_seconds: float | None
    ) -> Iterator[asyncio.Task[Sample]]:
        """The tasks of a walk, each created when the iterator reaches it; raises InvalidRequest at once."""
        mixing, terms = mixing_of(model, options), terms_of(model, options)
        deadline = None if timeout_seconds is None else asyncio.get_running_loop().time() + timeout_seconds
        requester = Requester("stream", _in_triton(model))
        return (
            asyncio.create_task(self._make(_Spec(model, seed, mixing, terms), requester, deadline))
            for seed in walk.seeds()
        )

    async def _make(self, spec: _Spec, requester: Requester, deadline: float | None) -> Sample:
        infer = partial(self._infer, spec)
        arrays = await self._inferences.get(
            spec.key, spec.terms.outputs, infer, model=spec.model.name, requester=requester, deadline=deadline
        )
        sample = spec.sample(arrays)
        mixed, psi = spec.mixing is not None, spec.terms.gate.truncation_psi
        self._metrics.judged(spec.model, psi, mixed, js_score=sample.js_score, outcome=sample.outcome)
        return sample

    async def _infer(self, spec: _Spec, timeout_seconds: float | None) -> Arrays:
        """Have Triton generate a sample; raises ModelVersionGone if Triton lacks this version with this digest."""
        model = spec.model
        try:
            with self._metrics.triton(model.name):
                arrays = await self._triton.infer(
                    model.triton_name,
                    model.version,
                    spec.latents(),
                    outputs=spec.terms.outputs,
                    timeout_seconds=timeout_seconds,
                    digest=model.digest,
                )
        except TritonUnavailable:
            await self.catalog.check_lost(model)
            raise
        self.catalog.check_pinned(model)
        return arrays

    @contextmanager
    def _admitted(self, model: ServedModel, count: int) -> Iterator[Requester]:
        """Admit `count` samples or raise Overloaded. A batch larger than the limit is admitted if it is alone."""
        admitted, limit = self._admitted_samples, self._limits.max_in_flight
        if admitted > 0 and admitted + count > limit:
            raise Overloaded(f"{admitted} samples are in flight and the limit is {limit}; try again in a second")
        self._admitted_samples += count
        try:
            yield Requester("request", _in_triton(model))
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

    def _deadline(self, timeout_seconds: float | None) -> float:
        """The deadline of a request on the loop's clock; every request has one, so none waits for ever."""
        if timeout_seconds is None:
            timeout_seconds = DEFAULT_TIMEOUT_SECONDS + self._limits.capacity_wait_seconds
        return asyncio.get_running_loop().time() + timeout_seconds


@dataclass(frozen=True)
class SamplingCore:
    """What both servers share. There is one per process, so limits, demand and metrics cover gRPC and REST together."""

    sampler: Sampler
    metrics: Metrics
    lifecycle: Lifecycle


def _in_triton(model: ServedModel) -> Model:
    return Model(model.triton_name, model.version, model.digest)


def _charge(samples: int) -> None:
    if (caller := current_caller.get()) is not None:
        caller.charge(samples)


async def _pace(samples: int) -> None:
    if (caller := current_caller.get()) is not None:
        await caller.pace(samples)


async def _cancel(tasks: Collection[asyncio.Task[Sample]]) -> None:
    for task in tasks:
        task.cancel()
    # Wait for the tasks to end, and ignore the outcomes of the abandoned samples.
    await asyncio.gather(*tasks, return_exceptions=True)
