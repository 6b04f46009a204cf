"""Compares scaling signals for Triton: simulated workloads under the shipped signal and the usual ones, and a sweep.

Rules of this file:
- The shipped numbers are read from k8s/. Every other signal gets the same limits and behaviour, and the best of its
  targets.
- The measure is the cost of a million samples: the GPU-hours of Triton, plus those of the training jobs that wait for
  it times TRAINER_WEIGHT (simulation/scenarios.py), because jobs train on more expensive GPUs. A signal's score is the
  geometric mean of its costs over the scenarios, relative to the shipped signal.
- Runs are kept in build/autoscaling, so an interrupted benchmark resumes. Remove it after a change of the simulator.
- The GPU's speed and the times of nodes are predictions (simulation/scenarios.py, simulation/cluster.py).

Run it as `python benchmarks/autoscaling.py` (about half an hour); it writes benchmarks/results/autoscaling.json and
docs/images/autoscaling.png.
"""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from simulation.cluster import Provisioning
from simulation.manifests import Form, Shipped, shipped
from simulation.scenarios import ACCEPTANCE, GPU, TRAINER_WEIGHT, Scenario, scenarios, simulate
from simulation.signals import QueueTime, Rate, Signal, Utilisation
from tqdm import tqdm

from labelmint.models.annotations import write_json

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "autoscaling"
DEMAND = "demand (shipped)"
FULL = GPU.rate * ACCEPTANCE  # accepted samples per second of one GPU
OTHERS: dict[str, dict[float, Signal]] = {
    "GPU utilisation": {share: Utilisation(share) for share in (0.7, 0.9, 0.95)},
    "requests per second": {share: Rate(share * FULL) for share in (0.7, 0.9, 1.0)},
    "queue time": {ratio: QueueTime(ratio) for ratio in (0.5, 1.0, 2.0)},
}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The parameters of the shipped signal: the threshold of demand and of requests waiting in Triton, the form of
    their queries, and the seconds that these look back."""

    threshold: float
    form: Form
    seconds: float

    @classmethod
    def of(cls, numbers: Shipped) -> Settings:
        demand, pending, _ = numbers.triggers
        found = {cls(each.threshold, each.form, each.window_seconds) for each in (demand, pending)}
        (settings,) = found  # the benchmark changes both together
        return settings

    def applied(self, numbers: Shipped) -> Shipped:
        demand, pending, queue_time = numbers.triggers
        changed = [
            replace(each, threshold=self.threshold, form=self.form, window_seconds=self.seconds)
            for each in (demand, pending)
        ]
        return replace(numbers, triggers=(*changed, replace(queue_time, threshold=self.threshold)))


GRID = [
    Settings(48, "mean of sums", 120),
    Settings(48, "mean of sums", 60),
    Settings(48, "larger mean", 120),
    Settings(48, "largest sum", 120),
    Settings(48, "newest sum", 0),
    # Shipped before: it counts Tritons that have ended.
    Settings(48, "sum of means", 120),
    Settings(64, "mean of sums", 120),
]


@dataclass(frozen=True)
class Run:
    scenario: Scenario
    numbers: Shipped
    signal: Signal | None  # None: the triggers of `numbers`


def outcome(run: Run) -> Figures:
    """Return the figures of a run and its timeline, from disk if the run was kept."""
    path = KEPT / f"{hashlib.sha256(repr((run, GPU)).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        found, timeline = simulate(run.scenario, run.numbers, run.signal)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found.figures() | {"timeline": timeline})
    return json.loads(path.read_text())


def relative(found: list[Figures], base: list[Figures]) -> float:
    """Return the geometric mean of the costs over the scenarios, relative to a base."""
    ratios = [each["cost"] / other["cost"] for each, other in zip(found, base, strict=True)]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def plot(workloads: tuple[Scenario, ...], arms: dict[str, list[Figures]], path: Path) -> None:
    figure, panels = plt.subplots(2, len(workloads), figsize=(13, 6), height_ratios=(3, 2))
    for column, scenario in enumerate(workloads):
        above, below = panels[:, column]
        for name, found in arms.items():
            times, _, _, ready = zip(*found[column]["timeline"], strict=True)
            above.plot([time / 60 for time in times], ready, lw=1.8 if name == DEMAND else 1.0, label=name)
        above.set_title(scenario.name.replace("_", " "), fontsize=10)
        above.set_xlabel("minutes")
        serving = [found[column]["gpu_hours_per_million"] for found in arms.values()]
        waiting = [
            each - own for each, own in zip((found[column]["cost"] for found in arms.values()), serving, strict=True)
        ]
        rows = range(len(arms))
        below.barh(rows, serving, color="tab:blue")
        below.barh(rows, waiting, left=serving, color="tab:red")
        below.set_yticks(rows, arms if column == 0 else [""] * len(arms), fontsize=8)
        below.invert_yaxis()
        below.set_xlabel("cost of a million")
        below.set_title("Triton's GPUs (blue), trainers that wait (red)", fontsize=8)
    panels[0, 0].set_ylabel("Tritons ready")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(arms), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=110)


def main() -> None:
    numbers, workloads = shipped(), scenarios()
    assert Settings.of(numbers) in GRID, f"{Settings.of(numbers)} ships but is not in the grid; add it"
    # A signal that Triton exports does not exist without a Triton, so one Triton always runs.
    kept_one = replace(numbers, min_replicas=1)
    signals = [(name, target, signal) for name, some in OTHERS.items() for target, signal in some.items()]
    runs = [Run(scenario, each.applied(numbers), None) for each in GRID for scenario in workloads]
    runs += [Run(scenario, kept_one, signal) for *_, signal in signals for scenario in workloads]
    with ProcessPoolExecutor() as pool:
        found = list(tqdm(pool.map(outcome, runs), total=len(runs), unit="run"))
    arms = [found[first : first + len(workloads)] for first in range(0, len(found), len(workloads))]

    swept = dict(zip(GRID, arms, strict=False))
    base = swept[Settings.of(numbers)]
    best: dict[str, tuple[float | None, list[Figures]]] = {DEMAND: (None, base)}
    for (name, target, _), arm in zip(signals, arms[len(GRID) :], strict=True):
        if name not in best or relative(arm, base) < relative(best[name][1], base):
            best[name] = (target, arm)
    results = {
        "trainer_weight": TRAINER_WEIGHT,
        "gpu": {"seconds_of_a_batch": [sum(steps) for steps in zip(*GPU.seconds, strict=True)], "full_rate": FULL},
        "provisioning": asdict(Provisioning()),
        "scenarios": {scenario.name: scenario.title for scenario in workloads},
        "signals": [
            {"name": name, "target": target, "relative_cost": relative(arm, base)}
            | {"outcomes": [{key: value for key, value in each.items() if key != "timeline"} for each in arm]}
            for name, (target, arm) in best.items()
        ],
        "shipped": asdict(Settings.of(numbers)),
        "sweep": sorted(
            (
                asdict(each) | {"relative_cost": relative(arm, base), "costs": [one["cost"] for one in arm]}
                for each, arm in swept.items()
            ),
            key=lambda row: row["relative_cost"],
        ),
    }
    write_json(ROOT / "benchmarks" / "results" / "autoscaling.json", results)
    plot(workloads, {name: arm for name, (_, arm) in best.items()}, ROOT / "docs" / "images" / "autoscaling.png")
    for row in results["sweep"]:
        print(row)
    for row in results["signals"]:
        print(row["name"], row["target"], row["relative_cost"])


if __name__ == "__main__":
    main()
