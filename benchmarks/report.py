"""Writes docs/benchmarks.md and docs/gpu.md from the results of the benchmarks.

Rules of this file:
- No number is written by hand: every figure comes from benchmarks/results.
- docs/gpu.md is the work of `gpu/page.py`.
- The page says which benchmarks have no results yet.

Run it as `python benchmarks/report.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import annotate.sections
import gpu.page
import numpy as np
from alternatives import JUDGED, OURS, RIVALS, TARGETS
from encoders import OWN_STRATEGY
from gate import TITLES
from growth import TITLES as GROWTH_TITLES
from interpreter import ARMS as ARMS_OF_INTERPRETER
from labels_train_models import ARMS, by_source
from latency import comparison
from load import PERCENTILES
from seed_index import BARS as BARS_OF_INDEX
from startup import PHASES
from train_segmenter import STEPS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Each section is one command. Compare ratios, not seconds: the machine had two cores and no GPU. `make bench` runs all
benchmarks; `python benchmarks/report.py` writes this page from their results.
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
        ("(c) minus (b), in points; target: 8", lambda b, c, e: f"{100 * (c - b):.1f}"),
        ("(c) relative to (e); target: 92 %", lambda b, c, e: f"{c / e:.1%}"),
        ("(e) minus (b), in points: the possible gain", lambda b, c, e: f"{100 * (e - b):.1f}"),
    ):
        rows.append(f"| {title} | " + " | ".join(bar(size, compared) for size in sizes) + " |")
    by_class = table_of_classes(runs, sizes[-1])
    return f"""## Do the labels train models?

`python benchmarks/labels_train_models.py`

A small segmentation network (`clients/pytorch/train_segmenter.py`) is trained on each source with the same number of
steps and tested on 1,000 exact renders, which no generator drew. The table has the mIoU by the number of different
training samples, as the mean over training seeds (their number in parentheses). (a) and (b) have 16 samples in every
column.

{head}
{chr(10).join(rows)}

The IoU of each class with {sizes[-1]:,} samples:

{by_class}

A run has {STEPS} steps. In so few, not even the exact renders of (e) teach the network the parts that the fewest images
have; the 16 images of (b) show each of them at least three times. So (e) itself is not far above (b). Between (c) and
(e), most is lost in hair and background: the generator draws neither the stripes of a wall nor curls. The
[model card](model-card.md) shows, class by class, what a segmenter that never saw labelmint's labels finds in the
generator's images.

![mIoU against the number of samples](images/labels_train_models.png)
"""


def table_of_classes(runs: list[dict[str, Any]], size: int) -> str:
    """Return a table with a row for each class and a column for each source, as means over training seeds."""
    columns = {arm: [run["iou"] for run in runs if run["arm"] == arm and run["samples"] in (16, size)] for arm in ARMS}
    measured = {arm: entries for arm, entries in columns.items() if entries}
    rows = [
        f"| {name} | " + " | ".join(f"{np.mean([iou[name] for iou in each]):.3f}" for each in measured.values()) + " |"
        for name in runs[0]["iou"]
    ]
    head = "| Class | " + " | ".join(f"({arm})" for arm in measured) + " |\n| --- |" + " --- |" * len(measured)
    return "\n".join([head, *rows])


def gate(figures: dict[str, Any]) -> str:
    area, gain, kept = (
        figures[key] for key in ("area_under_risk_coverage", "share_of_oracle_gain", "error_at_coverage_0.9")
    )
    rows = [
        f"| {f'`{name}`: {title}' if name in gain else title} | {100 * area[name]:.3f} | "
        + (f"{gain[name]:.1%}" if name in gain else "")
        + f" | {100 * kept[name]:.3f} |"
        for name, title in sorted(TITLES.items(), key=lambda item: area[item[0]])
    ]
    best = min(("sum", "top10_mean"), key=lambda name: area[name])
    verdict = "the better of the paper's two, and the default" if best == "sum" else "the worse of the paper's two"
    better = [f"`{name}`" for name in gain if area[name] < area["sum"] and name != "top10_mean"]
    remark = (
        f"""Better here, but not from the paper: {", ".join(better)}. `labelmint export --score-kind` offers them.
