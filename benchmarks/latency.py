"""Measures the latency of one replica of the real service, and whether the simulator reproduces it.

Rules of this file:
- The replica is one Triton and one gateway with the demo model `faces`, gRPC, raw pixels and no cache. Rejected samples
  are delivered too.
- The simulator's inputs are the seconds of each step by batch size, how much two concurrent batches slow each other
  down (both from Triton's statistics, without the gateway), and the cost of a single call outside of the steps.
- Its results are compared with measurements through the gateway: a closed loop at several concurrencies, and Poisson
  arrivals, which the simulator gets at the measured instants.
- The machine's speed changes within a minute. So each point of the curve is measured between two profiles and simulated
  with their mean. The figure is the ratio of simulated to measured within a round, as the median over the rounds.
- A latency is that of a call as its client sees it; percentiles are over the calls after the first round of a loop.

Run it as `python benchmarks/latency.py` on an idle machine (12 minutes; an interrupted run resumes); it writes
benchmarks/results/latency.json and docs/images/latency.png.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import load
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import resuming
import simpy
from direct import Direct
from serving import gateway, samples_of
from simulation.clients import Caller
from simulation.service import Gateway, Profile, Triton

from labelmint.gateway.process.settings import ServeSettings
from labelmint.models.annotations import write_json
from labelmint.pipeline import serving

ROOT = Path(__file__).parent.parent
REPOSITORY = ROOT / "model_repository"
RESULTS = ROOT / "benchmarks" / "results" / "latency.json"
MODEL = "faces"
BATCHES = (1, 2, 4, 8, 16)
PAIR = 8  # samples in each of two concurrent batches
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
LOADS = (0.3, 0.6, 0.8)  # of the rate at the largest concurrency
OPEN_SECONDS = 15.0
Figures = dict[str, Any]


async def batch(direct: Direct, count: int) -> list[float]:
    """Return the seconds of each step for one batch alone."""
    before = await direct.step_seconds()
    await direct.infer(range(count))
    after = await direct.step_seconds()
    return [end - start for start, end in zip(before, after, strict=True)]


async def pair(direct: Direct, rounds: int) -> list[float]:
    """Return the seconds of each step for a batch while two batches of PAIR samples always run."""

    async def loop() -> None:
        for _ in range(rounds):
            await direct.infer(range(PAIR))

    before = await direct.step_seconds()
    await asyncio.gather(loop(), loop())
    after = await direct.step_seconds()
    return [(end - start) / (2 * rounds) for start, end in zip(before, after, strict=True)]


async def closed(call: load.Call, concurrency: int, rounds: int, *, seeds: Iterator[int]) -> Figures:
    """Run a closed loop of callers. Returns (start, end) of each call, in seconds."""
    run = await load.closed(call, concurrency, seeds, rounds=rounds)
    return {"concurrency": concurrency, "rounds": rounds, "calls": _rounded(run.calls)}


async def opened(call: load.Call, rate: float, count: int, *, random_seed: int, seeds: Iterator[int]) -> Figures:
    """Run callers that arrive as a Poisson process of `rate` per second."""
    run = await load.opened(call, rate, count, seeds=seeds, random_seed=random_seed)
    return {"rate": rate, "calls": _rounded(run.calls)}


def _rounded(calls: list[tuple[float, float]]) -> list[list[float]]:
    return [[round(begun, 4), round(ended, 4)] for begun, ended in sorted(calls)]


async def profile(direct: Direct, call: load.Call, seeds: Iterator[int]) -> Figures:
    """Measure the simulator's inputs once: seconds of each step by batch size, of a pair, and outside of the steps."""
    batches = [await batch(direct, size) for size in BATCHES]
    outside = []
    for _ in range(2):
        before, started = sum(await direct.step_seconds()), time.perf_counter()
        await call(next(seeds))
        elapsed = time.perf_counter() - started
        outside.append(elapsed - (sum(await direct.step_seconds()) - before))
    return {"batches": batches, "outside": min(outside), "pair": await pair(direct, 1)}


