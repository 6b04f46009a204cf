"""Measures whether the gate works: label error against uncertainty score, over seeds that no other step uses.

Rules of this file:
- The error of a sample is the share of its pixels whose label differs from the renderer's exact mask.
- Risk at a coverage is the mean error of the samples with the lowest scores. The measure is the area under that curve:
  a random order has the mean error, and the oracle orders by the error itself.
- A gate may trade rare parts for low scores. So the share of the kept seeds is also measured for each rare class.
- Measured seeds are kept in `build/gate`, in a file named after the weights, so an interrupted run resumes and other
  weights are measured anew.

Run it as `python benchmarks/gate.py`; it writes benchmarks/results/gate.json and docs/images/gate.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from demo import faces
from demo.annotate import compiled_renderer
from demo.committed import GENERATOR, INTERPRETER, fingerprint
from demo.metrics import areas
from tqdm import tqdm

from labelmint.models.annotations import write_json
from labelmint.models.draw import draw
from labelmint.models.interpreter import interleave
from labelmint.models.store import load_generator, load_interpreter

ROOT = Path(__file__).parent.parent
FIRST_SEED = 4_250_000_000
SAVE_EVERY = 100
# The score kinds that an export can have.
SCORES = {
    "sum": "sum of JS (the paper)",
    "top10_mean": "mean of the top 10 % of JS (released code)",
    "mean_entropy": "mean entropy of the heads",
    "mixture_entropy": "entropy of the mean probability",
}
TITLES = SCORES | {"random": "random order", "oracle": "oracle: by the error itself"}
Array = npt.NDArray[np.float64]


@torch.no_grad()
def measure(count: int, kept: Path) -> dict[str, Array]:
    """Measure `count` seeds: float64 [count] for each score kind, the error, and each class (1 if the mask has it)."""
    generator = load_generator(GENERATOR)
    kinds = {name: load_interpreter(INTERPRETER, name) for name in SCORES}
    interpreter = kinds["sum"]  # all but the scores is the same in all of them
    weights = interpreter.weights()
    render = compiled_renderer()
    columns: dict[str, list[float]] = {name: [] for name in (*SCORES, "error", *faces.CLASS_NAMES)}
    if kept.exists():
        with np.load(kept) as arrays:
            columns = {name: list(arrays[name]) for name in columns}
    kept.parent.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(len(columns["error"]), count), initial=len(columns["error"]), total=count, unit="seed"):
        seed = FIRST_SEED + index
        _, features = draw(generator, seed, 1.0, layout=interpreter.spec.layout)
        labels, divergences, entropies = [], [], []
        for parts in interpreter.parts_of_strips(features, weights):
            probability, entropy, votes = interpreter.statistics(interpreter.outputs(parts, weights))
            label, js = interpreter.uncertainty(probability, entropy, votes)
            labels.append(interleave(label))  # scores do not depend on the order of the pixels
            divergences.append(js)
            entropies.append(entropy)
        js_map, mean_entropy = torch.cat(divergences, dim=1), torch.cat(entropies, dim=1)  # [1,...] of R*R pixels
        for name, kind in kinds.items():
            columns[name].append(kind.score(*kind.maps(js_map, mean_entropy)).item())
        exact = render(seed).label  # [1,R,R]
        columns["error"].append((torch.cat(labels, dim=1) != exact).float().mean().item())
        for name, pixels in zip(faces.CLASS_NAMES, areas(exact), strict=True):
            columns[name].append(float(pixels > 0))
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == count:
            aside = kept.with_suffix(".part.npz")
            np.savez(aside, **{name: np.array(values) for name, values in columns.items()})
            aside.replace(kept)
    return {name: np.array(values[:count]) for name, values in columns.items()}


def risk_coverage(order: npt.NDArray[np.int64], error: Array) -> Array:
    """Return the mean error of the first 1, 2, ... samples of an order: float64 [N]."""
    return np.cumsum(error[order]) / np.arange(1, len(error) + 1)


def kept_of_rare_classes(columns: dict[str, Array], score: str) -> dict[str, float]:
    """Return the share of the seeds with each rare class that a gate keeps if it keeps 90 % of all seeds."""
    kept = columns[score] <= np.quantile(columns[score], 0.9)
    return {name: float(kept[columns[name] > 0].mean()) for name in faces.RARE_PARTS}


def evaluate(columns: dict[str, Array]) -> tuple[dict[str, Array], dict[str, object]]:
    """Return the risk-coverage curves and the figures of the table."""
    error = columns["error"]
    curves = {name: risk_coverage(np.argsort(columns[name], kind="stable"), error) for name in SCORES}
    curves["random"] = np.full(len(error), error.mean())  # the expectation over all orders
    curves["oracle"] = risk_coverage(np.argsort(error, kind="stable"), error)
    area = {name: float(curve.mean()) for name, curve in curves.items()}
    span = area["random"] - area["oracle"]
    rank = {name: np.argsort(np.argsort(columns[name])) for name in (*SCORES, "error")}
    figures: dict[str, object] = {
        "seeds": len(error),
        "first_seed": FIRST_SEED,
        "mean_error": float(error.mean()),
        "area_under_risk_coverage": area,
        "share_of_oracle_gain": {name: (area["random"] - area[name]) / span for name in SCORES},
        "spearman_with_error": {name: float(np.corrcoef(rank[name], rank["error"])[0, 1]) for name in SCORES},
        "kept_of_rare_classes_at_coverage_0.9": {name: kept_of_rare_classes(columns, name) for name in SCORES},
        "error_at_coverage_0.9": {name: float(curve[int(0.9 * len(error)) - 1]) for name, curve in curves.items()},
    }
    return curves, figures


def plot(columns: dict[str, Array], curves: dict[str, Array], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    left.scatter(columns["sum"], 100 * columns["error"], s=3, alpha=0.35, linewidths=0)
    left.axvline(np.quantile(columns["sum"], 0.9), color="black", linewidth=1, linestyle="--")
    left.set(xlabel="JS score, sum over pixels (nats)", ylabel="wrongly labelled pixels (%)")
    left.set_title("Each seed; the dashed line keeps 90 %")
    coverage = 100 * np.arange(1, len(columns["error"]) + 1) / len(columns["error"])
    for name, curve in curves.items():
        style = "--" if name in ("random", "oracle") else "-"
        right.plot(coverage, 100 * curve, style, label=TITLES[name], linewidth=1.4)
    right.set(xlabel="coverage: share of seeds kept (%)", ylabel="wrongly labelled pixels of those kept (%)")
    right.set(xlim=(0, 100), ylim=(100 * curves["oracle"][len(coverage) // 50], None))
    right.set_title("Risk against coverage")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="seeds to measure")
    arguments = parser.parse_args()
    columns = measure(arguments.count, ROOT / "build" / "gate" / f"{fingerprint()}.npz")
    curves, figures = evaluate(columns)
    write_json(ROOT / "benchmarks" / "results" / "gate.json", figures)
    plot(columns, curves, ROOT / "docs" / "images" / "gate.png")
    area, gain = figures["area_under_risk_coverage"], figures["share_of_oracle_gain"]
    assert isinstance(area, dict) and isinstance(gain, dict)
    print(f"{'order':<16}{'area under risk-coverage':>26}{'share of the oracle gain':>26}")
    for name, value in sorted(area.items(), key=lambda item: item[1]):
        share = f"{gain[name]:.1%}" if name in gain else ""
        print(f"{name:<16}{value:>26.5f}{share:>26}")


if __name__ == "__main__":
    main()