`sum` stays the default, because the gate promises a threshold of the JS divergence, and a model says so itself if its
score is of another kind. For a domain like this one, export with the best of the table."""
        if better
        else ""
    )
    by_class = figures["kept_of_rare_classes_at_coverage_0.9"]
    classes = list(by_class["sum"])
    rare = [f"| `{n}` | " + " | ".join(f"{share[c]:.1%}" for c in classes) + " |" for n, share in by_class.items()]
    return f"""## Does the gate work?

`python benchmarks/gate.py`

The benchmark uses {figures["seeds"]:,} seeds that no other step used. The error of a sample is the share of its pixels
whose label differs from the exact mask ({100 * figures["mean_error"]:.2f} % on average). The gate keeps the seeds with
the lowest scores. The area under the risk-coverage curve is the mean error over all such cuts.

`sum` is {verdict}.

{remark}

| Order by | Area under risk-coverage, % | Share of the oracle's gain | Error of the best 90 %, % |
| --- | --- | --- | --- |
{chr(10).join(rows)}

![Error against score, and risk against coverage](images/gate.png)

A gate may reject more of the seeds that have a rare part. Of the seeds with each rare class, a gate that keeps 90 % of
all seeds keeps:

| Order by | {" | ".join(classes)} |
| --- |{" --- |" * len(classes)}
{chr(10).join(rare)}
"""


def dataloader(figures: dict[str, Any]) -> str:
    rate, ratio = figures["samples_per_second"], figures["ratio_to_triton"]
    rows = [
        f"| DataLoader, {name.removeprefix('workers_')} workers | {rate[name]:.2f} | {ratio[name]:.3f} |"
        for name in rate
        if name.startswith("workers_")
    ]
    return f"""## How fast is a DataLoader?

`python benchmarks/dataloader.py`

Samples of `faces` per second on the same Triton: directly, and through gateway, gRPC and a PyTorch DataLoader. Figures
are medians of {figures["rounds"]} interleaved rounds of {figures["samples"]} samples. Direct requests ask Triton for 6
samples at a time. Each worker has a window of 8, so more workers make larger batches.

| Way | Samples per second | Ratio to Triton |
| --- | --- | --- |
| Triton, directly | {rate["triton"]:.2f} | 1 |
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
        ships = ", ships" if all(row[key] == value for key, value in figures["shipped"].items()) else ""
        swept.append(
            f"| {row['threshold']:g} | {row['form']} | {row['seconds']:g} s | {row['relative_cost']:.3f}{ships} |"
        )
    seconds = figures["gpu"]["seconds_of_a_batch"]
    nodes = figures["provisioning"]
    dearer = ", ".join(f"{arm['name']} {arm['relative_cost']:.2f}" for arm in others)
    return f"""## Which signal scales Triton best?

`python benchmarks/autoscaling.py`

A discrete-event simulation (`benchmarks/simulation/`) of gateways, Tritons, training jobs, nodes, Prometheus, KEDA and
the HorizontalPodAutoscaler, with the numbers of `k8s/overlays/gpu-scale-to-zero`. There was no GPU and no cluster, so
these times are predictions: a GPU takes {1000 * seconds[0]:.0f} ms for a batch of 1 and {1000 * seconds[-1]:.0f} ms
for a batch of 16; before a replica serves, the node takes {nodes["node_seconds"]:.0f} s, the image \
{nodes["image_seconds"]:.0f} s and the models {nodes["load_seconds"]:.0f} s.

Each other signal has the same limits and policies, its best target (in parentheses), and always one Triton, because
these signals do not exist without a Triton. Waits are those of training steps, in seconds, weighted by the time that
they cover. Goodput is the share of their time in which the jobs trained. The cost of a million samples is the GPU-hours
of Triton plus {figures["trainer_weight"]:g} times the hours in which the jobs' own GPUs (one each) wait, because
training GPUs are more expensive. Costs of the other signals relative to the shipped one, as geometric means over the
four workloads: {dearer}.

| Workload | Scaled by | Wait p50 | p95 | p99 | Goodput | GPU-hours per million | Waiting | Cost |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

![Tritons over time, and cost, for each workload and signal](images/autoscaling.png)

A sweep of the shipped signal's parameters (one seed), with costs relative to the shipped ones. The parameters are the
samples per Triton (owed, and waiting in Triton), how the queries join pods and moments, and the time that they look
back. "Mean of sums" sums over the pods of each moment, then averages. "Sum of means" averages each pod by itself, so it
counts a pod that has ended for as long as it looks back; it was shipped before. "Larger mean" is the larger one of the
means over 30 s and over the stated time.

| Samples per Triton | Form | Looks back | Cost |
| --- | --- | --- | --- |
{chr(10).join(swept)}
"""


