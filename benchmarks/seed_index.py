"""Measures what an index of seeds costs a gateway and what it spares: 10 million seeds of 18 classes.

Rules of this file:
- The model is that of `content_model.py`, which computes almost nothing: a sample's time is the gateway's.
- One Triton serves two gateways, with the index and without. They take turns in each round; figures are medians over
  the rounds, and ratios are taken within a round.
- The time of a start is from the command to the first answer of REST, and what the index adds is the difference of the
  two gateways. Memory is the resident set of the gateway at the end, after every list and stream, and the difference is
  between the two gateways, which served the same streams.
- The first list decodes what it needs from the files; the second one finds it in memory.
- Executions are what Triton counts between the start and the end of one stream of `common`.

Run it as `python benchmarks/seed_index.py` on an idle machine (8 minutes, 2 of them for the index, which is kept in
build/); it writes benchmarks/results/seed_index.json and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import content_model
import floor
import numpy as np
import resuming
from content_model import COMMON, MODEL, SCARCE
from load import spread
from resuming import BUILD, ROOT, Figures
from serving import Served, gateway

from labelmint.core.executor import ONNXRUNTIME
from labelmint.seed_index.layout import Described
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint_client import Client, SampleOptions

RESULTS = ROOT / "benchmarks" / "results" / "seed_index.json"
SEEDS = 10_000_000
TRUE_SEEDS = 500_000
LISTED = 1_000_000
STREAMED = 2_000  # samples of a stream, at 50 seeds for each
FIRSTS = 20  # first samples, of each kind and round
WINDOW = 16
ANY = SampleOptions()
WITH_COMMON = SampleOptions(where=(f"{COMMON}:0.001..",))
WITH_SCARCE = SampleOptions(where=(f"{SCARCE}:0.001..",))
BARS = {
    "start_seconds": ("start: seconds more than without an index", 2.0),
    "memory_megabytes": ("memory of the gateway: MB more than without an index", 400.0),
    "list_seconds": ("ListSeeds of a million seeds, with a condition: seconds", 0.1),
    "first_scarce": ("first sample of a class of one seed in 1,000, relative to any first sample", 1.2),
    "rate_common": ("rate of a stream of a class of one seed in 50, relative to an unfiltered one", 0.95),
}


def prepare(seeds: int) -> tuple[Path, Path]:
    """Return the repository and the index, written if build/ lacks them."""
    repository, index = BUILD / "seed_index" / "repository", BUILD / "seed_index" / f"index-{seeds}"
    if not index.exists():
        model = content_model.export(repository, ROOT / "model_repository")
        described = Described.of(model, truncation_psi=1.0, class_index=None)
        part = index.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        content_model.write_index(part, described, true_seeds=min(TRUE_SEEDS, seeds), seeds=seeds)
        part.rename(index)
    return repository, index


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def first(client: Client, options: SampleOptions, start_seed: int) -> float:
    """Return the seconds until the first sample of a stream."""
    with client.stream_samples(MODEL, start_seed, count=1, options=options, window=WINDOW) as stream:
        return timed(lambda: next(stream))


def rate(client: Client, options: SampleOptions) -> float:
    """Return the samples per second of a stream, from its first sample to its last."""
    with client.stream_samples(MODEL, 0, count=STREAMED, options=options, window=WINDOW) as stream:
        next(stream)
        return (STREAMED - 1) / timed(lambda: sum(1 for _ in stream))


def executions(metrics_url: str) -> float:
    """Return how many samples Triton has computed."""
    text = urllib.request.urlopen(metrics_url, timeout=10).read().decode()
    found = re.search(rf'nv_inference_count{{model="{MODEL}_step"[^}}]*}} (\S+)', text)
    if found is None:
        raise SystemExit(f"{metrics_url} does not count the executions of {MODEL}_step")
    return float(found[1])


def resident_megabytes(served: Served) -> float:
    status = Path(f"/proc/{served.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000  # type: ignore[index]


def use(client: Client, places: np.random.Generator) -> Figures:
    """Measure the streams of a gateway once."""
    starts = [int(seed) for seed in places.integers(0, TRUE_SEEDS // 2, FIRSTS)]
    found: dict[str, list[float]] = {"any": [], "scarce": []}
    for seed in starts:
        found["any"].append(first(client, ANY, seed))
        found["scarce"].append(first(client, WITH_SCARCE, seed))
    return {
        "first": {name: float(np.median(values)) for name, values in found.items()},
        "rate": {"any": rate(client, ANY), "common": rate(client, WITH_COMMON)},
    }


def measure_round(triton: TritonServer, index: Path, places: np.random.Generator) -> Figures:
    """Start both gateways, use them in turn, and return the figures of each."""
    found: Figures = {}
    for name, arguments in {"without": (), "with": ("--index", str(index))}.items():
        begun = time.perf_counter()
        with gateway("--triton-url", triton.grpc_url, *arguments) as served, Client(served.grpc) as client:
            figures: Figures = {"start": time.perf_counter() - begun}
            client.get_model(MODEL)  # connects, and has the gateway read Triton's models
            if name == "with":
                figures["list"] = [
                    timed(lambda start=start: client.list_seeds(MODEL, start, start + LISTED, options=WITH_COMMON))  # type: ignore[misc]
                    for start in (3 * LISTED, 3 * LISTED)
                ]
                figures["list_all"] = timed(lambda: client.list_seeds(MODEL, options=ANY))
                before = executions(triton.metrics_url)
                rate(client, WITH_COMMON)
                figures["executions"] = executions(triton.metrics_url) - before
            figures |= use(client, places)
            figures["resident_megabytes"] = resident_megabytes(served)
        found[name] = figures
    return found


async def rounds(repository: Path, index: Path, count: int) -> list[Figures]:
    server = TritonServer(repository, [MODEL], executor=ONNXRUNTIME)
    await server.start()
    try:
        await wait_until_ready(server)
        places = np.random.default_rng(0)
        return [await asyncio.to_thread(measure_round, server, index, places) for _ in range(count)]
    finally:
        await server.stop()


def summary(measured: list[Figures], seeds: int) -> Figures:
    def each(compare: Callable[[Figures, Figures], float]) -> Figures:
        return spread([compare(one["with"], one["without"]) for one in measured])

    return {
        "rounds": len(measured),
        "cores": floor.available_cores(),
        "seeds": seeds,
        "classes": len(content_model.CLASSES),
        "streamed": STREAMED,
        "window": WINDOW,
        "start_seconds": each(lambda indexed, plain: indexed["start"] - plain["start"]),
        "memory_megabytes": each(lambda indexed, plain: indexed["resident_megabytes"] - plain["resident_megabytes"]),
        "list_seconds": each(lambda indexed, _: indexed["list"][0]),
        "list_again_seconds": each(lambda indexed, _: indexed["list"][1]),
        "list_all_seconds": each(lambda indexed, _: indexed["list_all"]),
        "first_any_seconds": each(lambda indexed, _: indexed["first"]["any"]),
        "first_scarce": each(lambda indexed, _: indexed["first"]["scarce"] / indexed["first"]["any"]),
        "first_scarce_without": each(lambda _, plain: plain["first"]["scarce"] / plain["first"]["any"]),
        "rate_any": each(lambda indexed, _: indexed["rate"]["any"]),
        "rate_common": each(lambda indexed, _: indexed["rate"]["common"] / indexed["rate"]["any"]),
        "rate_common_without": each(lambda _, plain: plain["rate"]["common"] / plain["rate"]["any"]),
        "executions": spread([one["with"]["executions"] for one in measured]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    repository, index = prepare(arguments.seeds)
    found = summary(asyncio.run(rounds(repository, index, arguments.rounds)), arguments.seeds)
    resuming.write(arguments.out, found)
    for name, (title, bar) in BARS.items():
        each = found[name]
        print(f"{title}: {each['median']:.3f} ({each['least']:.3f} to {each['most']:.3f}); bar {bar:g}")
    print(f"executions of a stream of {STREAMED} samples, window {WINDOW}: {found['executions']}")


if __name__ == "__main__":
    main()
