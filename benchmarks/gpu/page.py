"""Writes docs/gpu.md from what was computed (gpu_plan.json) and what was measured on a GPU (gpu.json, if it exists).

Rules of this file:
- No number is written by hand. Without measurements the page says that there are none.
- What a run did not measure is named, with the reason that the run gave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
PICTURE = ROOT / "docs" / "images" / "gpu.png"
NOT_MEASURED = "Nothing on this page was measured on a GPU"
TITLES = {"tf32": "TF32", "float16": "FP16"}
PARTS = {"pair": "Pair", "interpreter": "Style Interpreter", "generator": "Generator"}
Figures = dict[str, Any]


def page(plan: Figures, measured: Figures | None) -> str:
    parts = [head(measured), choose(plan), serve(), identity()]
    parts += [measurements(measured)] if measured is not None else []
    parts += [predicted(plan, measured), repeat(), without_kernel(plan)]
    return "\n".join(parts)


def head(measured: Figures | None) -> str:
    if measured is None:
        said = f"""**{NOT_MEASURED}**: there was none. Times are predictions, which `python benchmarks/gpu_plan.py`
computes. [One command](#measure-your-gpu) measures your GPU."""
    else:
        said = f"""Measured on {measured["machine"].get("name", "an unknown machine")} with
`python benchmarks/gpu/measure.py`. Times that are called predicted are computed by `python benchmarks/gpu_plan.py`."""
    return f"""# On a GPU: what to choose, and what to expect

{said}
"""


def choose(plan: Figures) -> str:
    features, crossing = plan["features_bytes"] / 1e6, 1000 * plan["crossing_seconds"]
    return f"""## Choose

| GPU | Format | Generator | Interpreter |
| --- | --- | --- | --- |
| A100, H100, H200, B200 | `gpu` | ONNX Runtime with CUDA | labelmint's kernel, which has tiles for these GPUs |
| others | `gpu` or `onnx` | ONNX Runtime with CUDA | measure both; `onnx` needs no additional package |

- **Precision.** `float16` is the default and the fastest. The kernel turns each overflow into NaN, and every gate
  rejects NaN. The export refuses `float16` if the features of its samples exceed that range. Then use `bfloat16`, which
  has fewer digits, or `tf32`. `float32` is the reference.
- **Provider of the generator.** CUDA. TensorRT fuses more operators, but its first start builds an engine for minutes.
- **Pool.** Features stay on the GPU only if Triton's CUDA pool holds them. A sample at {plan["resolution"]}² has
  {features:.0f} MB of features. Without room in the pool they cross PCIe twice, which takes at least {crossing:.0f} ms.
  The export writes a size that holds two samples.
- **Instances.** One of each step per GPU: the two steps then work on different samples at the same time. More instances
  need more memory, and help only where kernels are too small to fill the GPU, at 256² and below.
- **Threshold.** Rounding moves scores, so calibrate on the Triton that serves: `labelmint calibrate --triton-url`
  ([how](your-generator.md#5-calibrate-the-gate)).
"""


def serve() -> str:
    return """## Serve it

`labelmint export --format gpu --precision float16` ([formats](your-generator.md)) writes:

- `NAME_style_interpreter/1/`: the weights, the kernel, and a model of Triton's Python backend, which takes the features
  on the GPU (`FORCE_CPU_ONLY_INPUT_TENSORS=no`).
- `NAME_generator/1/model.onnx`: the generator for ONNX Runtime with CUDA, one sample at a time.
- `triton.env`: the size of the CUDA pool.

The Kustomize component `gpu-kernel` serves these files in NVIDIA's container with torch, the Triton language and a C
compiler. [Models for GPUs](deploying.md#models-for-gpus) says how to build the image. The kernel is compiled when the
model is loaded. The Triton that `labelmint serve` starts refuses this format, because it runs on CPUs.
"""


def identity() -> str:
    return """## Identity

The kernel labels one sample at a time, sums in a fixed order and uses no atomic operations. So the interpreter gives a
sample the same bytes in any batch, on GPUs of one architecture. The generator does not guarantee this: cuDNN and
TensorRT choose kernels by shape, so the size of a batch may change the last bits. The export therefore serves it with
`max_batch_size: 1`.
"""


# ---- measured --------------------------------------------------------------------------------------------------------


def measurements(measured: Figures) -> str:
    sections = [machine_of(measured)]
    for case in measured["cases"].values():
        tables = [arms_table(title, case["arms"][part], case["batches"]) for part, title in PARTS.items()]
        found = [table for table in tables if table]
        sections.append(f"### {case['resolution']}², K = {case['classes']}\n")
        sections += found or ["Not measured.\n"]
    sections += [soak_of(measured["soak"]), service_of(measured["service"]), missing_of(measured)]
    return "\n".join(["## Measured\n", *(section for section in sections if section)])


def machine_of(measured: Figures) -> str:
    machine = measured["machine"]
    if "missing" in machine:
        return f"The machine is not known: {machine['missing']}.\n"
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    partial = "" if measured["complete"] else " The run was ended early."
    rows = []
    for name, figures in next(iter(measured["cases"].values()))["arms"]["machine"].items():
        each = figures.get("batches", {}).get("1", {})
        if "flops_per_second" in each:
            rows.append(f"| {name} | {each['flops_per_second'] / 1e12:.3g} TFlop/s |")
        elif "bytes_per_second" in each:
            rows.append(f"| {name} | {each['bytes_per_second'] / 1e12:.3g} TB/s, read and written |")
    return f"""{machine.get("name")}, driver {machine.get("driver", "none")}, commit {str(machine["commit"])[:12]};
{packages}.{partial}

Times are those of the device, in the median (10th to 90th percentile) of calls
that take turns with the other arms. Nothing is copied to the host. Labels and JS map are compared with `float32`.

| The machine's own rate | |
| --- | --- |
{chr(10).join(rows)}
"""


def arms_table(title: str, arms: Figures, batches: list[int]) -> str:
    rows = []
    for name, figures in arms.items():
        if "missing" in figures:
            continue
        one = figures["batches"].get("1", {})
        cells = [milliseconds(one), *(rate(figures["batches"].get(str(batch), {})) for batch in batches)]
        cells += [share(one, figures.get("kernels")), megabytes(one), *agreement(figures)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    if not rows:
        return ""
    columns = " | ".join(f"per second, batch {batch}" for batch in batches)
    return f"""| {title} | ms | {columns} | of GEMM | MB | Labels | JS map | Same bytes |
| --- | --- |{" --- |" * len(batches)} --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def milliseconds(batch: Figures) -> str:
    if "seconds" not in batch:
        return "not measured"
    low, median, high = (1000 * batch["seconds"][key] for key in ("low", "median", "high"))
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def rate(batch: Figures) -> str:
    return f"{batch['samples_per_second']:.4g}" if "samples_per_second" in batch else "not measured"


def share(batch: Figures, kernels: Mapping[str, float] | None) -> str:
    """Return the share of the machine's own GEMM rate, and without the time between kernels where that is known."""
    if "share_of_gemm" not in batch:
        return ""
    found = f"{batch['share_of_gemm']:.0%}"
    if kernels:
        inside = batch["share_of_gemm"] * batch["seconds"]["median"] / sum(kernels.values())
        found += f" ({inside:.0%} inside kernels)"
    return found


def megabytes(batch: Figures) -> str:
    return f"{batch['peak_bytes'] / 1e6:,.0f}" if batch.get("peak_bytes") is not None else ""


def agreement(figures: Figures) -> list[str]:
    """Return the cells of labels and JS map (features, for a generator) relative to float32, and of identity."""
    labels = f"{figures['label_agreement']:.3%}" if "label_agreement" in figures else ""
    difference = figures.get("js_map_difference", figures.get("features_difference"))
    broken = ", ".join(where for where, same in figures["same_bytes"].items() if not same)
    return [labels, "NaN" if difference is None else f"{difference:.1e}", f"not {broken}" if broken else "yes"]


def soak_of(soak: Figures) -> str:
    if "missing" in soak:
        return ""
    rates, clocks = soak["by_interval"], soak["clocks"]
    said = f"""### Pairs without a pause

`{soak["pair"]}`, {soak["case"]}, for {soak["seconds"]:.0f} s: {soak["samples_per_second"]:.1f} pairs a second,
{min(rates):.1f} to {max(rates):.1f} in each interval. """
    if isinstance(clocks, list):
        for key, unit in (("sm_mhz", "MHz"), ("celsius", "°C"), ("watts", "W")):
            values = [each[key] for each in clocks if key in each]
            said += f"{min(values):.0f} to {max(values):.0f} {unit}. " if values else ""
    same = "the same bytes" if soak["same_bytes_at_the_end"] else "other bytes"
    return f"{said}The first sample had {same} at the end.\n"


def service_of(service: Figures) -> str:
    if "missing" in service:
        return ""
    rows = [
        f"| {callers} | {each['samples_per_second']:.2f} | "
        + " | ".join(f"{1000 * seconds:.1f}" for seconds in each["step_seconds"].values())
        + " |"
        for callers, each in service["callers"].items()
    ]
    return f"""### The wheel's Triton

{service["case"]}, exported as `{service["format"]}`, on {service["device"]}.

| Callers | Samples per second | Generator, ms | Interpreter, ms |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def missing_of(measured: Figures) -> str:
    rows = [f"| {name} | {why} |" for name, why in missing(measured).items()]
    if not rows:
        return ""
    return f"""### Not measured

| What | Why |
| --- | --- |
{chr(10).join(rows)}
"""


def missing(found: Any, path: tuple[str, ...] = ()) -> dict[str, str]:
    """Return every figure that was not measured, by its path, and why."""
    if not isinstance(found, dict):
        return {}
    if "missing" in found:
        return {" ".join(path): found["missing"]}
    return {name: why for key, value in found.items() for name, why in missing(value, (*path, key)).items()}


# ---- predicted -------------------------------------------------------------------------------------------------------


def predicted(plan: Figures, measured: Figures | None) -> str:
    low, high = plan["reached"]
    return f"""## Predicted

StyleGAN2 with its own channels (config F) at {plan["resolution"]}², 10 classifiers, one sample.

- *Floor*: the necessary operations and bytes at the published rates. No implementation is faster.
- *Kernel*: the operations and bytes of labelmint's kernel, counted from its own tiling with all padding. It is assumed
  to reach {low:.0%} to {high:.0%} of the published rates, and a launch to cost {1e6 * plan["launch_seconds"]:.0f} µs.
- *With*: pairs with the kernel, one after the other. The generator lies between TensorRT's best case (operators fused)
  and a kernel for each operator.
- *Without*: pairs whose interpreter runs in ONNX Runtime or torch. Its hidden layer crosses the memory once for each
  convolution.

| GPU | K | Precision | Interpreter: floor, ms | kernel, ms | measured, ms | Pairs/s: floor | with | without |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(prediction_row(row, plan, measured) for row in plan["predictions"])}

![Pairs a second, predicted](images/gpu.png)

The compiler of the Triton language needs no GPU to say what the kernel takes of a multiprocessor. Occupancy is the
share of its threads. It is low, because a program keeps its tile in registers and shared memory, so the kernel must
hide latency within a program. This is the largest risk of the prediction.

| GPU | K | Precision | Tile | Warps | Registers | Spilled, bytes | Shared, KiB | Occupancy |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(resource_row(row) for row in plan["predictions"] if row["gpu"] != "H200 SXM")}

