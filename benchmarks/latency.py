"""The latency of one replica of the real service, and whether the simulator reproduces it.

Rules of this file:
- One Triton and one gateway, the demo model `faces`, gRPC, raw pixels, no cache; everything is delivered.
- What the simulator is given: the seconds of each step by batch size, how much two batches at once slow each other
  down (both as Triton tells them, asked directly), and what a single call costs outside of the steps. It is measured
  before, amid and after the curve, since the machine changes its pace.
- What it must find is measured through the gateway: a closed loop at several concurrencies, and Poisson arrivals, which
  the simulator gets at the measured instants.
- A latency is that of a call as its client sees it; percentiles are over the calls after the first round of a loop.

Run it as `python benchmarks/latency.py` on an idle machine (8 minutes); it writes benchmarks/results/latency.json and
docs/images/latency.png.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import simpy
from direct import Direct
from serving import gateway, samples_of
from simulation.clients import Caller
from simulation.service import Gateway, Profile, Triton

from labelmint.gateway.calibrate import serving
from labelmint.models.annotations import write_json
from labelmint.settings import ServeSettings

ROOT = Path(__file__).parent.parent
REPOSITORY = ROOT / "model_repository"
RESULTS = ROOT / "benchmarks" / "results" / "latency.json"
MODEL = "faces"
BATCHES = (1, 2, 4, 8, 16)
PAIR = 8  # samples of each of two batches at once
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
LOADS = (0.3, 0.6, 0.8)  # of the rate at the largest concurrency
Figures = dict[str, Any]


async def batch(direct: Direct, count: int) -> list[float]:
    """Seconds of each step for one batch alone."""
    before = await direct.step_seconds()
    await direct.infer(range(count))
    after = await direct.step_seconds()
    return [end - start for start, end in zip(before, after, strict=True)]


async def pair(direct: Direct, rounds: int) -> list[float]:
    """Seconds of each step for a batch while two batches of PAIR samples are always there."""

    async def loop() -> None:
        for _ in range(rounds):
            await direct.infer(range(PAIR))

    before = await direct.step_seconds()
    await asyncio.gather(loop(), loop())
    after = await direct.step_seconds()
    return [(end - start) / (2 * rounds) for start, end in zip(before, after, strict=True)]


async def closed(call: load.Call, concurrency: int, rounds: int, seeds: Iterator[int]) -> Figures:
    """Callers that ask again as soon as they have their answer: (begin, end) of each call, in seconds."""
    run = await load.closed(call, concurrency, seeds, rounds=rounds)
    return {"concurrency": concurrency, "rounds": rounds, "calls": _rounded(run.calls)}


async def opened(call: load.Call, rate: float, count: int, random_seed: int, seeds: Iterator[int]) -> Figures:
    """Callers that come as a Poisson process of `rate` a second."""
    run = await load.opened(call, rate, count, seeds, random_seed)
    return {"rate": rate, "calls": _rounded(run.calls)}


def _rounded(calls: list[tuple[float, float]]) -> list[list[float]]:
    return [[round(begun, 4), round(ended, 4)] for begun, ended in sorted(calls)]


async def measure(scale: float) -> Figures:
    """Everything, with `scale` times the usual number of calls."""

    def times(count: int) -> int:
        return max(2, round(scale * count))

    found: Figures = {"batches": [], "outside": [], "pairs": [], "closed": [], "open": []}
    seeds = itertools.count()
    async with serving(REPOSITORY, MODEL) as (client, model):
        direct = Direct(client.url, model)

        async def alone(call: load.Call) -> None:
            for _ in range(times(3)):
                for size in BATCHES:
                    found["batches"].append({"size": size, "steps": await batch(direct, size)})
                before, started = sum(await direct.step_seconds()), time.perf_counter()
                await call(next(seeds))
                elapsed = time.perf_counter() - started
                found["outside"].append(elapsed - (sum(await direct.step_seconds()) - before))
            found["pairs"].append(await pair(direct, times(4)))

        await direct.infer(range(max(BATCHES)))
        with gateway("--triton-url", client.url) as served:
            async with samples_of(served.grpc, MODEL) as call:
                await call(next(seeds))
                await alone(call)
                for concurrency in CONCURRENCIES:
                    rounds = 1 + times(max(6, 40 // concurrency))
                    found["closed"].append(await closed(call, concurrency, rounds, seeds))
                await alone(call)
                capacity = throughput(found["closed"][-1])
                for number, share in enumerate(LOADS):
                    count = times(round(70 * share * capacity))
                    found["open"].append(await opened(call, share * capacity, count, number, seeds))
                await alone(call)
        await direct.close()
    return found


def profile_of(measured: Figures) -> Profile:
    """What the simulator is given, from the direct measurements: medians over all of their rounds."""

    def median(size: int, step: int) -> float:
        return float(np.median([each["steps"][step] for each in measured["batches"] if each["size"] == size]))

    seconds = [[median(size, step) for size in BATCHES] for step in (0, 1)]
    alone = [step[BATCHES.index(PAIR)] for step in seconds]
    shorter = alone.index(min(alone))
    # The shorter step always has the longer one beside it: what it takes longer then is what sharing costs.
    together = alone[shorter] / float(np.median([pair[shorter] for pair in measured["pairs"]]))
    return Profile.measured(list(BATCHES), seconds, min(1.0, together), float(np.median(measured["outside"])))


def latencies(run: Figures) -> list[float]:
    """Seconds of the calls that count, from a measured or a simulated run."""
    calls = run["calls"][run.get("concurrency", 0) :]
    return [ended - begun for begun, ended in calls]


def throughput(run: Figures) -> float:
    """Samples a second of a closed loop, after its first round."""
    ends = sorted(ended for _, ended in run["calls"])
    first = run["concurrency"]
    return (len(ends) - first) / (ends[-1] - ends[first - 1])


def simulate(profile: Profile, run: Figures) -> Figures:
    """The same calls against one simulated replica: a closed loop, or arrivals at the measured instants."""
    env = simpy.Environment()
    settings = ServeSettings(triton_url="simulated")
    served = Gateway(env, settings.triton_slots, settings.max_in_flight, settings.max_streams, 0.0)
    served.add(Triton(env, profile, served.finished))
    # What a call costs outside of the steps is mostly the gateway's one thread, before and after them.
    thread = simpy.Resource(env)
    calls: list[tuple[float, float]] = []

    def pass_through() -> Any:
        with thread.request() as turn:
            yield turn
            yield env.timeout(profile.outside_seconds / 2)

    def caller(begins: float, rounds: int) -> Any:
        yield env.timeout(begins)
        for _ in range(rounds):
            begun = env.now
            yield from pass_through()
            yield Caller(env, served).done
            yield from pass_through()
            calls.append((begun, env.now))

    if "concurrency" in run:
        processes = [env.process(caller(0.0, run["rounds"])) for _ in range(run["concurrency"])]
    else:
        processes = [env.process(caller(begun, 1)) for begun, _ in run["calls"]]
    env.run(until=env.all_of(processes))
    return run | {"calls": sorted(calls)}


def comparison(measured: Figures) -> list[Figures]:
    """For each run what was measured and what the simulator says: p50, p95 (seconds), samples a second."""
    profile = profile_of(measured)
    rows = []
    for run in [*measured["closed"], *measured["open"]]:
        row: Figures = {key: run[key] for key in ("concurrency", "rate") if key in run}
        for name, each in (("measured", run), ("simulated", simulate(profile, run))):
            p50, p95 = np.percentile(latencies(each), (50, 95)).tolist()
            ends = [ended for _, ended in each["calls"]]
            rate = throughput(each) if "concurrency" in each else len(ends) / max(ends)
            row[name] = {"p50": p50, "p95": p95, "samples_per_second": rate}
        rows.append(row)
    return rows


def plot(rows: list[Figures], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4))
    loops = [row for row in rows if "concurrency" in row]
    arrivals = [row for row in rows if "rate" in row]
    shown = (
        (panels[0], loops, "concurrency", "p50", "closed loop: median latency, s"),
        (panels[1], loops, "concurrency", "samples_per_second", "closed loop: samples a second"),
        (panels[2], arrivals, "rate", "p50", "Poisson arrivals: median latency, s"),
    )
    for panel, some, x, y, title in shown:
        for name, style in (("measured", "o"), ("simulated", "-")):
            panel.plot([row[x] for row in some], [row[name][y] for row in some], style, label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("callers" if x == "concurrency" else "arrivals a second")
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of calls")
    arguments = parser.parse_args()
    measured = asyncio.run(measure(arguments.scale))
    rows = comparison(measured)
    for row in rows:
        print(json.dumps(row))
    write_json(RESULTS, measured)
    plot(rows, ROOT / "docs" / "images" / "latency.png")


if __name__ == "__main__":
    main()