def latency(figures: dict[str, Any]) -> str:
    rows = []
    for row in comparison(figures["rounds"]):
        calls = f"{row['concurrency']} callers" if "concurrency" in row else f"{row['load']:.0%} of that rate"
        cells = [
            cell
            for key in ("p50", "p95", "samples_per_second")
            for cell in (f"{row['measured'][key]:.2f}", f"{row['simulated'][key]:.2f}", f"{row['ratio'][key]:.2f}")
        ]
        rows.append(f"| {calls} | {' | '.join(cells)} |")
    return f"""## Does the simulator match the service?

`python benchmarks/latency.py`

One real gateway and one real Triton with `faces`, and the same calls in the simulator. The simulator's inputs are the
times of single batches in Triton, and how much two concurrent batches slow each other down, measured before and after
each point; it has no figures of the curve. Calls come in a closed loop, then as a Poisson process (at the measured
instants) with a share of the rate of 32 callers. Figures are medians of {len(figures["rounds"])} rounds; a ratio is
simulated to measured within a round. A test checks that the ratios of p50 and of samples per second are within 15 %.

| Calls | p50 measured, s | simulated | ratio | p95 | simulated | ratio | Samples per second | simulated | ratio |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

![Latency and throughput, measured and simulated](images/latency.png)
"""


def alternatives(figures: dict[str, Any]) -> str:
    servers, against, settings = figures["servers"], figures["against"], figures["settings"]
    judged = str(JUDGED)

    def cells(turn: str) -> str:
        each = servers[turn]
        rates = [f"{each[concurrency]['samples_per_second']['median']:.2f}" for concurrency in figures["calls"]]
        p50, p95 = (each[judged][key]["median"] for key in ("p50", "p95"))
        times = "" if turn == OURS else f"{each['labelmint_to_it']['median']:.2f}"
        return f"{' | '.join(rates)} | {p50:.2f} | {p95:.2f} | {times} |"

    def how(turn: str) -> str:
        each = settings[turn]
        return f"{each['workers']} x {each['threads']}, {each['batch']}"

    rows = [f"| **labelmint** | served | | {cells(OURS)}"]
    rows += [
        f"| {RIVALS[turn.split()[0]].title} | {turn.split()[1]} | {how(turn)} | {cells(turn)}" for turn in settings
    ]
    bars = []
    for kind, each in against.items():
        rate, tail = each["samples_per_second"], each["p95"]
        bars.append(
            f"| {kind} | {RIVALS[each['best'].split()[0]].title} | {rate['median']:.2f} ({rate['least']:.2f} to "
            f"{rate['most']:.2f}) | {tail['median']:.2f} ({tail['least']:.2f} to {tail['most']:.2f}) |"
        )
    known = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    counts = ", ".join(f"{count} at {concurrency}" for concurrency, count in figures["calls"].items())
    agreed = min(each["agreement"]["labels"] for each in servers.values())
    columns = " | ".join(f"Samples/s, {concurrency}" for concurrency in figures["calls"])
    return f"""## How do other servers compare?

`python benchmarks/alternatives.py`

The demo's model behind other servers, each written as its documentation advises, with batching on
(`benchmarks/rivals/`). Weights (in eager torch), outputs (raw bytes) and load are the same; at least {agreed:.3%} of
the label pixels agree with labelmint's. `reference` is the published interpreter (upsample and concatenate the
features, then one classifier after the other). `factored` is labelmint's torch module, which a rival has only by using
labelmint. Figures are medians of {figures["rounds"]} interleaved rounds on {figures["cores"]} cores. Calls that count
in each round: {counts} callers. Each rival has the settings with its highest rate at {JUDGED} callers.

Versions: {known}.

Targets at {JUDGED} callers: at least {TARGETS["reference"]:g} times the samples per second of the best rival with the
published interpreter and {TARGETS["factored"]:g} times with the factored one, and a lower p95 than both.

| Interpreter | Best rival | labelmint's samples/s to the best (least, most) | labelmint's p95 to the lowest |
| --- | --- | --- | --- |
{chr(10).join(bars)}

Settings are workers x torch threads per worker, largest batch. p50 and p95 (in seconds) and the last column, the ratio
of labelmint's rate to the server's, are at {JUDGED} callers.

| Server | Interpreter | Settings | {columns} | p50 | p95 | labelmint's ratio |
| --- | --- | --- | {"--- | " * len(figures["calls"])}--- | --- | --- |
{chr(10).join(rows)}

![Samples a second and p95 of each server](images/alternatives.png)
"""


