"""Load for a service, from one event loop: callers that ask again at once, or arrivals as a Poisson process.

Rules of this file:
- A call is asked for by seed, and each call gets another one.
- Times are seconds from the start of a load; a latency is that of a call as its caller sees it.
- A rate is all answers over the time from the start to the last of them: the machine is busy all that time.
- What a call raises ends the load, unless it is one of the errors that are to be counted.
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
Span = tuple[float, float]  # begin and end
Errors = tuple[type[Exception], ...]
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}


@dataclass
class Run:
    """The calls that were answered, in the order of their ends, and the names of the errors of the others."""

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
    """Callers that ask again as soon as they have their answer.

    A caller goes on until the seconds have passed, so many answers (or errors that are counted) have come to all, and
    it has made so many rounds itself. With `drain` the calls that are still under way are waited for, else given up.
    """
    run, origin, over = Run(), time.perf_counter(), asyncio.Event()

    def done(made: int) -> bool:
        ended = len(run.calls) + run.failures.total()
        return made >= rounds and ended >= answers and time.perf_counter() - origin >= seconds

    async def caller() -> None:
        made = 0
        while not done(made):
            await _timed(call, next(seeds), run, origin, counted)
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
    call: Call, rate: float, count: int, seeds: Iterator[int], random_seed: int, counted: Errors = ()
) -> Run:
    """`count` callers that come as a Poisson process of `rate` a second."""
    gaps = np.random.default_rng(random_seed).exponential(1 / rate, count)
    run, origin = Run(), time.perf_counter()

    async def caller(at: float) -> None:
        await asyncio.sleep(at - (time.perf_counter() - origin))
        await _timed(call, next(seeds), run, origin, counted)

    await asyncio.gather(*(caller(at) for at in np.cumsum(gaps)))
    return run


async def _timed(call: Call, seed: int, run: Run, origin: float, counted: Errors) -> None:
    begun = time.perf_counter() - origin
    try:
        await call(seed)
    except counted as error:
        run.failures[type(error).__name__] += 1
    else:
        run.calls.append((begun, time.perf_counter() - origin))


def figures(run: Run, first_round: int = 0) -> dict[str, Any]:
    """Samples a second, and percentiles of a call in seconds.

    Percentiles are over the calls that began after the first `first_round`, where there are any: those came all at
    once, which callers of a loop do only once.
    """
    if not run.calls:
        raise ValueError(f"no call was answered: {dict(run.failures)}")
    calls = sorted(run.calls)
    latencies = [ended - begun for begun, ended in calls[first_round:] or calls]
    found: dict[str, Any] = {"samples_per_second": len(calls) / max(ended for _, ended in calls)}
    found |= dict(zip(PERCENTILES, np.percentile(latencies, list(PERCENTILES.values())).tolist(), strict=True))
    return found | {"answers": len(calls), "failures": dict(run.failures)}


def spread(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    """Of one figure a round: the median, the least and the most."""
    return {"median": float(np.median(values)), "least": float(np.min(values)), "most": float(np.max(values))}