Published dense rates, from NVIDIA's data sheets of the
[A100](https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf),
[H100](https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet) and
[H200](https://www.nvidia.com/en-us/data-center/h200/) (with sparsity there: twice as high), and from a
[collection of NVIDIA's figures](https://glennklockwood.com/garden/processors/B200) for the B200:

| GPU | TF32, TFlop/s | FP16, TFlop/s | Memory, TB/s |
| --- | --- | --- | --- |
{chr(10).join(published_row(gpu) for gpu in plan["gpus"])}
"""


def prediction_row(row: Figures, plan: Figures, measured: Figures | None) -> str:
    kernel = [1000 * seconds for seconds in row["kernel_seconds"]]
    cells = [
        f"{1000 * row['floor']['style_interpreter']:.1f}",
        f"{kernel[0]:.1f} to {kernel[1]:.1f}",
        measured_cell(row, plan, measured),
        f"{row['pairs_at_the_floor']:.0f}",
        "{:.0f} to {:.0f}".format(*row["pairs_with_kernel"]),
        "{:.0f} to {:.0f}".format(*row["pairs_without"]),
    ]
    return f"| {row['gpu']} | {row['classes']} | {TITLES[row['precision']]} | {' | '.join(cells)} |"


def measured_cell(row: Figures, plan: Figures, measured: Figures | None) -> str:
    """Return the kernel's measured milliseconds, if this row's GPU was measured."""
    if measured is None or row["gpu"].split()[0] not in str(measured["machine"].get("name")):
        return "not measured"
    case = measured["cases"].get(f"r{plan['resolution']}_k{row['classes']}")
    arm = case["arms"]["interpreter"][f"kernel_{row['precision']}"] if case else {}
    return milliseconds(arm.get("batches", {}).get("1", {}))


def resource_row(row: Figures) -> str:
    kernel, gpu = row["kernel"], row["gpu"].replace("H100 SXM", "H100, H200")
    return (
        f"| {gpu} | {row['classes']} | {TITLES[row['precision']]} | {kernel['tile']} | {kernel['warps']} "
        f"| {kernel['registers']} | {kernel['spilled_bytes']} | {kernel['shared_bytes'] / 1024:.0f} "
        f"| {kernel['occupancy']:.1%} |"
    )


def published_row(gpu: Figures) -> str:
    return (
        f"| {gpu['name']} | {gpu['tf32_flops'] / 1e12:.0f} | {gpu['fp16_flops'] / 1e12:.0f} "
        f"| {gpu['bytes_per_second'] / 1e12:.2f} |"
    )


def repeat() -> str:
    return """## Measure your GPU

```text
python benchmarks/gpu/measure.py --out benchmarks/results/gpu.json
python benchmarks/report.py
```

The first command ends within 8 minutes (`--minutes`). It needs a clone of this repository, PyTorch with CUDA, the
Triton language, numpy and onnx. It uses no network and installs nothing. If ONNX Runtime with CUDA is installed, it
measures that too. It writes its file after every figure, so a run that is ended early leaves a valid file, which names
what is missing and why. The second command writes this page; it needs `.venv-test`.

`make bench` leaves it out, because it needs a GPU. `--device cpu --tiny` rehearses it on a CPU, where Triton's
interpreter runs the kernel.
"""


def without_kernel(plan: Figures) -> str:
    strips = "\n".join(
        f"| {row['rows']} | {row['kernels']:,} | {1000 * row['launching_seconds']:.0f} |" for row in plan["strips"]
    )
    cpu = "\n".join(
        f"| {row['model']} | `{row['step']}` | {row['fused']:.2f} | {row['single']:.2f} | {row['measured']:.2f} |"
        for row in plan["cpu"]
    )
    return f"""## Without the kernel

NVIDIA's container serves an `onnx` repository unchanged: ONNX Runtime uses CUDA by itself if there is a GPU.
`k8s/components/gpu` gives each Triton one GPU. Enlarge the CUDA pool to the features of two samples, at
{plan["resolution"]}² with `--cuda-memory-pool-byte-size=0:{2 * plan["features_bytes"]}`.

TensorRT can run the generator of any ONNX export: replace the accelerator in its `config.pbtxt`. An engine fits one
kind of GPU and one version of TensorRT, so keep `trt_engine_cache_path` on a volume that outlives the pod. FP16 changes
images and labels: compare them, and calibrate again. `FP32` still uses TF32.

```text
{plan["tensorrt"]}
```

The ONNX and TorchScript files of the interpreter work in strips of 32 rows, which suits the caches of CPUs. On a GPU,
larger strips need fewer kernels and more memory:

| Rows | Kernels, fused | Launching them, ms |
| --- | --- | --- |
{strips}

A check of the prediction's method on the CPU of the [benchmarks](benchmarks.md): the sums with that CPU's measured
rates, and ONNX Runtime's measured time. Seconds per sample.

| Model | Step | Fused | Operator by operator | Measured |
| --- | --- | --- | --- | --- |
{cpu}
"""


# ---- files -----------------------------------------------------------------------------------------------------------


def stored() -> tuple[Figures, Figures | None]:
    """Return the plan and the measurements, as they are stored."""
    plan = json.loads((RESULTS / "gpu_plan.json").read_text())
    path = RESULTS / "gpu.json"
    return plan, json.loads(path.read_text()) if path.exists() else None


def plot(plan: Figures, path: Path) -> None:
    """Draw the predicted pairs per second at the smaller number of classes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    classes = plan["predictions"][0]["classes"]
    rows = [row for row in plan["predictions"] if row["classes"] == classes]
    figure, panel = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.1))
    for index, row in enumerate(rows):
        for offset, key, colour, label in (
            (-0.2, "pairs_without", "C7", "without the kernel"),
            (0.2, "pairs_with_kernel", "C0", "with the kernel"),
        ):
            low, high = row[key]
            panel.barh(index + offset, high - low, 0.36, left=low, color=colour, label=label if not index else None)
        panel.plot(row["pairs_at_the_floor"], index, "k|", markersize=12, label="floor" if not index else None)
    panel.set_yticks(range(len(rows)), [f"{row['gpu']}, {TITLES[row['precision']]}" for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_title(f"predicted pairs per second, {plan['resolution']}², K = {classes}", fontsize=9)
    panel.grid(axis="x", alpha=0.3)
    panel.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    plan, measured = stored()
    PAGE.write_text(page(plan, measured))
    plot(plan, PICTURE)
