"""Compares PNG encoder settings, and measures whether encoding delays the gateway's other responses.

Rules of this file:
- Pillow's encoder, which the gateway uses, runs at every level and strategy of zlib, on image and label of real samples
  of the demo. The choice is the fastest setting whose size is within ALLOWED of the smallest size at level 6.
- The shipped encoder is timed as the gateway calls it.
- The other responses are those of /healthz, requested one after the other while 16 callers request samples as PNG or
  raw. The model computes almost nothing (`null_model.py`), so encoding is most of the work. The callers are a separate
  process. PNG and raw take turns.

Run it as `python benchmarks/encoders.py` (two minutes); it writes benchmarks/results/encoders.json and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import itertools
import multiprocessing
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import floor
import in_process
import load
import numpy as np
import resuming
from gateway_cpu import CALLERS, null_service
from null_model import MODEL
from PIL import Image
from resuming import ROOT, Figures
from serving import RAW, gateway, samples_of

from labelmint.core.served_model import read_served_model
from labelmint.gateway.encoding.pixels import image_png, label_png
from labelmint.triton.model_config import ensembles
from labelmint.v1 import sample_service_pb2 as pb

RESULTS = ROOT / "benchmarks" / "results" / "encoders.json"
REPOSITORY = ROOT / "model_repository"
SAMPLES = 20
REPEATS = 3
OWN_STRATEGY = "Pillow's own"
STRATEGIES = {
    OWN_STRATEGY: -1,
    "default": zlib.Z_DEFAULT_STRATEGY,
    "Huffman only": zlib.Z_HUFFMAN_ONLY,
    "runs": zlib.Z_RLE,
}
CANDIDATES = [(level, strategy) for strategy in STRATEGIES for level in range(10)]
ALLOWED = 1.1
LOADS = {"raw": pb.ENCODING_RAW, "png": pb.ENCODING_PNG}
SECONDS = 4.0  # of each load measurement
PROBE_SECONDS = 0.01  # between a response of /healthz and the next request
Encoder = Callable[[int], bytes]  # of the sample of that number


def pillow(picture: Image.Image, level: int, strategy: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=level, compress_type=STRATEGIES[strategy])
    return buffer.getvalue()


def timed(encoders: dict[str, Encoder], count: int) -> dict[str, Figures]:
    """Return the seconds and bytes per sample of each encoder; the encoders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    sizes: dict[str, float] = {}
    for _ in range(REPEATS):
        for name, encoder in encoders.items():
            begun = time.perf_counter()
            sizes[name] = sum(len(encoder(index)) for index in range(count)) / count
            seconds[name].append((time.perf_counter() - begun) / count)
    return {name: {"seconds": float(np.median(seconds[name])), "bytes": sizes[name]} for name in encoders}


def chosen(rows: list[Figures]) -> Figures:
    """Return the fastest row whose size is within ALLOWED of the smallest size at level 6."""
    smallest = min(row["bytes"] for row in rows if row["level"] == 6)
    return min((row for row in rows if row["bytes"] <= ALLOWED * smallest), key=lambda row: row["seconds"])


def encodings(count: int) -> Figures:
    """Return for image and label: the rows of all candidates, the choice, and the shipped encoder."""
    model = read_served_model(ensembles(REPOSITORY)[MODEL], "1")
    pipeline = in_process.Pipeline(REPOSITORY, MODEL)
    drawn = [pipeline.infer([seed]) for seed in range(count)]
    samples = [SimpleNamespace(image=each["image"][0], label=each["label"][0], model=model) for each in drawn]
    palette = bytes(itertools.chain.from_iterable(model.palette))
    found: Figures = {}
    for part, ships in (("image", image_png), ("label", label_png)):
        pictures = [Image.fromarray(getattr(sample, part)) for sample in samples]
        if part == "label":
            for picture in pictures:
                picture.putpalette(palette)
        encoders: dict[str, Encoder] = {
            f"{level} {strategy}": lambda i, s=(level, strategy), p=pictures: pillow(p[i], *s)
            for level, strategy in CANDIDATES
        }
        encoders["ships"] = lambda i, e=ships: e(samples[i])
        figures = timed(encoders, count)
        rows = [
            {"level": level, "strategy": strategy} | figures[f"{level} {strategy}"] for level, strategy in CANDIDATES
        ]
        found[part] = {"rows": rows, "chosen": chosen(rows), "ships": figures["ships"]}
    return found


def ask_for(endpoint: str, encoding: int, seconds: float) -> float:
    """Return samples per second of 16 callers. Runs in a separate process."""
    options = pb.SampleOptions()
    options.CopyFrom(RAW)
    options.image_encoding = options.label_encoding = encoding  # type: ignore[assignment]

    async def run() -> float:
        async with samples_of(endpoint, MODEL, options) as ask:
            found = load.figures(await load.closed(ask, CALLERS, itertools.count(), seconds=seconds))
        return float(found["samples_per_second"])

    return asyncio.run(run())


def probe(url: str, seconds: float) -> list[float]:
    """Return the seconds of each response of /healthz, over one connection."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    latencies, ends = [], time.perf_counter() + seconds
    while time.perf_counter() < ends:
        begun = time.perf_counter()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        latencies.append(time.perf_counter() - begun)
        time.sleep(PROBE_SECONDS)
    connection.close()
    return latencies


async def health(rounds: int, seconds: float) -> Figures:
    """Return by load: percentiles of /healthz in seconds and samples per second, medians over the rounds."""
    found: dict[str, list[Figures]] = {name: [] for name in LOADS}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        async with null_service() as (triton, _):
            with gateway("--triton-url", triton) as served:
                for index in range(rounds):
                    for name in resuming.rotated(tuple(LOADS), index):
                        await asyncio.to_thread(pool.submit(ask_for, served.grpc, LOADS[name], 0.5).result)  # warms up
                        asked = pool.submit(ask_for, served.grpc, LOADS[name], seconds)
                        latencies = await asyncio.to_thread(probe, served.http, seconds)
                        rate = await asyncio.to_thread(asked.result)
                        p50, p99 = np.percentile(latencies, (50, 99)).tolist()
                        found[name].append({"p50": p50, "p99": p99, "samples_per_second": rate})
    return {name: {key: load.spread([each[key] for each in some]) for key in some[0]} for name, some in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the load")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="seconds of each load measurement")
    arguments = parser.parse_args()
    found = {
        "cores": floor.available_cores(),
        "samples": arguments.samples,
        "allowed": ALLOWED,
        "encodings": encodings(arguments.samples),
        "rounds": arguments.rounds,
        "callers": CALLERS,
        "health": asyncio.run(health(arguments.rounds, arguments.seconds)),
    }
    resuming.write(RESULTS, found)
    for part, each in found["encodings"].items():
        for name in ("chosen", "ships"):
            row = each[name]
            settings = f" (level {row['level']}, {row['strategy']})" if name == "chosen" else ""
            print(f"{part}, {name}{settings}: {1e3 * row['seconds']:.2f} ms, {row['bytes']:,.0f} bytes")
    for name, each in found["health"].items():
        p50, p99 = (1e3 * each[key]["median"] for key in ("p50", "p99"))
        rate = each["samples_per_second"]["median"]
        asked = f"{CALLERS} callers ask for {name} ({rate:.0f} samples/s)"
        print(f"/healthz while {asked}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


if __name__ == "__main__":
    main()
