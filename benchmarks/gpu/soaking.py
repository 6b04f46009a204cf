"""Runs the pair with labelmint's kernel for a minute and notes each second: samples, clocks, temperature and power.

Rules of this file:
- The clocks are read in a thread, so that reading them does not hold up the GPU.
- The first sample is drawn again at the end; its bytes must be the same.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from gpu import arms, checks, machine, timing
from gpu.cases import cases_of

PAIR = ("eager_tf32", "kernel_float16")
SECONDS = {True: 1.0, False: 60.0}  # by tiny
INTERVAL = {True: 0.25, False: 1.0}


def soak(device: torch.device, *, tiny: bool, seconds: float) -> dict[str, Any]:
    case = cases_of(tiny)[0]
    with tempfile.TemporaryDirectory() as files:
        bench = arms.Bench(case, device, Path(files))
    pair = arms.chained(arms.GENERATOR[PAIR[0]](bench), arms.INTERPRETER[PAIR[1]](bench))
    latents = case.latents(device)
    samples = [[x[row : row + 1] for x in latents] for row in range(len(latents[0]))]
    first = pair(samples[0])
    timing.synchronize(device)
    readings, stop = [], threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL[tiny]):
            readings.append({"second": time.monotonic() - started, **(machine.clocks(device) or {})})

    count, finished = 0, []  # the second at which each sample was complete
    started = time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        while time.monotonic() - started < min(SECONDS[tiny], seconds):
            pair(samples[count % len(samples)])
            timing.synchronize(device)
            count += 1
            finished.append(time.monotonic() - started)
    finally:
        stop.set()
        watcher.join()
    return {
        "case": case.name,
        "pair": arms.pair_name(*PAIR),
        "seconds": finished[-1],
        "samples_per_second": count / finished[-1],
        "by_interval": by_interval(finished, INTERVAL[tiny]),
        "clocks": readings
        if device.type == "cuda" and machine.clocks(device)
        else {"missing": "nvidia-smi is missing"},
        "same_bytes_at_the_end": checks.same_bytes(pair(samples[0]), first),
    }


def by_interval(finished: list[float], interval: float) -> list[float]:
    """Return the samples per second of each whole interval."""
    whole = int(finished[-1] / interval)
    counts = [0] * whole
    for second in finished:
        if second < whole * interval:
            counts[int(second / interval)] += 1
    return [count / interval for count in counts]