def interpreter(figures: dict[str, Any]) -> str:
    arms = [arm for arm in ARMS_OF_INTERPRETER if arm in figures["cases"][0]]
    rows = []
    for row in figures["cases"]:
        case = f"{row['resolution']}², K = {row['classes']}"
        start = f"| {case} | {row['reference_seconds']:.2f} | {row['floor_seconds']:.2f}"
        cells = [
            f"{row[arm]['seconds']:.2f} | {row[arm]['times_faster']:.1f} | {row[arm]['share_of_floor']:.0%}"
            for arm in arms
        ]
        rows.append(f"{start} | {' | '.join(cells)} |")
    sizes = list(figures["extra_megabytes"][arms[0]])
    memory = [
        f"| {arm} | " + " | ".join(f"{by_size[r]:,.0f}" if r in by_size else "does not fit" for r in sizes) + " |"
        for arm, by_size in figures["extra_megabytes"].items()
    ]
    agreement = min(row[arm]["label_agreement"] for row in figures["cases"] for arm in arms)
    rounds, rate = figures["cases"][0]["rounds"], figures["rates"]["flops"] / 1e9
    head = "".join(f" | {arm}, s | times faster | share of the floor" for arm in arms)
    return f"""## How fast is the Style Interpreter?

`python benchmarks/interpreter.py`

The step as Triton serves it, one image at a time, with StyleGAN2's channel table and 10 classifiers, against the
paper's method in torch (`benchmarks/reference.py`: upsample all, concatenate, one classifier after the other). Figures
are medians of {rounds} interleaved rounds. The floor is the time of the linear layers' multiplications, each level at
its own resolution, at the best rate that this machine reached for a matrix product in the same run
({rate:.0f} GFlop/s on both cores); interpolation, exponentials and all else count as nothing. Labels agree with the
reference's at {agreement:.4%} of the pixels or more. At K = 34 the hidden layers are twice and four times as wide.
`onnx` is the shipped format in ONNX Runtime; `native` is the C kernel, which labelmint's own Triton runs on CPUs.

Targets at K = 20: 15 times faster at 256² and 30 times at 512², and 60 % of the floor at both.

| Case | Reference, s | Floor, s{head} |
| --- | --- | --- |{" --- | --- | --- |" * len(arms)}
{chr(10).join(rows)}

Memory that one image takes in addition to its features, MB, K = 20; target: at most 600 at 512² and 1,200 at 1024².

| | {" | ".join(f"{size}²" for size in sizes)} |
| --- |{" --- |" * len(sizes)}
{chr(10).join(memory)}

![Seconds an image and memory, by resolution](images/interpreter.png)
"""


