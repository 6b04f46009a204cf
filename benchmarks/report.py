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
from growth import TITLES as GROWTH_TITLES
from labels_train_models import ARMS, by_source
from latency import comparison

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


def autoscaling(figures: dict[str, Any]) -> str:
    ours, *others = figures["signals"]
    titles = figures["scenarios"]
    rows = []
    for column, title in enumerate(titles.values()):
        for arm in figures["signals"]:
            out = arm["outcomes"][column]
            at = "" if arm["target"] is None else f" ({arm['target']:g})"
            rows.append(
                f"| {title if arm is ours else ''} | {arm['name']}{at} "
                f"| {out['wait_p50']:.2f} | {out['wait_p95']:.1f} | {out['wait_p99']:.1f} | {out['goodput']:.1%} "
                f"| {out['gpu_hours_per_million']:.2f} | {out['waiting_hours_per_million']:.2f} | {out['cost']:.2f} |"
            )
    swept = []
    for row in figures["sweep"]:
        leave = f"{row['down_percent']} %, at least 1" if row["down_percent"] else "1"
        ships = ", ships" if all(row[key] == value for key, value in figures["shipped"].items()) else ""
        swept.append(
            f"| {row['demand']:g} | {row['waiting']:g} | {row['demand_seconds']:g} s | {row['waiting_seconds']:g} s "
            f"| {row['up_seconds']:g} s | {leave} "
            f"| {row['relative_cost']:.3f}{ships} |"
        )
    seconds = figures["gpu"]["seconds_of_a_batch"]
    nodes = figures["provisioning"]
    dearer = ", ".join(f"{arm['name']} {arm['relative_cost']:.2f}" for arm in others)
    return f"""## What is Triton best scaled by?

`python benchmarks/autoscaling.py`

A discrete-event simulation (`benchmarks/simulation/`): gateways, Tritons, training jobs, nodes, Prometheus, KEDA and
the HorizontalPodAutoscaler, with the numbers of `k8s/overlays/gpu-scale-to-zero`. No GPU and no cluster was at hand. A
prediction is what a GPU takes for 1 ({1000 * seconds[0]:.0f} ms) and for 16 ({1000 * seconds[-1]:.0f} ms), and
what comes before a replica serves: {nodes["node_seconds"]:.0f} s for a node, {nodes["image_seconds"]:.0f} s for the
image, {nodes["load_seconds"]:.0f} s for the models.

Each other signal has the same limits and policies, the best of its targets (in parentheses), and one Triton always,
since without one there is no such signal. Waits are those of training steps, in seconds, weighted by the time that they
cover. Goodput is the share of their time in which the jobs trained. Cost of a million samples: GPU-hours of Triton, and
{figures["trainer_weight"]:g} times those of the jobs' own GPUs (one each) that wait, since training runs on dearer
ones. Over the four workloads (geometric mean) the others cost, against ours: {dearer}.

| Workload | Scaled by | Wait p50 | p95 | p99 | Goodput | GPU-hours a million | Waiting | Cost |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

![Tritons over time, and cost, for each workload and signal](images/autoscaling.png)

The sweep of our own parameters (one seed), by cost against what ships: samples owed a Triton, samples that wait in
a Triton, the time over which each is averaged (0: the newest scrape), the period in which the number may double (or 4
be added), and what may leave a minute.

| Owed | Waiting | Owed over | Waiting over | Up every | Down a minute | Cost |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(swept)}
"""


def latency(measured: dict[str, Any]) -> str:
    rows = []
    for row in comparison(measured):
        calls = f"{row['concurrency']} callers" if "concurrency" in row else f"{row['rate']:.1f} arrivals a second"
        real, simulated = row["measured"], row["simulated"]
        rows.append(
            f"| {calls} | {real['p50']:.2f} | {simulated['p50']:.2f} "
            f"| {real['samples_per_second']:.2f} | {simulated['samples_per_second']:.2f} |"
        )
    return f"""## Does the simulator say what the service does?

`python benchmarks/latency.py`

One real gateway and one real Triton with `faces`, and the same calls in the simulator. It knows what Triton takes for
batches alone, and how much two at once slow each other down; nothing of the curve. Calls in a closed loop, then as a
Poisson process (at the measured instants). A test holds p50 and samples a second within 15 % of what was measured.

| Calls | p50 measured, s | simulated | Samples a second measured | simulated |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

![Latency and throughput, measured and simulated](images/latency.png)
"""


