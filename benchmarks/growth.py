"""Measures how the cost of a sample grows with resolution, heads, classes, batch and concurrent callers.

Rules of this file:
- The Style Interpreter's step runs as exported, in ONNX Runtime in this process, configured as it is served. All cells
  have 64 channels at each level, so that only one parameter varies; the others stay at BASE. Features and weights are
  random.
- Concurrency is measured through a gateway on the demo: a closed loop of callers, as in `latency.py`.
- The cells of an axis take turns; a figure is the median over rounds and repetitions.
- Growth is the slope of a straight line through the logarithms: 1 is linear. The slope of the floor's operations is
  reported next to it: the growth if only these operations took time.

Run it as `python benchmarks/growth.py` on an idle machine (15 minutes); it writes benchmarks/results/growth.json and
docs/images/growth.png.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import floor
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import random_models
import resuming
import step_runner
from latency import MODEL, closed, latencies, throughput
from resuming import BUILD, ROOT, Figures
from serving import gateway, samples_of

from labelmint.export.modules import StyleInterpreterStep
from labelmint.export.onnx_export import export_onnx
from labelmint.models.interpreter import InterpreterSpec

RESULTS = ROOT / "benchmarks" / "results" / "growth.json"
PICTURE = ROOT / "docs" / "images" / "growth.png"
CHANNELS = 64
REPEATS = 3
CALLS = 3  # per caller of a closed loop; the first is not counted


@dataclass(frozen=True)
class Cell:
    """A size of the step; `hidden` follows from the classes, and doubles at 32 of them."""

    resolution: int = 128
    heads: int = 10
    classes: int = 20
    batch: int = 1

    @property
    def spec(self) -> InterpreterSpec:
        levels = [2**i for i in range(2, self.resolution.bit_length())]
        return random_models.interpreter_spec(
            self.resolution, dict.fromkeys(levels, CHANNELS), self.heads, num_classes=self.classes
        )

    @property
    def file(self) -> Path:
        return BUILD / "growth" / f"r{self.resolution}_n{self.heads}_k{self.classes}.onnx"

    @property
    def floor_flops(self) -> int:
        """Per sample."""
        return floor.interpreter_flops(self.spec)

    @property
    def floor_bytes(self) -> float:
        """Per sample; a batch reads the weights once."""
        return floor.interpreter_bytes(self.spec, self.batch) / self.batch


BASE = Cell()
AXES = {
    "resolution": (32, 64, 128, 256),
    "heads": (2, 5, 10, 20),
    "classes": (8, 14, 20, 31, 32, 34),
    "batch": (1, 2, 4, 8, 16),
}
CELLS = {axis: {value: replace(BASE, **{axis: value}) for value in values} for axis, values in AXES.items()}
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
TITLES = {
    "resolution": "pixels, R²",
    "heads": "heads, N",
    "classes": "classes, K",
    "batch": "samples of a batch",
    "concurrency": "concurrent callers",
}


def all_cells() -> list[Cell]:
    return list(dict.fromkeys(itertools.chain.from_iterable(by_value.values() for by_value in CELLS.values())))


def prepare() -> str:
    """Export the missing files. Returns the fingerprint of what is measured."""
    code = resuming.digest_of(resuming.exporting_code(), CHANNELS)
    kept = BUILD / "growth" / "exported"
    kept.parent.mkdir(parents=True, exist_ok=True)
    current = kept.exists() and kept.read_text() == code
    for cell in all_cells():
        if not (current and cell.file.exists()):
            step = StyleInterpreterStep(random_models.interpreter(cell.spec))
            cell.file.write_bytes(export_onnx(step).data)
    kept.write_text(code)
    repository = ROOT / "model_repository"
    served = [repository / f"{MODEL}_{step}" / "1" / "model.onnx" for step in ("generator", "style_interpreter")]
    return resuming.digest_of([*served, Path(step_runner.__file__)], code)


def steps() -> Figures:
    """Measure by cell: seconds per sample of each repetition."""
    random = np.random.default_rng(0)
    sessions: dict[Path, Any] = {}
    inputs: dict[Cell, dict[str, np.ndarray]] = {}
    seconds: dict[Cell, list[float]] = {cell: [] for cell in all_cells()}
    for cell in seconds:
        if cell.file not in sessions:
            sessions[cell.file] = step_runner.onnx_session(cell.file)
        inputs[cell] = {
            f"features_{r}": random.standard_normal((cell.batch, c, r, r), np.float32)
            for r, c in cell.spec.channels.items()
        }
    for repetition in range(1 + REPEATS):
        for cell, arrays in inputs.items():
            begun = time.perf_counter()
            sessions[cell.file].run(None, arrays)
            if repetition:  # the first one warms up
                seconds[cell].append((time.perf_counter() - begun) / cell.batch)
    return {axis: {str(value): seconds[cell] for value, cell in by_value.items()} for axis, by_value in CELLS.items()}


async def concurrency() -> Figures:
    """Measure by the number of callers: samples per second, and the median seconds of a call."""
    found: Figures = {}
    with gateway("--model-repository", str(ROOT / "model_repository")) as served:
        async with samples_of(served.grpc, MODEL) as call:
            seeds = itertools.count()
            await closed(call, max(CONCURRENCIES), 1, seeds=seeds)  # warms up batches of all sizes
            for callers in CONCURRENCIES:
                run = await closed(call, callers, max(CALLS, 1 + 12 // callers), seeds=seeds)
                found[str(callers)] = {
                    "samples_per_second": throughput(run),
                    "call_seconds": float(np.median(latencies(run))),
                }
    return found


def slope(x: list[float], y: list[float]) -> float:
    """Return the slope of the straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def summary(rounds: list[dict[str, Figures]]) -> Figures:
    rates = {key: float(np.median([each["machine"][key] for each in rounds])) for key in rounds[0]["machine"]}
    axes: Figures = {}
    for axis, by_value in CELLS.items():
        rows = []
        for value, cell in by_value.items():
            per_round = [each["steps"][axis][str(value)] for each in rounds]
            least = floor.floor_seconds(
                cell.floor_flops,
                cell.floor_bytes,
                rates["flops_per_second"],
                bytes_per_second=rates["bytes_per_second"],
            )
            seconds = float(np.median(list(itertools.chain.from_iterable(per_round))))
            medians = [float(np.median(some)) for some in per_round]
            rows.append(
                {
                    "value": value,
                    "seconds": seconds,
                    "low": min(medians),
                    "high": max(medians),
                    "floor_seconds": least,
                    "floor_flops": cell.floor_flops,
                }
            )
        x = [float(row["value"] ** (2 if axis == "resolution" else 1)) for row in rows]
        axes[axis] = {
            "rows": rows,
            "slope": slope(x, [row["seconds"] for row in rows]),
            "floor_slope": slope(x, [row["floor_flops"] for row in rows]),
        }
    callers = []
    for value in map(str, CONCURRENCIES):
        row: Figures = {"value": int(value)}
        for key in ("samples_per_second", "call_seconds"):
            row[key] = float(np.median([each["concurrency"][value][key] for each in rounds]))
        callers.append(row)
    return {
        "rounds": len(rounds),
        "repeats": REPEATS,
        "base": {"resolution": BASE.resolution, "heads": BASE.heads, "classes": BASE.classes, "channels": CHANNELS},
        "cores": floor.available_cores(),
        "machine": rates,
        "axes": axes,
        "concurrency": {"rows": callers},
    }


