"""Measures samples per second through a PyTorch DataLoader, relative to Triton alone in the same run.

Rules of this file:
- One Triton serves all ways: direct (6 requests at a time), and through a gateway, gRPC and a DataLoader of 0, 2 and 4
  workers. Each worker has a window of 8, so more workers give Triton larger batches.
- The ways take turns; a figure is the median of the rounds.
- A rate covers the time from the first batch to the last, because the start of workers is not throughput.
- Rejected samples are delivered too (`include_rejected`), so that each seed is one sample in all ways.

Run it as `python benchmarks/dataloader.py` on an idle machine; it writes benchmarks/results/dataloader.json.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np
from serving import gateway
from torch.utils.data import DataLoader

from labelmint.core.served_model import ServedModel, read_served_model
from labelmint.models.annotations import write_json
from labelmint.pipeline import measure
from labelmint.triton.client import TritonClient
from labelmint.triton.model_config import ensembles
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint_client import SampleOptions
from labelmint_client.torch import LabeledSampleDataset

ROOT = Path(__file__).parent.parent
REPOSITORY = ROOT / "model_repository"
MODEL = "faces"
BATCH = 8
WORKERS = (0, 2, 4)


async def direct(client: TritonClient, model: ServedModel, first_seed: int, *, count: int) -> float:
    """Return samples per second of Triton alone."""
    arrived: list[float] = []
    outputs = ("image", "label", "js_score")
    seeds = range(first_seed, first_seed + count)
    await measure(
        client,
        model,
        seeds,
        truncation_psi=1.0,
        outputs=outputs,
        reduce=lambda *_: arrived.append(time.perf_counter()),
        title="Triton",
    )
    arrived.sort()
    return (count - BATCH) / (arrived[-1] - arrived[BATCH - 1])


def loaded(endpoint: str, workers: int, first_seed: int, *, count: int) -> float:
    """Return samples per second of a DataLoader."""
    dataset = LabeledSampleDataset(
        endpoint,
        MODEL,
        start_seed=first_seed,
        end_seed=first_seed + count,
        options=SampleOptions(include_rejected=True),
    )
    arrived = [time.perf_counter() for _ in DataLoader(dataset, batch_size=BATCH, num_workers=workers)]
    return (count - BATCH) / (arrived[-1] - arrived[0])


async def rates(rounds: int, count: int) -> dict[str, list[float]]:
    """Return samples per second of each way, one figure per round."""
    found: dict[str, list[float]] = {name: [] for name in ("triton", *(f"workers_{n}" for n in WORKERS))}
    server = TritonServer(REPOSITORY, [MODEL])
    await server.start()
    try:
        await wait_until_ready(server)
        client = TritonClient(server.grpc_url)
        model = read_served_model(ensembles(REPOSITORY)[MODEL], "1")
        seed = 0
        with gateway("--triton-url", server.grpc_url) as served:
            for _ in range(rounds):
                found["triton"].append(await direct(client, model, seed, count=count))
                for workers in WORKERS:
                    seed += count
                    rate = await asyncio.to_thread(loaded, served.grpc, workers, seed, count)
                    found[f"workers_{workers}"].append(rate)
                seed += count
        await client.close()
    finally:
        await server.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=160, help="samples per measurement")
    arguments = parser.parse_args()
    found = asyncio.run(rates(arguments.rounds, arguments.count))
    ratios = {name: np.array(values) / np.array(found["triton"]) for name, values in found.items()}
    medians = {name: float(np.median(values)) for name, values in found.items()}
    figures = {"rounds": arguments.rounds, "samples": arguments.count, "samples_per_second": medians}
    figures["ratio_to_triton"] = {name: float(np.median(values)) for name, values in ratios.items()}
    write_json(ROOT / "benchmarks" / "results" / "dataloader.json", figures)
    for name, ratio in ratios.items():
        spread = f"({ratio.min():.3f} to {ratio.max():.3f})"
        print(f"{name:<12}{medians[name]:>8.2f} samples/s   {np.median(ratio):.3f} of Triton {spread}")


if __name__ == "__main__":
    main()
