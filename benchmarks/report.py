"""Writes docs/benchmarks.md from what the benchmarks have measured.

Rules of this file:
- No number is written by hand: every figure comes from benchmarks/results.
- What was not measured yet is left out, and its absence is said.

Run it as `python benchmarks/report.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gate import TITLES
from labels_train_models import ARMS, by_source

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Each section is one command. Compare ratios, not seconds: the machine had two cores and no GPU. `make bench` runs
them all; `python benchmarks/report.py` writes this page from their results.
"""


def labels_train_models(runs: list[dict[str, Any]]) -> str:
    found = by_source(runs)
    sizes = sorted({samples for arm, samples in found if arm in "cde"})

    def values(arm: str, size: int) -> list[float]:
        return found.get((arm, size)) or found.get((arm, 16)) or []

    def cell(arm: str, size: int) -> str:
        return f"{np.mean(values(arm, size)):.3f} ({len(values(arm, size))})" if values(arm, size) else "not measured"

    def bar(size: int, compared: Callable[[float, float, float], str]) -> str:
        means = [float(np.mean(values(arm, size))) for arm in "bce" if values(arm, size)]
        return compared(*means) if len(means) == 3 else "not measured"

    head = "| Trained on | " + " | ".join(f"{size:,}" for size in sizes) + " |\n| --- |" + " --- |" * len(sizes)
    rows = [f"| ({arm}) {title} | " + " | ".join(cell(arm, s) for s in sizes) + " |" for arm, title in ARMS.items()]
    for title, compared in (
        ("(c) above (b), in points; 8 were asked for", lambda b, c, e: f"{100 * (c - b):.1f}"),
        ("(c) of (e); 85 % were asked for", lambda b, c, e: f"{c / e:.1%}"),
        ("(e) above (b), in points: what there is to gain", lambda b, c, e: f"{100 * (e - b):.1f}"),
    ):
        rows.append(f"| {title} | " + " | ".join(bar(size, compared) for size in sizes) + " |")
    return f"""## Do the labels train models?

`python benchmarks/labels_train_models.py`

A small segmentation network (`clients/pytorch/train_segmenter.py`), the same number of steps for all, judged on 1,000
exact renders that no generator drew. mIoU by the number of different training samples, mean over the seeds of the
training (how many in parentheses). (a) and (b) have 16 samples in every column.

{head}
{chr(10).join(rows)}

Augmentation alone takes 16 drawings far on this domain. Most of what lies between (c) and (e) is the demo's generator:
it draws parts up to a pixel away from where the renderer has them, and small parts suffer most. The
[model card](model-card.md) has what a segmenter that never saw a label of ours finds in its images, class by class.

![mIoU against the number of samples](images/labels_train_models.png)
"""


def gate(figures: dict[str, Any]) -> str:
    area, gain, kept = (
        figures[key] for key in ("area_under_risk_coverage", "share_of_oracle_gain", "error_at_coverage_0.9")
    )
    rows = [
        f"| {title} | {100 * area[name]:.3f} | "
        + (f"{gain[name]:.1%}" if name in gain else "")
        + f" | {100 * kept[name]:.3f} |"
        for name, title in sorted(TITLES.items(), key=lambda item: area[item[0]])
    ]
    best = min(("sum", "top10_mean"), key=lambda name: area[name])
    verdict = "the better of the paper's two, and our default" if best == "sum" else "not the better of the paper's two"
    better = [TITLES[name] for name in gain if area[name] < area["sum"] and name != "top10_mean"]
    remark = f" Not from the paper, and better here: {', '.join(better)}." if better else ""
    return f"""## Does the gate work?

`python benchmarks/gate.py`

{figures["seeds"]:,} seeds that nobody has used; the error of a sample is the share of its pixels whose label differs
from the exact mask ({100 * figures["mean_error"]:.2f} % on average). Seeds are kept from the lowest score on; the area
under the risk-coverage curve is the mean error over all such cuts.

`sum` is {verdict}.{remark}

| Order by | Area under risk-coverage, % | Share of the oracle's gain | Error of the best 90 %, % |
| --- | --- | --- | --- |
{chr(10).join(rows)}

![Error against score, and risk against coverage](images/gate.png)
"""


def dataloader(figures: dict[str, Any]) -> str:
    rate, ratio = figures["samples_per_second"], figures["ratio_to_triton"]
    rows = [
        f"| DataLoader, {name.removeprefix('workers_')} workers | {rate[name]:.2f} | {ratio[name]:.3f} |"
        for name in rate
        if name.startswith("workers_")
    ]
    return f"""## What a trainer sees

`python benchmarks/dataloader.py`

Samples of `faces` per second on the same Triton: asked directly, and through gateway, gRPC and a PyTorch DataLoader.
Medians of {figures["rounds"]} interleaved rounds of {figures["samples"]} samples. Triton alone is asked for 6
samples at a time; each worker has a window of 8, so that more workers give larger batches.

| Way | Samples per second | Ratio to Triton |
| --- | --- | --- |
| Triton, asked directly | {rate["triton"]:.2f} | 1 |
{chr(10).join(rows)}
"""


SECTIONS = {"labels_train_models": labels_train_models, "gate": gate, "dataloader": dataloader}


def page() -> str:
    parts = [HEAD]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(section(json.loads(path.read_text())))
        else:
            parts.append(f"## {name}\n\nNot measured yet: `python benchmarks/{name}.py`.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "benchmarks.md").write_text(page())
