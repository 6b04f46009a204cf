"""Generates load from one event loop: a closed loop of callers, or arrivals as a Poisson process.

Rules of this file:
- Each call gets the next seed.
- Times are seconds from the start of a load. A latency is that of a call as its caller sees it.
- A rate is the number of answers over the time from the start to the last answer: the machine is busy all that time.
- An exception of a call ends the load, unless it is one of the errors to count.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Call = Callable[[int], Awaitable[object]]
Span = tuple[float, float]  # start and end
Errors = tuple[type[Exception], ...]
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}


@dataclass
class Run:
    """The answered calls, in the order of their ends, and the names of the errors of the others."""

    calls: list[Span] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


async def closed(
    call: Call,
    concurrency: int,
    seeds: Iterator[int],
    *,
    seconds: float = 0.0,
    answers: int = 0,
    rounds: int = 0,
    drain: bool = True,
    counted: Errors = (),
) -> Run:
    """Run callers that send the next request as soon as they have an answer.

    A caller continues until `seconds` have passed, all callers together have `answers` answers (or counted errors), and
    it has made `rounds` calls itself. With `drain`, waits for the calls in progress; otherwise cancels them.
    """
    run, origin, over = Run(), time.perf_counter(), asyncio.Event()

    def done(made: int) -> bool:
        ended = len(run.calls) + run.failures.total()
        return made >= rounds and ended >= answers and time.perf_counter() - origin >= seconds

    async def caller() -> None:
        made = 0
        while not done(made):
            await _timed(call, next(seeds), run, origin=origin, counted=counted)
            made += 1
        over.set()

    callers = asyncio.gather(*(caller() for _ in range(concurrency)))
    if not drain:
        told = asyncio.ensure_future(over.wait())
        await asyncio.wait((callers, told), return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if over.is_set():
            callers.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await callers
            return run
    await callers
    return run


async def opened(
    call: Call, rate: float, count: int, *, seeds: Iterator[int], random_seed: int, counted: Errors = ()
) -> Run:
    """Run `count` callers that arrive as a Poisson process of `rate` per second."""
    gaps = np.random.default_rng(random_seed).exponential(1 / rate, count)
    run, origin = Run(), time.perf_counter()

    async def caller(at: float) -> None:
        await asyncio.sleep(at - (time.perf_counter() - origin))
        await _timed(call, next(seeds), run, origin=origin, counted=counted)

    await asyncio.gather(*(caller(at) for at in np.cumsum(gaps)))
    return run


async def _timed(call: Call, seed: int, run: Run, *, origin: float, counted: Errors) -> None:
    begun = time.perf_counter() - origin
    try:
        await call(seed)
    except counted as error:
        run.failures[type(error).__name__] += 1
    else:
        run.calls.append((begun, time.perf_counter() - origin))


def figures(run: Run, first_round: int = 0) -> dict[str, Any]:
    """Return samples per second, and percentiles of a call in seconds.

    Percentiles leave out the first `first_round` calls, if there are others: these start all at once, which happens in
    a loop only at the beginning.
    """
    if not run.calls:
        raise ValueError(f"no call was answered: {dict(run.failures)}")
    calls = sorted(run.calls)
    latencies = [ended - begun for begun, ended in calls[first_round:] or calls]
    found: dict[str, Any] = {"samples_per_second": len(calls) / max(ended for _, ended in calls)}
    found |= dict(zip(PERCENTILES, np.percentile(latencies, list(PERCENTILES.values())).tolist(), strict=True))
    return found | {"answers": len(calls), "failures": dict(run.failures)}


def spread(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    """Return the median, the least and the most of a figure with one value per round."""
    return {"median": float(np.median(values)), "least": float(np.min(values)), "most": float(np.max(values))}