LIBRARIES = {"onnxruntime": "ONNX Runtime", "torchscript": "TorchScript", "openvino": "OpenVINO"}
STEP_TITLES = {"generator": "generator", "style_interpreter": "Style Interpreter"}
GAIN = 0.2  # a library with a smaller gain is not worth a separate environment


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
            share = sum(floor["seconds"] for floor in model["floor"].values()) / call["call"]
            served.append(
                f"| {model['title']} | {batch} | {call['call']:.3f} | {share:.0%} | {' | '.join(cells)} "
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
        f"No other library is more than {GAIN:.0%} faster at any step, so ONNX Runtime serves both."
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

As served, one batch at a time, per sample; medians of {figures["rounds"]} interleaved rounds. The floor is the time of
the multiplications at {figures["machine"]["flops_per_second"] / 1e9:.0f} GFlop/s, or of the bytes at \
{figures["machine"]["bytes_per_second"] / 1e9:.0f} GB/s, both as measured in the same rounds. "Copied" is
the time that Triton counts for the steps' inputs and outputs. "Beyond" is the time of the call outside of the steps.
Targets: the floor's share of a call is at least 45 % at 128² and 60 % at 512².

| Model | Batch | Call, s | floor's share | Generator, s | of the call | floor's share \
| Interpreter, s | of the call | floor's share | Copied | Beyond |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(served)}

Each step alone, in its own process, in seconds per sample. "Times as fast" is relative to ONNX Runtime. "Floor's share"
is the floor as a share of ONNX Runtime's time.

| Model | Step | Batch{head} | Floor's share | Fastest |
| --- | --- | --- |{" --- | --- |" * len(present)} --- | --- |
{chr(10).join(alone)}

{advice}{missing}

Differences to ONNX Runtime's outputs: the share of differing values for integers, else the largest difference relative
to the largest value. The last column says whether a sample has the same bytes alone and in a batch. (TorchScript runs a
batch sample by sample.)

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
{base["channels"]} channels at each level,
with one parameter varied at a time; medians of {figures["rounds"]} interleaved rounds of {figures["repeats"]}. A slope
is that of the line through the logarithms: 1 is linear growth, 0 is none. From 32 classes on the hidden layers are
wider (256 and 128 instead of 128 and 32), hence the step in the plot.

| Against | From, to | Milliseconds per sample | Slope | Slope of the operations | Share of the floor |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Concurrent callers of the whole service (`faces`, gRPC, raw pixels):

| Callers | Samples per second | Median seconds of a call |
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
the same time. The figure is the proportional set size of each process in MB, from {figures["settled"]:,} samples on,
because caches and arenas fill before that. Growth is the slope of a straight line through it.

| Process | At {figures["settled"]:,} samples | At the end | MB per 1,000 samples |
| --- | --- | --- | --- |
{chr(10).join(rows)}

![Memory of each process over the samples](images/soak.png)
"""


def tax(figures: dict[str, Any]) -> str:
    closed, arrivals = figures["closed"], figures["arrivals"]
    concurrencies = list(next(iter(closed.values())))
    ratios = []
    for name, each in figures["ratios"].items():
        cells = [
            f"{each['by_concurrency'][c]['median']:.3f} ({each['by_concurrency'][c]['least']:.3f} to "
            f"{each['by_concurrency'][c]['most']:.3f})"
            for c in concurrencies
        ]
        bar = "" if each["bar"] is None else f"{each['bar']:.2f}"
        ratios.append(f"| {name} | {' | '.join(cells)} | {bar} |")

    def cells(each: dict[str, Any]) -> str:
        tails = " | ".join(f"{each[key]['median']:.2f}" for key in PERCENTILES)
        return f"{each['samples_per_second']['median']:.2f} | {tails} | {each['failures']}"

    loops = [
        f"| {way} | {callers} | {cells(each)} |"
        for way, by_callers in closed.items()
        for callers, each in by_callers.items()
    ]
    poisson = [f"| {way} | {cells(each)} |" for way, each in arrivals["ways"].items()]
    return f"""## What do the servers cost?

`python benchmarks/tax.py`

The same samples of `faces` (raw pixels) in four ways: through the gateway by gRPC and by REST (JSON, base64), from the
same Triton directly, and from one process that runs the two ONNX files without a server. That process has Triton's
session options and batches all waiting callers. It runs both steps in ONNX Runtime, and Triton runs the interpreter in
the C kernel, as `labelmint serve` does by default. Closed loops; medians of {figures["rounds"]} interleaved rounds on \
{figures["cores"]} cores.

Ratio of samples per second of one way to another, within a round (least, most):

| Ratio | {" | ".join(f"{c} callers" for c in concurrencies)} | Target, at least |
| --- |{" --- |" * len(concurrencies)} --- |
{chr(10).join(ratios)}

Percentiles are those of a call, in seconds, after the first round of a loop.

| Way | Callers | Samples/s | {" | ".join(PERCENTILES)} | Failures |
| --- | --- | --- |{" --- |" * len(PERCENTILES)} --- |
{chr(10).join(loops)}

Poisson arrivals at {arrivals["share"]:.0%} of the lowest rate of the served ways with {arrivals["callers"]} callers \
in the same round, {arrivals["rate"]["median"]:.2f} per second:

| Way | Samples/s | {" | ".join(PERCENTILES)} | Failures |
| --- | --- |{" --- |" * len(PERCENTILES)} --- |
{chr(10).join(poisson)}

![Samples a second and p95 by callers, and latencies of arrivals](images/tax.png)
"""


def gateway_cpu(figures: dict[str, Any]) -> str:
    rows = []
    for method, each in figures["methods"].items():
        servers, ratios = each["servers"], each["ratios"]
        seconds = " | ".join(f"{1e3 * server['cpu_seconds']['median']:.3f}" for server in servers.values())
        first = next(iter(ratios.values()))
        others = " | ".join(f"{ratio['median']:.2f}" for ratio in list(ratios.values())[1:])
        rows.append(
            f"| {method} | {seconds} | {first['median']:.2f} ({first['least']:.2f} to {first['most']:.2f}) | {others} |"
        )
    one = next(iter(figures["methods"].values()))
    servers, ratios = one["servers"], one["ratios"]
    return f"""## How much CPU does the gateway use?

`python benchmarks/gateway_cpu.py`

CPU milliseconds (user and system) of a server's process per sample, raw pixels, on a model of the demo's shapes that
computes nothing. `bare` is a grpc.aio server that has the same bytes ready. `relay` is the same server, but it first
requests each sample from Triton, as every gateway must. Figures are medians of {figures["rounds"]} interleaved rounds;
ratios are taken within a round.

Target: the gateway's time is at most {figures["bar"]:g} times the bare server's.

The gateway does not use shared memory with Triton. It would save copies of four bytes per pixel, which are a small part
of these figures and negligible next to the model, and a cancelled request would leave its region in use.

| Method | {" | ".join(f"{name}, ms" for name in servers)} | {" | ".join(ratios)} |
| --- |{" --- |" * (len(servers) + len(ratios))}
{chr(10).join(rows)}
"""


def encoders(figures: dict[str, Any]) -> str:
    rows = []
    for part, each in figures["encodings"].items():
        best = each["chosen"]
        own = {row["level"]: row for row in each["rows"] if row["strategy"] == OWN_STRATEGY}
        shown = [(f"the choice: level {best['level']}, {best['strategy']}", best), ("what ships", each["ships"])]
        shown += [(f"level {level}, {OWN_STRATEGY}", own[level]) for level in (0, 1, 6, 9)]
        for name, row in shown:
            rows.append(f"| {part} | {name} | {1e3 * row['seconds']:.2f} | {row['bytes']:,.0f} |")
    health = [
        f"| {name} | {each['samples_per_second']['median']:,.0f} | {1e3 * each['p50']['median']:.1f} "
        f"| {1e3 * each['p99']['median']:.1f} ({1e3 * each['p99']['least']:.1f} to {1e3 * each['p99']['most']:.1f}) |"
        for name, each in figures["health"].items()
    ]
    return f"""## Which PNG encoder settings are best?

`python benchmarks/encoders.py`

{figures["samples"]} samples of `faces`, encoded by Pillow at each level and strategy of zlib. The choice is the fastest
setting whose size is within {figures["allowed"] - 1:.0%} of the smallest size at level 6.

| Part | Encoder | Milliseconds per sample | Bytes |
| --- | --- | --- | --- |
{chr(10).join(rows)}

Does encoding delay other responses? /healthz while {figures["callers"]} callers request samples of a model that
computes nothing. Medians of {figures["rounds"]} interleaved rounds.

| Requested | Samples/s | /healthz p50, ms | p99, ms (least, most) |
| --- | --- | --- | --- |
{chr(10).join(health)}
"""


def startup(figures: dict[str, Any]) -> str:
    rows = [
        f"| {PHASES[name]} | {each['median']:.2f} | {each['least']:.2f} to {each['most']:.2f} |"
        for name, each in figures["phases"].items()
    ]
    ready, imports = figures["ready"], figures["imports"]
    return f"""## Where does the startup time go?

`python benchmarks/startup.py`

`labelmint serve` on the committed repository, with its files in the page cache. Times come from its log and Triton's.
It is ready after {ready["median"]:.2f} s ({ready["least"]:.2f} to {ready["most"]:.2f}), the median of \
{figures["starts"]} starts; target: under {figures["bar"]:g} s.

| Phase | Seconds | Least to most |
| --- | --- | --- |
{chr(10).join(rows)}

Imports, which are part of the first phase, take {imports["median"]:.2f} s alone.
"""


def triton_memory(figures: dict[str, Any]) -> str:
    def mebibytes(case: dict[str, Any]) -> str:
        return f"{case['measured']['least']:,.0f} to {case['measured']['most']:,.0f}"

    def seconds(host: dict[str, Any]) -> str:
        wall, cpu = host["seconds"], host["cpu_seconds"]
        return f"{wall['median']:.2f} ({wall['least']:.2f} to {wall['most']:.2f}), {cpu['median']:.2f}"

    cases = [
        f"| {', '.join(case['ensembles'])} | {mebibytes(case)} | {case['estimated']:,.0f} "
        f"| {case['estimated'] / case['measured']['most']:.2f} |"
        for case in figures["memory"]
    ]
    arms = [
        f"| {arm} | {each['threads']} | {seconds(each['idle'])} | {seconds(each['busy'])} |"
        for arm, each in figures["threads"].items()
    ]
    return f"""## How much memory does Triton need, and what do its threads cost?

`python benchmarks/triton_memory.py`

Each run is a process that uses ONNX Runtime {figures["onnxruntime"]} as Triton's native backend does: a session and an
arena for each model, one batch at a time in each. It is not NVIDIA's container, whose server adds to this.

MiB at the peak, least to most of {figures["runs"]} runs, and the estimate that `labelmint export` prints, here without
the {figures["triton"]:.0f} MiB that it adds for the server. All steps work at the same time on batches of mixed sizes.

| Ensembles | Measured | Estimated | Estimated / most |
| --- | --- | --- | --- |
{chr(10).join(cases)}

One caller requests single samples of `faces`, with `faces_keypoints` loaded too. The host's {figures["cores"]} cores
are idle, or as many other processes keep them busy. Seconds per sample are medians (least to most) of {figures["runs"]}
interleaved runs of {figures["samples"]} samples; after the comma, the CPU seconds that the process took for a sample.

| Threads of ONNX Runtime | In the process | Idle host, s | Busy host, s |
| --- | --- | --- | --- |
{chr(10).join(arms)}
"""


def seed_index(figures: dict[str, Any]) -> str:
    def cells(name: str) -> str:
        each = figures[name]
        return f"{each['median']:.3g} | {each['least']:.3g} to {each['most']:.3g}"

    rows = [f"| {title} | {bar:g} | {cells(name)} |" for name, (title, bar) in BARS_OF_INDEX.items()]
    others = {
        "the same list again: seconds": "list_again_seconds",
        f"ListSeeds of all {figures['seeds']:,} seeds: seconds": "list_all_seconds",
        "any first sample: seconds": "first_any_seconds",
        "first sample of the class of one seed in 1,000 without an index, relative to any": "first_scarce_without",
        "rate of an unfiltered stream: samples a second": "rate_any",
        "rate of the class of one seed in 50 without an index, relative to an unfiltered stream": "rate_common_without",
        f"executions for a stream of {figures['streamed']:,} samples, window {figures['window']}": "executions",
    }
    rows += [f"| {title} | | {cells(name)} |" for title, name in others.items()]
    return f"""## What does an index of seeds cost, and what does it spare?

`python benchmarks/seed_index.py`

A gateway with an index of {figures["seeds"]:,} seeds of {figures["classes"]} classes, and one without, ask the same
Triton. The model computes almost nothing, so times are the gateway's. Medians of {figures["rounds"]} interleaved
rounds.

| Measured | Target | Median | Least to most |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def shuffled(figures: dict[str, Any]) -> str:
    rows = [
        f"| {workers} | {figures['rates'][f'stream_{workers}']['median']:.1f} "
        f"| {figures['rates'][f'shuffled_{workers}']['median']:.1f} "
        f"| {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f}) |"
        for workers, ratio in figures["ratios"].items()
    ]
    return f"""## What does shuffling cost?

`python benchmarks/shuffled.py`

A shuffled DataLoader over `LabeledSamples`, and one over the stream of the same seeds of the demo, 0 to
{figures["seeds"]}, in batches of {figures["batch"]}. Medians of {figures["rounds"]} interleaved rounds; target: \
{figures["bar"]:g} of the stream.

| Workers | Stream, samples/s | Shuffled, samples/s | Ratio (least to most) |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""


SECTIONS = {
    "interpreter": interpreter,
    "labels_train_models": labels_train_models,
    "gate": gate,
    "dataloader": dataloader,
    "shuffled": shuffled,
    "seed_index": seed_index,
    "autoscaling": autoscaling,
    "latency": latency,
    "tax": tax,
    "gateway_cpu": gateway_cpu,
    "encoders": encoders,
    "startup": startup,
    "triton_memory": triton_memory,
    "alternatives": alternatives,
    "pair": pair,
    "growth": growth,
    "soak": soak,
    "annotate_simulate": annotate.sections.simulate,
    "annotate_latency": annotate.sections.latency,
    "annotate_quick": annotate.sections.quick,
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
    gpu.page.main()
