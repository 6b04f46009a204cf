"""Measures the cost of the servers: the demo through the gateway (gRPC, REST), from Triton, and in a bare process.

Rules of this file:
- The demo model `faces` is served with raw pixels and no cache; rejected samples are delivered too. One Triton, one
  gateway, and one process that runs the two ONNX files without a server (`in_process.py`) are separate processes. The
  load runs in this process.
- Closed loops run at several concurrencies. A measurement lasts its seconds and at least until there are as many
  answers as callers, then waits for the calls in progress. Percentiles are over the calls after the first round of a
  loop.
- Then come Poisson arrivals at a share of the lowest rate of the served ways with 16 callers in the same round.
- The ways take turns, and each round begins with another one. A ratio is taken within a round; the reported figure is
  the median over the rounds.

Run it as `python benchmarks/tax.py` on an idle machine (two minutes per round; `--rounds 1` adds one round to the
stored ones, after it finished an interrupted one); it writes benchmarks/results/tax.json and docs/images/tax.png.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import floor
import grpc.aio
import httpx
import in_process
import load
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import resuming
from direct import Direct
from load import Call, Run, spread
from resuming import ROOT, Figures, rotated
from serving import PATIENCE_SECONDS, Served, gateway, samples_of
from tritonclient.utils import InferenceServerException

from labelmint.core.served_model import ServedModel
from labelmint.pipeline import serving

RESULTS = ROOT / "benchmarks" / "results" / "tax.json"
PICTURE = ROOT / "docs" / "images" / "tax.png"
REPOSITORY = ROOT / "model_repository"
MODEL = "faces"
GRPC, REST, TRITON, BARE = "gateway gRPC", "gateway REST", "Triton", "in-process"
SERVED = (GRPC, REST, TRITON)
WAYS = (*SERVED, BARE)
CONCURRENCIES = (1, 4, 16, 64)
SECONDS = 4.0  # of each measurement, at least
JUDGED = 16  # the concurrency whose rate the arrivals follow
SHARE = 0.6  # of that rate
ARRIVAL_PIECES = 2  # arrivals last this many times the seconds
# Targets: the least ratio of samples per second of the first way to the second.
BARS = {(GRPC, TRITON): 0.95, (TRITON, BARE): 0.90}
RATIOS = (*BARS, (REST, TRITON))
COUNTED = (grpc.aio.AioRpcError, httpx.HTTPError, InferenceServerException)


def arrivals_of(way: str) -> str:
    """Return the name of a way's part with Poisson arrivals."""
    return f"{way}, arrivals"


PARTS = (*WAYS, *map(arrivals_of, SERVED))


@contextlib.asynccontextmanager
async def over_rest(served: Served) -> AsyncIterator[Call]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=served.http, timeout=PATIENCE_SECONDS, limits=limits) as client:

        async def ask(seed: int) -> None:
            path = f"/v1/models/{MODEL}/samples/{seed}"
            (await client.get(path, params={"encoding": "raw", "include_rejected": "true"})).raise_for_status()

        yield ask


@contextlib.asynccontextmanager
async def over_triton(url: str, model: ServedModel) -> AsyncIterator[Call]:
    direct = Direct(url, model)
    try:
        yield lambda seed: direct.infer([seed])
    finally:
        await direct.close()


@contextlib.contextmanager
def bare_process() -> Iterator[subprocess.Popen[str]]:
    """Run `in_process.py` with the model, warmed up."""
    command = [sys.executable, in_process.__file__, str(REPOSITORY), MODEL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"{command} did not start")
            yield process
        finally:
            process.terminate()


async def told(process: subprocess.Popen[str], seconds: float, callers: int, *, first_seed: int) -> Run:
    """Run a closed loop in the bare process."""
    assert process.stdin is not None and process.stdout is not None
    asked = {"callers": callers, "seconds": seconds, "answers": callers, "first_seed": first_seed}
    print(json.dumps(asked), file=process.stdin, flush=True)
    line = await asyncio.to_thread(process.stdout.readline)
    return Run([(begun, ended) for begun, ended in json.loads(line)])


async def measure(kept: resuming.Kept, rounds: int, seconds: float) -> None:
    """Add `rounds` rounds, with measurements of `seconds` seconds."""
    seeds = itertools.count()
    async with contextlib.AsyncExitStack() as stack:
        client, model = await stack.enter_async_context(serving(REPOSITORY, MODEL))
        served = stack.enter_context(gateway("--triton-url", client.url))
        bare = stack.enter_context(bare_process())
        calls = {
            GRPC: await stack.enter_async_context(samples_of(served.grpc, MODEL)),
            REST: await stack.enter_async_context(over_rest(served)),
            TRITON: await stack.enter_async_context(over_triton(client.url, model)),
        }
        for call in calls.values():
            await load.closed(call, JUDGED, seeds, rounds=1)  # warms up

        async def loops(way: str) -> Figures:
            found: Figures = {}
            for callers in CONCURRENCIES:
                if way == BARE:
                    run = await told(bare, seconds, callers, first_seed=next(seeds))
                else:
                    run = await load.closed(
                        calls[way], callers, seeds, seconds=seconds, answers=callers, counted=COUNTED
                    )
                found[str(callers)] = load.figures(run, first_round=callers)
            return found

        async def arrivals(way: str, rate: float, index: int) -> Figures:
            count = max(1, round(rate * ARRIVAL_PIECES * seconds))
            return {"rate": rate} | load.figures(
                await load.opened(calls[way], rate, count, seeds=seeds, random_seed=index, counted=COUNTED)
            )

        for _ in range(rounds):
            index, done = kept.begin(PARTS)
            for way in rotated(WAYS, index):
                if way not in done:
                    started = time.monotonic()
                    kept.keep(index, way, await loops(way))
                    _say(index, way, done[way], started=started)
            rate = SHARE * min(done[way][str(JUDGED)]["samples_per_second"] for way in SERVED)
            for way in rotated(SERVED, index):
                if arrivals_of(way) not in done:
                    started = time.monotonic()
                    kept.keep(index, arrivals_of(way), await arrivals(way, rate, index))
                    _say(index, arrivals_of(way), {f"{rate:.1f}/s": done[arrivals_of(way)]}, started=started)


