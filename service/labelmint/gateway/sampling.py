"""The sampling core: what both wire adapters call, and the only place where policy and Triton meet.

Rules of this file:
- Each seed is one Triton request; Triton's dynamic batcher makes the batches, and a sample never depends on them.
- A walk keeps at most `WINDOW` samples in flight ahead of its reader and delivers them in order; a reader who
  pauses stops the walk, and leaving the generator cancels what is in flight.
- Admission is bounded: beyond `max_in_flight` samples a single request is refused, not queued. Walks wait their turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from labelmint.errors import InvalidRequest, Overloaded, SampleRejected
from labelmint.gateway.catalog import Catalog
from labelmint.gateway.metrics import Metrics
from labelmint.gateway.policy import (
    SEED_END,
    Gate,
    SampleOptions,
    Walk,
    check_batch,
    check_seed,
    gate_of,
    latent_of,
)
from labelmint.gateway.served_model import ServedModel
from labelmint.triton.client import Array, Latents, TritonClient

WINDOW = 8


@dataclass(frozen=True)
class Sample:
    """One seed's outcome: image uint8 [R,R,3], label uint8 [R,R], js_map float32 [R,R] or None."""

    model: ServedModel
    seed: int
    gate: Gate
    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    js_map: npt.NDArray[np.float32] | None
    js_score: float

    @property
    def accepted(self) -> bool:
        return self.gate.accepts(self.js_score)

    def rejection(self) -> SampleRejected:
        return SampleRejected(self.seed, self.js_score, self.gate.threshold, self.gate.calibration_id)


@dataclass(frozen=True)
class Delivery:
    """One sample of a walk with the cursor after it."""

    sample: Sample
    next_seed: int
    rejected_count: int


class Sampler:
    def __init__(self, catalog: Catalog, triton: TritonClient, metrics: Metrics, max_in_flight: int) -> None:
        self.catalog = catalog
        self._triton = triton
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._admissions = 0
        self._slots = asyncio.Semaphore(max_in_flight)

    async def sample(
        self, model: ServedModel, seed: int, options: SampleOptions, timeout_seconds: float | None = None
    ) -> Sample:
        """The sample of one seed; raises SampleRejected unless it is accepted or `include_rejected` is set."""
        check_seed(seed)
        gate = gate_of(model, options)
        with self._admitted(1):
            sample = await self._mint(model, seed, gate, options.include_js_map, timeout_seconds)
        if not sample.accepted and not options.include_rejected:
            raise sample.rejection()
        return sample

    async def batch(
        self, model: ServedModel, seeds: Sequence[int], options: SampleOptions, timeout_seconds: float | None = None
    ) -> list[Sample]:
        """The samples of all seeds, in order, rejected ones included: the caller looks at `accepted`."""
        checked = check_batch(seeds)
        gate = gate_of(model, options)
        with self._admitted(len(checked)):
            tasks = [
                asyncio.create_task(self._mint(model, seed, gate, options.include_js_map, timeout_seconds))
                for seed in checked
            ]
            try:
                return list(await asyncio.gather(*tasks))
            except BaseException:
                await _cancel(tasks)
                raise

    async def walk(
        self, model: ServedModel, walk: Walk, count: int, options: SampleOptions
    ) -> AsyncGenerator[Delivery, None]:
        """Deliver the samples of a walk in order, `count` of them or, when 0, to the last seed.

        Rejected samples are delivered only with `include_rejected`, and are counted either way.
        """
        if count < 0:
            raise InvalidRequest("count", f"{count} is negative; give 0 for a walk without end")
        gate = gate_of(model, options)
        seeds = walk.seeds()
        window: deque[asyncio.Task[Sample]] = deque()
        delivered = rejected = 0
        try:
            while count == 0 or delivered < count:
                # Never more ahead than could still be asked for.
                ahead = WINDOW if count == 0 else min(WINDOW, count - delivered)
                while len(window) < ahead and (seed := next(seeds, None)) is not None:
                    window.append(asyncio.create_task(self._mint(model, seed, gate, options.include_js_map, None)))
                if not window:
                    return
                sample = await window[0]
                window.popleft()
                rejected += not sample.accepted
                if sample.accepted or options.include_rejected:
                    delivered += 1
                    yield Delivery(sample, min(sample.seed + 1, SEED_END), rejected)
        finally:
            await _cancel(list(window))

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        """Take `count` places or raise Overloaded; a batch larger than the limit is admitted when it is alone."""
        if self._admissions > 0 and self._admissions + count > self._max_in_flight:
            raise Overloaded(
                f"{self._admissions} samples are in flight and the limit is {self._max_in_flight}; "
                "try again in a second"
            )
        self._admissions += count
        try:
            yield
        finally:
            self._admissions -= count

    async def _mint(
        self, model: ServedModel, seed: int, gate: Gate, with_js_map: bool, timeout_seconds: float | None
    ) -> Sample:
        async with self._slots:
            with self._metrics.samples_in_flight.track_inprogress():
                arrays = await self._infer(model, seed, gate, with_js_map, timeout_seconds)
        sample = Sample(
            model=model,
            seed=seed,
            gate=gate,
            image=arrays["image"],
            label=arrays["label"],
            js_map=arrays.get("js_map"),
            js_score=float(arrays["js_score"][0]),
        )
        self._metrics.samples.labels(model.name, "accepted" if sample.accepted else "rejected").inc()
        self._metrics.js_score.labels(model.name).observe(sample.js_score)
        return sample

    async def _infer(
        self, model: ServedModel, seed: int, gate: Gate, with_js_map: bool, timeout_seconds: float | None
    ) -> dict[str, Array]:
        latent = latent_of(seed, model.z_dim)
        outputs = ["image", "label", "js_score", *(["js_map"] if with_js_map else [])]
        latents = Latents(latent, latent, model.num_ws, gate.truncation_psi)
        return await self._triton.infer(model.triton_name, model.version, latents, outputs, timeout_seconds)


async def _cancel(tasks: Sequence[asyncio.Task[Sample]]) -> None:
    for task in tasks:
        task.cancel()
    # The outcomes of abandoned samples are of no interest, but they must have ended.
    await asyncio.gather(*tasks, return_exceptions=True)
