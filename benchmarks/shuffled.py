"""Measures samples per second of a shuffled DataLoader over `LabeledSamples`, relative to the stream in the same run.

Rules of this file:
- The demo is served by a real Triton, through one gateway with an index of its first seeds, which `labelmint index`
  writes before (kept in build/).
- The ways take turns in each round, with the same number of workers: a `LabeledSampleDataset`, which walks seeds in
  order, and a shuffled `LabeledSamples`. Both deliver accepted samples only, from the same range.
- A rate covers the time from the first batch to the last. A ratio is taken within a round; figures are medians.

Run it as `python benchmarks/shuffled.py` on an idle machine; it writes benchmarks/results/shuffled.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import floor
import resuming
import torch
from load import spread
from resuming import BUILD, ROOT, Figures
from serving import gateway
from torch.utils.data import DataLoader

from labelmint_client.torch import LabeledSampleDataset, LabeledSamples

RESULTS = ROOT / "benchmarks" / "results" / "shuffled.json"
REPOSITORY = ROOT / "model_repository"
MODEL = "faces"
BATCH = 8
WORKERS = (0, 2)
STREAM, SHUFFLED = "stream", "shuffled"
BAR = 0.9


def prepare(seeds: int) -> Path:
    """Return the index of the demo's first seeds, made if build/ lacks it."""
    index = BUILD / "shuffled" / f"index-{seeds}"
    command = [sys.executable, "-m", "labelmint.cli", "index", MODEL, "--model-repository", str(REPOSITORY)]
    subprocess.run([*command, "--seeds", f"0:{seeds}", "--out", str(index)], check=True)
    return index


def rate(loader: DataLoader[Any]) -> float:
    arrived = [(time.perf_counter(), len(batch[1])) for batch in loader]
    return sum(size for _, size in arrived[1:]) / (arrived[-1][0] - arrived[0][0])


def measure_round(endpoint: str, seeds: int, index: int) -> dict[str, float]:
    """Return the rate of each way and number of workers. The ways take turns in being first."""
    found = {}
    for workers in WORKERS:
        for way in (STREAM, SHUFFLED)[:: 1 if index % 2 == 0 else -1]:
            dataset = (LabeledSampleDataset if way == STREAM else LabeledSamples)(endpoint, MODEL, end_seed=seeds)
            order = {} if way == STREAM else {"shuffle": True, "generator": torch.Generator().manual_seed(index)}
            loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, **order)  # type: ignore[arg-type, var-annotated]
            found[f"{way}_{workers}"] = rate(loader)
    return found


def summary(rounds: list[dict[str, float]], seeds: int) -> Figures:
    return {
        "rounds": len(rounds),
        "cores": floor.available_cores(),
        "seeds": seeds,
        "batch": BATCH,
        "bar": BAR,
        "rates": {name: spread([one[name] for one in rounds]) for name in rounds[0]},
        "ratios": {str(n): spread([one[f"{SHUFFLED}_{n}"] / one[f"{STREAM}_{n}"] for one in rounds]) for n in WORKERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=240, help="seeds of the range")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    index = prepare(arguments.count)
    with gateway("--model-repository", str(REPOSITORY), "--index", str(index)) as served:
        measured = [measure_round(served.grpc, arguments.count, one) for one in range(arguments.rounds)]
    found = summary(measured, arguments.count)
    resuming.write(arguments.out, found)
    for workers, ratio in found["ratios"].items():
        print(f"{workers} workers: {ratio['median']:.3f} of the stream ({ratio['least']:.3f} to {ratio['most']:.3f})")


if __name__ == "__main__":
    main()