async def one_round() -> Figures:
    """Measure every point of the curve once, in order: points[i] lies between profiles[i] and profiles[i + 1]."""
    seeds = itertools.count()
    found: Figures = {"profiles": [], "points": []}
    async with serving(REPOSITORY, MODEL) as (client, model):
        direct = Direct(client.url, model)
        await direct.infer(range(max(BATCHES)))
        with gateway("--triton-url", client.url) as served:
            async with samples_of(served.grpc, MODEL) as call:
                await call(next(seeds))
                found["profiles"].append(await profile(direct, call, seeds))
                for concurrency in CONCURRENCIES:
                    found["points"].append(await closed(call, concurrency, 1 + max(3, 16 // concurrency), seeds=seeds))
                    found["profiles"].append(await profile(direct, call, seeds))
                capacity = throughput(found["points"][-1])
                for index, share in enumerate(LOADS):
                    count = round(OPEN_SECONDS * share * capacity)
                    point = await opened(call, share * capacity, count, random_seed=index, seeds=seeds)
                    found["points"].append(point | {"load": share})
                    found["profiles"].append(await profile(direct, call, seeds))
        await direct.close()
    return found


def profile_of(before: Figures, after: Figures) -> Profile:
    """Return the simulator's profile for a point between two measured profiles: their mean."""

    def mean(key: str) -> Any:
        return np.mean([before[key], after[key]], axis=0)

    seconds = mean("batches").T.tolist()  # [step][size]
    alone = [step[BATCHES.index(PAIR)] for step in seconds]
    shorter = alone.index(min(alone))
    # The longer step always runs at the same time as the shorter one, so the shorter one's extra time is the cost of
    # sharing.
    together = alone[shorter] / float(mean("pair")[shorter])
    return Profile.measured(list(BATCHES), seconds, min(1.0, together), outside_seconds=float(mean("outside")))


def latencies(run: Figures) -> list[float]:
    """Return the seconds of the calls that count, from a measured or a simulated run."""
    calls = run["calls"][run.get("concurrency", 0) :]
    return [ended - begun for begun, ended in calls]


def throughput(run: Figures) -> float:
    """Return samples per second of a closed loop, after its first round."""
    ends = sorted(ended for _, ended in run["calls"])
    first = run["concurrency"]
    return (len(ends) - first) / (ends[-1] - ends[first - 1])


def simulate(profile: Profile, run: Figures) -> Figures:
    """Run the same calls against one simulated replica: a closed loop, or arrivals at the measured instants."""
    env = simpy.Environment()
    settings = ServeSettings(triton_url="simulated")
    served = Gateway(
        env, settings.triton_slots, settings.max_in_flight, max_streams=settings.max_streams, capacity_wait_seconds=0.0
    )
    served.add(Triton(env, profile, served.finished))
    # The cost of a call outside of the steps is mostly time in the gateway's single thread, before and after them.
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


def comparison(rounds: Sequence[Figures]) -> list[Figures]:
    """Return the measured and the simulated figures of each point: p50, p95 (seconds), samples per second.

    They are medians over the rounds; `ratio` is simulated to measured within a round.
    """
    rows = []
    for index, first in enumerate(rounds[0]["points"]):
        found: dict[str, list[Figures]] = {"measured": [], "simulated": []}
        for each in rounds:
            run, around = each["points"][index], each["profiles"][index : index + 2]
            found["measured"].append(figures_of(run))
            found["simulated"].append(figures_of(simulate(profile_of(*around), run)))
        row: Figures = {key: first[key] for key in ("concurrency", "load") if key in first}
        row |= {name: _over_rounds(list(some)) for name, some in found.items()}
        pairs = zip(found["simulated"], found["measured"], strict=True)
        row["ratio"] = _over_rounds([{key: ours[key] / real[key] for key in real} for ours, real in pairs])
        rows.append(row)
    return rows


def figures_of(run: Figures) -> Figures:
    p50, p95 = np.percentile(latencies(run), (50, 95)).tolist()
    ends = [ended for _, ended in run["calls"]]
    return {
        "p50": p50,
        "p95": p95,
        "samples_per_second": throughput(run) if "concurrency" in run else len(ends) / max(ends),
    }


def _over_rounds(some: list[Figures]) -> Figures:
    return {key: float(np.median([each[key] for each in some])) for key in some[0]}


def plot(rows: list[Figures], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4))
    loops = [row for row in rows if "concurrency" in row]
    arrivals = [row for row in rows if "load" in row]
    shown = (
        (panels[0], loops, "concurrency", "p50", "closed loop: median latency, s"),
        (panels[1], loops, "concurrency", "samples_per_second", "closed loop: samples a second"),
        (panels[2], arrivals, "load", "p50", "Poisson arrivals: median latency, s"),
    )
    for panel, some, x, y, title in shown:
        for name, style in (("measured", "o"), ("simulated", "-")):
            panel.plot([row[x] for row in some], [row[name][y] for row in some], style, label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("callers" if x == "concurrency" else "arrivals, of the rate with 32 callers")
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    resuming.add_arguments(parser)
    arguments = parser.parse_args()
    models = [path for path in REPOSITORY.glob(f"{MODEL}*/**/*") if path.is_file()]
    fingerprint = resuming.digest_of([*models, *resuming.serving_code()])
    parts = {"curve": lambda: asyncio.run(one_round())}
    measured = resuming.measured("latency", fingerprint, parts, rounds=arguments.rounds, budget=arguments.budget)
    rounds = [each["curve"] for each in measured]
    rows = comparison(rounds)
    for row in rows:
        print(json.dumps(row))
    write_json(RESULTS, {"rounds": rounds})
    plot(rows, ROOT / "docs" / "images" / "latency.png")


if __name__ == "__main__":
    main()