def plot(figures: Figures, path: Path) -> None:
    figure, panels = plt.subplots(1, 5, figsize=(15, 3.2))
    for panel, (axis, found) in zip(panels, figures["axes"].items(), strict=False):
        rows = found["rows"]
        x = np.array([row["value"] ** (2 if axis == "resolution" else 1) for row in rows], float)
        y = np.array([row["seconds"] for row in rows])
        panel.errorbar(
            x,
            y,
            yerr=[[row["seconds"] - row["low"] for row in rows], [row["high"] - row["seconds"] for row in rows]],
            fmt="o",
            capsize=2,
            label="measured",
        )
        panel.plot(x, [row["floor_seconds"] for row in rows], "--", color="black", label="floor")
        line = np.exp(np.polyval(np.polyfit(np.log(x), np.log(y), 1), np.log(x)))
        panel.plot(x, line, "-", alpha=0.5, color="C0", label=f"slope {found['slope']:.2f}")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        names = [f"{row['value']}²" if axis == "resolution" else str(row["value"]) for row in rows]
        crowded = np.append(np.diff(np.log2(x)) < 0.1, False)  # too close to the value to the right
        panel.set_xticks(x, ["" if hidden else name for name, hidden in zip(names, crowded, strict=True)], fontsize=7)
        panel.minorticks_off()
        panel.set_xlabel(TITLES[axis])
        panel.legend(frameon=False, fontsize=7)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a sample")
    rows = figures["concurrency"]["rows"]
    x = [row["value"] for row in rows]
    panels[4].plot(x, [row["samples_per_second"] for row in rows], "o-")
    panels[4].set_xscale("log", base=2)
    panels[4].set_xticks(x, [str(each) for each in x], fontsize=7)
    panels[4].set_ylim(0, 1.15 * max(row["samples_per_second"] for row in rows))
    panels[4].set_xlabel(TITLES["concurrency"])
    panels[4].set_ylabel("samples a second")
    panels[4].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    resuming.add_arguments(parser)
    parser.add_argument("--prepare", action="store_true", help="only export: nothing is timed")
    arguments = parser.parse_args()
    fingerprint = prepare()
    if arguments.prepare:
        return
    parts = {
        "machine": floor.rates,
        "steps": steps,
        "concurrency": lambda: asyncio.run(concurrency()),
    }
    figures = summary(resuming.measured("growth", fingerprint, parts, rounds=arguments.rounds, budget=arguments.budget))
    resuming.write(RESULTS, figures)
    plot(figures, PICTURE)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