def _say(index: int, part: str, found: Figures, *, started: float) -> None:
    rates = ", ".join(f"{each['samples_per_second']:.2f} at {load}" for load, each in found.items())
    print(f"round {index + 1}, {part}: {rates} samples/s ({time.monotonic() - started:.0f} s)", flush=True)


def summary(rounds: list[dict[str, Figures]]) -> Figures:
    """Return medians over the rounds of each way's figures, and of the ratios within the rounds."""
    keys = ("samples_per_second", *load.PERCENTILES)

    def over_rounds(found: list[Figures]) -> Figures:
        return {key: spread([each[key] for each in found]) for key in keys} | {
            "failures": sum(sum(each["failures"].values()) for each in found)
        }

    ratios: Figures = {}
    for one, other in RATIOS:
        ratios[f"{one} to {other}"] = {
            "bar": BARS.get((one, other)),
            "by_concurrency": {
                callers: spread(
                    [
                        each[one][callers]["samples_per_second"] / each[other][callers]["samples_per_second"]
                        for each in rounds
                    ]
                )
                for callers in map(str, CONCURRENCIES)
            },
        }
    return {
        "rounds": len(rounds),
        "cores": floor.available_cores(),
        "closed": {
            way: {callers: over_rounds([each[way][callers] for each in rounds]) for callers in map(str, CONCURRENCIES)}
            for way in WAYS
        },
        "ratios": ratios,
        "arrivals": {
            "share": SHARE,
            "callers": JUDGED,
            "rate": spread([each[arrivals_of(GRPC)]["rate"] for each in rounds]),
            "ways": {way: over_rounds([each[arrivals_of(way)] for each in rounds]) for way in SERVED},
        },
    }


def plot(found: Figures, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6))
    colours = dict(zip(WAYS, ("C0", "C1", "C2", "black"), strict=True))
    for panel, key, title in (
        (panels[0], "samples_per_second", "closed loop: samples a second"),
        (panels[1], "p95", "closed loop: p95 of a call, s"),
    ):
        for way, by_callers in found["closed"].items():
            x = [int(callers) for callers in by_callers]
            y, low, high = ([each[key][which] for each in by_callers.values()] for which in ("median", "least", "most"))
            error = [[m - a for m, a in zip(y, low, strict=True)], [b - m for m, b in zip(y, high, strict=True)]]
            style = "--" if way == BARE else "-"
            panel.errorbar(x, y, yerr=error, fmt="o", ls=style, capsize=2, color=colours[way], label=way)
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, list(map(str, x)))
        panel.set_xlabel("callers")
        panel.set_title(title, fontsize=9)
    for index, (way, each) in enumerate(found["arrivals"]["ways"].items()):
        for place, key in enumerate(load.PERCENTILES):
            one = each[key]
            error = [[one["median"] - one["least"]], [one["most"] - one["median"]]]
            panels[2].bar(place + 0.25 * index, one["median"], 0.23, yerr=error, color=colours[way], capsize=2)
    panels[2].set_xticks([0.25 + place for place in range(len(load.PERCENTILES))], list(load.PERCENTILES))
    panels[2].set_title(f"Poisson, {found['arrivals']['rate']['median']:.1f} a second: a call, s", fontsize=9)
    for panel in panels:
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds to add to the stored ones")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="seconds of each measurement, at least")
    arguments = parser.parse_args()
    files = [*resuming.serving_code(), *(Path(module.__file__) for module in (load, in_process))]
    files += [path for path in REPOSITORY.rglob("*") if path.is_file()]
    kept = resuming.Kept("tax", resuming.digest_of(files, arguments.seconds))
    asyncio.run(measure(kept, arguments.rounds, arguments.seconds))
    found = summary(kept.complete(PARTS))
    resuming.write(RESULTS, found)
    plot(found, PICTURE)
    for way, by_callers in found["closed"].items():
        for callers, each in by_callers.items():
            tails = ", ".join(f"{key} {each[key]['median']:.2f} s" for key in load.PERCENTILES)
            print(f"{way}, {callers} callers: {each['samples_per_second']['median']:.2f} samples/s, {tails}")
    for name, ratio in found["ratios"].items():
        cells = ", ".join(f"{each['median']:.3f} at {callers}" for callers, each in ratio["by_concurrency"].items())
        print(f"{name}: {cells}" + (f"; target: {ratio['bar']}" if ratio["bar"] else ""))
    print(f"in {found['rounds']} rounds")


if __name__ == "__main__":
    main()
