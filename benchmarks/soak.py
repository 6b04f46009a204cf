"""Checks that memory stays flat: 20,000 samples through one service, with the memory of each of its processes.

Rules of this file:
- The service is `labelmint serve` as installed. It starts a Triton on a real export of a small model (32 x 32, random
  weights). Its samples are cheap, so there can be many, and a leak per call is the same as with a large model.
- Four callers run in parallel, with a quarter of the samples each: two gRPC streams (raw, and PNG images with the JS
  map), single gRPC calls, and REST (npz).
- Memory is the proportional set size that the kernel counts: a page that processes share is divided among them. Growth
  is the slope of a straight line through the readings after the first fifth of the samples; until then caches, pools
  and arenas fill.

Run it as `python benchmarks/soak.py` (3 minutes; the machine need not be idle, because times do not count); it writes
benchmarks/results/soak.json and docs/images/soak.png.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import random_models
import resuming
from resident import resident
from resuming import BUILD, ROOT, Figures
from serving import gateway

from labelmint.export.repository import export_repository
from labelmint.models.layout import channels_of
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint_client import Client, SampleOptions

RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
PICTURE = ROOT / "docs" / "images" / "soak.png"
MODEL = "small"
SAMPLES = 20_000
SETTLED = 0.2  # share of the samples after which growth counts
READ_SECONDS = 1.0
ANY_SCORE = 1e9  # the model is not calibrated, so accept all samples


def export() -> Path:
    """Return the repository of the small model. Exports it unless this code has exported it before."""
    repository, kept = BUILD / "soak" / "repository", BUILD / "soak" / "exported"
    wanted = resuming.digest_of(resuming.exporting_code())
    if not (kept.exists() and kept.read_text() == wanted):
        spec = StyleGAN2Spec(32, 32, 2, 32, dict.fromkeys((4, 8, 16, 32), 16))
        interpreter = random_models.interpreter(
            random_models.interpreter_spec(32, channels_of("paper", spec.taps), num_heads=4, num_classes=8)
        )
        export_repository(repository, MODEL, (random_models.generator(spec), interpreter))
        kept.write_text(wanted)
    return repository


def memory(root: int) -> dict[str, float]:
    """Return the proportional set sizes of the gateway and its descendants, in MB, by role."""
    return {"gateway" if pid == root else role_of(command): size / 1e6 for pid, command, size in resident(root) if size}


def role_of(command: list[str]) -> str:
    """Return the role of a process below the gateway: Triton, or the process of one of its models."""
    if "stub" in Path(command[0]).name:
        names = [each.name for each in (BUILD / "soak" / "repository").iterdir() if not each.name.startswith(".")]
        return max((name for name in names if any(name in word for word in command)), key=len, default="model")
    return Path(command[0]).name


class Count:
    """Counts the samples that have arrived at the callers."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.value += 1


def stream(client: Client, options: SampleOptions, first: int, *, count: int) -> Iterator[object]:
    return client.stream_samples(MODEL, first, end_seed=first + count, options=options)


def single(client: Client, first: int, count: int) -> Iterator[object]:
    for seed in range(first, first + count):
        yield client.get_sample(MODEL, seed, SampleOptions(max_js=ANY_SCORE))


def rest(url: str, first: int, count: int) -> Iterator[object]:
    for seed in range(first, first + count):
        path = f"{url}/v1/models/{MODEL}/samples/{seed}.npz?max_js={ANY_SCORE:.0f}"
        with urllib.request.urlopen(path, timeout=60) as answer:
            yield answer.read()


def soak(samples: int) -> tuple[list[Figures], float]:
    """Run the soak. Returns the readings (`samples` arrived so far and MB by process) and the seconds of the whole."""
    share = samples // 4
    readings: list[Figures] = []
    count = Count()
    with (
        gateway("--model-repository", str(export())) as served,
        Client(served.grpc) as client,
    ):
        png = SampleOptions(max_js=ANY_SCORE, include_js_map=True, image_encoding="png")
        callers: list[Callable[[], Iterator[object]]] = [
            lambda: stream(client, SampleOptions(max_js=ANY_SCORE), 0, count=share),
            lambda: stream(client, png, share, count=share),
            lambda: single(client, 2 * share, share),
            lambda: rest(served.http, 3 * share, share),
        ]
        failures: list[BaseException] = []

        def call(samples_of: Callable[[], Iterator[object]]) -> None:
            try:
                for _ in samples_of():
                    count.add()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=call, args=(each,)) for each in callers]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failures:
            readings.append({"samples": count.value, "megabytes": memory(served.pid)})
            time.sleep(READ_SECONDS)
        if failures:
            raise failures[0]
        seconds = time.monotonic() - begun
        readings.append({"samples": count.value, "megabytes": memory(served.pid)})
    assert count.value == 4 * share, f"{count.value} samples arrived"
    return readings, seconds


def summary(readings: list[Figures], seconds: float) -> Figures:
    """Return per process and in total: MB after settling and at the end, and the slope in MB per 1,000 samples."""
    last = readings[-1]
    processes = sorted(last["megabytes"])
    settled = [
        each
        for each in readings
        if each["samples"] >= SETTLED * last["samples"] and set(each["megabytes"]) == set(processes)
    ]
    x = np.array([each["samples"] for each in settled]) / 1000
    found: Figures = {}
    for name in (*processes, "all"):
        y = np.array(
            [sum(each["megabytes"].values()) if name == "all" else each["megabytes"][name] for each in settled]
        )
        found[name] = {
            "settled_mb": float(y[0]),
            "end_mb": float(y[-1]),
            "mb_per_1000": float(np.polyfit(x, y, 1)[0]),
        }
    return {"samples": last["samples"], "seconds": seconds, "settled": settled[0]["samples"], "processes": found}


def plot(readings: list[Figures], figures: Figures, path: Path) -> None:
    figure, panel = plt.subplots(figsize=(8, 3.6))
    x = [each["samples"] for each in readings]
    for name in figures["processes"]:
        y = [
            sum(each["megabytes"].values()) if name == "all" else each["megabytes"].get(name, np.nan)
            for each in readings
        ]
        panel.plot(x, y, color="black" if name == "all" else None, label=name)
    panel.axvline(figures["settled"], color="gray", linestyle="--", linewidth=0.8)
    panel.set_ylim(0)
    panel.set_xlabel("samples that have arrived")
    panel.set_ylabel("proportional set size, MB")
    panel.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    arguments = parser.parse_args()
    readings, seconds = soak(arguments.samples)
    figures = summary(readings, seconds)
    resuming.write(RESULTS, figures)
    plot(readings, figures, PICTURE)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