LIBRARIES = {"onnxruntime": "ONNX Runtime", "torchscript": "TorchScript", "openvino": "OpenVINO"}
STEP_TITLES = {"generator": "generator", "style_interpreter": "Style Interpreter"}
GAIN = 0.2  # below which a library is not worth an environment of its own


def pair(figures: dict[str, Any]) -> str:
    models = figures["models"].values()
    served = []
    for model in models:
        for batch, call in model["served"].items():
            steps = [
                sum(seconds for phase, seconds in step.items() if phase != "queue") for step in call["steps"].values()
            ]
            cells = [
                f"{seconds:.3f} | {seconds / call['call']:.0%} | {floor['seconds'] / seconds:.0%}"
                for seconds, floor in zip(steps, model["floor"].values(), strict=True)
            ]
            copied = sum(step["compute_input"] + step["compute_output"] for step in call["steps"].values())
            served.append(
                f"| {model['title']} | {batch} | {call['call']:.3f} | {' | '.join(cells)} "
                f"| {copied / call['call']:.1%} | {1 - sum(steps) / call['call']:.1%} |"
            )
    present = list(next(iter(models))["alone"]["generator"])
    alone, remarks = [], []
    for model in models:
        for step, by_library in model["alone"].items():
            for batch in by_library["onnxruntime"]:
                seconds = {library: by_library[library][batch]["median"] for library in present}
                ours, best = seconds["onnxruntime"], min(seconds, key=lambda library: seconds[library])
                cells = [f"{seconds[library]:.3f} | {ours / seconds[library]:.2f}" for library in present]
                alone.append(
                    f"| {model['title']} | {STEP_TITLES[step]} | {batch} | {' | '.join(cells)} "
                    f"| {model['floor'][step]['seconds'] / ours:.0%} | {LIBRARIES.get(best, best)} |"
                )
                if ours / seconds[best] > 1 + GAIN:
                    kept = model["agreement"][step][best]["same_bytes_in_a_batch"]
                    remarks.append(
                        f"{LIBRARIES.get(best, best)} runs the {STEP_TITLES[step]} of {model['title']} (batch {batch}) "
                        f"{ours / seconds[best] - 1:.0%} faster"
                        + {
                            True: ", with a sample's bytes the same in a batch.",
                            False: ", but a batch changes a sample's bytes.",
                        }.get(kept, ".")
                    )
    advice = " ".join(remarks) or (
        f"No other library is more than {GAIN:.0%} faster at any step, so that ONNX Runtime serves both."
    )
    agreement = []
    for library in present:
        if library == "onnxruntime":
            continue
        steps = [model["agreement"][step][library] for model in models for step in STEP_TITLES]
        worst = {
            name: max((each["difference"].get(name, 0.0) for each in steps), default=0.0)
            for name in ("image", "label", "js_map", "js_score")
        }
        features = max(v for each in steps for name, v in each["difference"].items() if name.startswith("features_"))
        same = {each["same_bytes_in_a_batch"] for each in steps} - {None}
        agreement.append(
            f"| {LIBRARIES.get(library, library)} | {worst['image']:.1e} | {features:.1e} | {worst['label']:.1e} "
            f"| {worst['js_map']:.1e} | {worst['js_score']:.1e} | {'yes' if same == {True} else 'no'} |"
        )
    head = "".join(f" | {LIBRARIES.get(library, library)}, s | times as fast" for library in present)
    missing = "" if "openvino" in present else " OpenVINO was not measured: `make openvino` sets it up.\n"
    return f"""## Where does a pair's time go?

`python benchmarks/pair.py`

As served, one batch at a time, per sample; medians of {figures["rounds"]} interleaved rounds. The floor is what the
multiplications must take at {figures["machine"]["flops_per_second"] / 1e9:.0f} GFlop/s, or the bytes at \
{figures["machine"]["bytes_per_second"] / 1e9:.0f} GB/s, as measured in the same rounds. "Copied" is what Triton counts
for the steps' inputs and outputs, "beyond" what the call takes outside of the steps.

| Model | Batch | Call, s | Generator, s | of the call | floor's share | Interpreter, s | of the call | floor's share \
| Copied | Beyond |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(served)}

Each step alone, in its own process, seconds a sample; "times as fast" is against ONNX Runtime, whose share of the floor
is the last figure but one.

| Model | Step | Batch{head} | Floor's share | Fastest |
| --- | --- | --- |{" --- | --- |" * len(present)} --- | --- |
{chr(10).join(alone)}

{advice}{missing}

Against ONNX Runtime's outputs: the share of whole numbers that differ, and the largest difference relative to the
largest value; and whether a sample has the same bytes alone and in a batch. (TorchScript runs it sample by sample.)

| Library | Image | Features | Label | JS map | JS score | Same bytes in a batch |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(agreement)}

![Shares of a call's time, and the steps by library](images/pair.png)
"""


