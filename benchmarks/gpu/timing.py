"""Times a call on the device, and reads the memory that it needs.

Rules of this file:
- On a GPU, CUDA events time each call; on a CPU, the clock does. A figure is never the difference of two figures.
- A first call allocates, compiles and chooses algorithms, so callers make one before they time.
- Memory is the most that torch's allocator held during a call. What other libraries allocate is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
ROUND_SECONDS = 0.05  # the calls of one arm in one round take about this long
MOST_CALLS = 20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], calls: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `calls` calls."""
    if device.type != "cuda":
        seconds = []
        for _ in range(calls):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return seconds
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    torch.cuda.synchronize(device)
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def calls_of_a_round(seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(ROUND_SECONDS / max(seconds, 1e-9))))


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, the 10th and 90th percentile, and the number of timed calls."""
    low, median, high = (float(np.percentile(seconds, at)) for at in (10, 50, 90))
    return {"median": median, "low": low, "high": high, "calls": len(seconds)}


def peak_bytes(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Return what a call returns, and the most bytes that it needs beyond those in use before it; None on a CPU."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    found = run()
    torch.cuda.synchronize(device)
    return found, int(torch.cuda.max_memory_allocated(device)) - before


def kernel_seconds(run: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Return the seconds that a call spends in each kernel, by the kernel's name; None without a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    calls = 3
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            run()
        torch.cuda.synchronize(device)
    by_name = {each.key: each.self_device_time_total / 1e6 / calls for each in found.key_averages()}
    longest = sorted(by_name, key=lambda name: -by_name[name])[:8]
    return {name[:100]: by_name[name] for name in longest if by_name[name] > 0}