def growth(figures: dict[str, Any]) -> str:
    base, rows = figures["base"], []
    for axis, found in figures["axes"].items():
        first, last = found["rows"][0], found["rows"][-1]
        squared = "²" if axis == "resolution" else ""
        shares = " to ".join(f"{row['floor_seconds'] / row['seconds']:.0%}" for row in (first, last))
        rows.append(
            f"| {GROWTH_TITLES[axis]} | {first['value']}{squared} to {last['value']}{squared} "
            f"| {1000 * first['seconds']:.1f} to {1000 * last['seconds']:.1f} | {found['slope']:.2f} "
            f"| {found['floor_slope']:.2f} | {shares} |"
        )
    callers = [
        f"| {row['value']} | {row['samples_per_second']:.2f} | {row['call_seconds']:.2f} |"
        for row in figures["concurrency"]["rows"]
    ]
    return f"""## How does the cost grow?

`python benchmarks/growth.py`

The Style Interpreter's step in ONNX Runtime, {base["resolution"]}², N = {base["heads"]}, K = {base["classes"]}, \
{base["channels"]} channels at each level, one thing varied at a time; medians of {figures["rounds"]} interleaved \
rounds of {figures["repeats"]}. A slope is that of the line through the logarithms: 1 is linear, 0 is none. The hidden
layers are wider from 32 classes on (256 and 128 in place of 128 and 32), which is the step in the plot.

| Against | From, to | Milliseconds a sample | Slope | Slope of the operations | Share of the floor |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Concurrent callers of the whole service (`faces`, gRPC, raw pixels):

| Callers | Samples a second | Median seconds of a call |
| --- | --- | --- |
{chr(10).join(callers)}

![Cost against resolution, heads, classes, batch; throughput against callers](images/growth.png)
"""


def soak(figures: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {row['settled_mb']:.1f} | {row['end_mb']:.1f} | {row['mb_per_1000']:+.3f} |"
        for name, row in figures["processes"].items()
    ]
    return f"""## Does memory stay flat?

`python benchmarks/soak.py`

{figures["samples"]:,} samples of a small model (32²) through `labelmint serve`, by gRPC streams, gRPC calls and REST at
once. Proportional set size of each process, MB, from {figures["settled"]:,} samples on, when caches and arenas have
filled; growth is the slope of the line through it.

| Process | At {figures["settled"]:,} samples | At the end | MB per 1,000 samples |
| --- | --- | --- | --- |
{chr(10).join(rows)}

![Memory of each process over the samples](images/soak.png)
"""


SECTIONS = {
    "labels_train_models": labels_train_models,
    "gate": gate,
    "dataloader": dataloader,
    "autoscaling": autoscaling,
    "latency": latency,
    "pair": pair,
    "growth": growth,
    "soak": soak,
}


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
