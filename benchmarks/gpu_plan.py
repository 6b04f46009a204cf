"""Computes the floor and a prediction for StyleGAN2 at 1024 x 1024 on a GPU, and the configuration that it needs.

Rules of this file:
- There was no GPU: everything here is a prediction, and the page says so.
- A GPU's rates are the dense rates that its maker publishes (half of the rates published "with sparsity").
- The steps run on torch's `meta` device, which computes only shapes. Each operator that depends on the inputs is a
  kernel; it takes the longer of its operations and its bytes at the GPU's rates. The page has three sums: the floor
  (`floor.py`), kernels with elementwise operators fused into them, and a separate kernel for every operator.
- Triton's ModelConfig message writes the configuration that the page shows.

Run it as `python benchmarks/gpu_plan.py`; it writes docs/gpu.md in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import floor
import random_models
import torch
from google.protobuf import text_format
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.export.modules import GeneratorStep, Step, StyleInterpreterStep
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter, hidden_widths
from labelmint.models.layout import channels_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu.md"
RESOLUTION = 1024
CLASSES = (20, 34)
STRIPS = (8, 32, 128)  # rows; 32 is what is exported
REACHED = 0.6  # share of the published rates that good kernels reach: an assumption
LAUNCH_SECONDS = 4e-6  # per kernel: an assumption
PCIE_BYTES_PER_SECOND = 32e9  # PCIe 4.0, 16 lanes, one direction, as specified


@dataclass(frozen=True)
class Gpu:
    name: str
    tf32_flops: float
    fp16_flops: float
    bytes_per_second: float
    cache_bytes: int

    def flops(self, precision: str) -> float:
        return self.tf32_flops if precision == "TF32" else self.fp16_flops


GPUS = (
    Gpu("A100 SXM 80 GB", 156e12, 312e12, 2.039e12, 40 << 20),
    Gpu("H100 SXM", 494.7e12, 989.4e12, 3.35e12, 50 << 20),
)
WIDTH = {"TF32": 1.0, "FP16": 0.5}  # bytes relative to float32


@dataclass(frozen=True)
class Kernel:
    flops: int
    bytes: int  # of float32
    elementwise: bool


class Kernels(TorchDispatchMode):
    """Collects the operators that depend on `inputs`. An export folds those that depend only on weights."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.found: list[Kernel] = []
        for tensor in inputs:
            tensor.depends = True  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(getattr(x, "depends", False) for x in taken):
            return out
        given = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in given:
            tensor.depends = True  # type: ignore[attr-defined]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and "view" not in func._schema.name:
            count = flop_registry.get(func._overloadpacket)
            self.found.append(
                Kernel(
                    flops=count(*args, **kwargs, out_val=out) if count else 0,
                    bytes=sum(map(_bytes, taken)) + sum(map(_bytes, given)),
                    elementwise=torch.Tag.pointwise in func.tags,
                )
            )
        return out


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that reading the tensor moves: a broadcast matrix is read once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def steps_of(resolution: int, classes: int, strip_rows: int = 32) -> dict[str, Step]:
    """Return the two steps without weights, on the meta device."""
    spec = random_models.stylegan2_spec(resolution)
    with torch.device("meta"):
        generator = Generator(spec).eval().requires_grad_(False)
        interpreter_spec = random_models.interpreter_spec(
            resolution, channels_of("paper", spec.taps), num_classes=classes
        )
        interpreter = StyleInterpreter(interpreter_spec, strip_rows=strip_rows).eval().requires_grad_(False)
        return {
            "generator": GeneratorStep(generator, interpreter),
            "style_interpreter": StyleInterpreterStep(interpreter),
        }


@cache
def kernels_of(resolution: int, classes: int, strip_rows: int = 32) -> dict[str, list[Kernel]]:
    found = {}
    for name, step in steps_of(resolution, classes, strip_rows).items():
        with torch.device("meta"):
            inputs = [torch.empty(1, *spec.shape, dtype=spec.dtype) for spec in step.inputs]
            with Kernels(inputs) as kernels, torch.no_grad():
                step(*inputs)
        found[name] = kernels.found
    return found


# Operations and bytes per second of a machine, and its bytes per number in units of float32's.
Rates = tuple[float, float, float]


def roofline(kernels: Iterable[Kernel], rates: Rates, *, fused: bool) -> float:
    """Return the seconds of the kernels one after the other; each takes the longer of computing and moving bytes."""
    flops, bytes_per_second, width = rates
    return sum(
        max(kernel.flops / flops, width * kernel.bytes / bytes_per_second)
        for kernel in kernels
        if not (fused and kernel.elementwise)
    )


def floor_of(resolution: int, classes: int, rates: Rates) -> dict[str, float]:
    """Return the floor of each step in seconds."""
    flops, bytes_per_second, width = rates
    spec = random_models.stylegan2_spec(resolution)
    channels = channels_of("paper", spec.taps)
    interpreter = random_models.interpreter_spec(resolution, channels, num_classes=classes)
    counts = {
        "generator": (floor.generator_flops(spec), floor.generator_bytes(spec, channels)),
        "style_interpreter": (floor.interpreter_flops(interpreter), floor.interpreter_bytes(interpreter)),
    }
    return {
        step: floor.floor_seconds(count, width * moved, flops, bytes_per_second=bytes_per_second)
        for step, (count, moved) in counts.items()
    }


def features_bytes(resolution: int) -> int:
    return floor.feature_bytes(channels_of("paper", random_models.stylegan2_spec(resolution).taps))


def prediction_table() -> str:
    rows = []
    for gpu in GPUS:
        for classes in CLASSES:
            kernels = kernels_of(RESOLUTION, classes)
            for precision, width in WIDTH.items():
                rates = (gpu.flops(precision), gpu.bytes_per_second, width)
                least = floor_of(RESOLUTION, classes, rates)
                fused, single = (
                    {step: roofline(some, rates, fused=is_fused) for step, some in kernels.items()}
                    for is_fused in (True, False)
                )
                cells = [
                    " + ".join(f"{1000 * each[step]:.1f}" for step in ("generator", "style_interpreter"))
                    for each in (least, fused, single)
                ]
                per_second = [1 / sum(each.values()) for each in (least, fused, single)]
                rows.append(
                    f"| {gpu.name} | {classes} | {precision} | {' | '.join(cells)} | {per_second[0]:.0f} "
                    f"| {REACHED * per_second[2]:.0f} to {REACHED * per_second[1]:.0f} |"
                )
    return "\n".join(rows)


def strips_table() -> str:
    rows = []
    width = 10 * hidden_widths(CLASSES[0])[0]  # N*h1
    for strip_rows in STRIPS:
        kernels = kernels_of(RESOLUTION, CLASSES[0], strip_rows)["style_interpreter"]
        count = sum(not kernel.elementwise for kernel in kernels)
        phase = 2 * width * (strip_rows // 2) * (RESOLUTION // 2)
        rows.append(f"| {strip_rows} | {count:,} | {1000 * LAUNCH_SECONDS * count:.0f} | {phase / 2**20:.0f} |")
    return "\n".join(rows)


def check_on_this_machine() -> str:
    """Return the page's section with the same calculation for the CPU that `pair.py` measured."""
    path = ROOT / "benchmarks" / "results" / "pair.json"
    figures = json.loads(path.read_text()) if path.exists() else {"models": {}}
    if not any(name.startswith("r") for name in figures["models"]):
        return "Not measured yet: `python benchmarks/pair.py`."
    rates = figures["machine"]["flops_per_second"], figures["machine"]["bytes_per_second"], 1.0
    rows = []
    for name, model in figures["models"].items():
        if not name.startswith("r"):
            continue
        resolution, classes = (int(part[1:]) for part in name.split("_"))
        for step, kernels in kernels_of(resolution, classes).items():
            measured = model["alone"][step]["onnxruntime"]["1"]["median"]
            fused, single = (roofline(kernels, rates, fused=is_fused) for is_fused in (True, False))
            rows.append(f"| {model['title']} | `{step}` | {fused:.2f} | {single:.2f} | {measured:.2f} |")
    return f"""The method can be checked on the CPU of the [benchmarks](benchmarks.md): the table has the same sums with
that CPU's measured rates, and ONNX Runtime's measured time. Seconds per sample.

| Model | Step | Fused | Operator by operator | Measured |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}"""


def accelerated(step: str) -> str:
    """Return the part of a step's config.pbtxt that TensorRT needs."""
    inputs = steps_of(RESOLUTION, CLASSES[0])[step].inputs
    shapes = ",".join(f"{spec.name}:{'x'.join(map(str, (1, *spec.shape)))}" for spec in inputs)
    config = pb.ModelConfig()
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=[0])
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    parameters = {
        "precision_mode": "FP16",
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": "/models/engines",
        **{f"trt_profile_{which}_shapes": shapes for which in ("min", "opt", "max")},
    }
    for key, value in parameters.items():
        accelerator.parameters[key] = value
    return text_format.MessageToString(config, use_index_order=True).strip()


def with_cuda_alone() -> str:
    config = pb.ModelConfig()
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=[0])
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
    for key, value in {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "1",
    }.items():
        accelerator.parameters[key] = value
    return text_format.MessageToString(config, use_index_order=True).strip()


def page() -> str:
    features = features_bytes(RESOLUTION)
    crossing = 2 * features / PCIE_BYTES_PER_SECOND
    published = "\n".join(
        f"| {gpu.name} | {gpu.tf32_flops / 1e12:.0f} | {gpu.fp16_flops / 1e12:.0f} "
        f"| {gpu.bytes_per_second / 1e12:.2f} | {gpu.cache_bytes >> 20} MiB |"
        for gpu in GPUS
    )
    return f"""# On a GPU: what to change, and what to expect

**Every figure on this page is a prediction**, because there was no GPU to measure on. `python benchmarks/gpu_plan.py`
computes the figures and writes the page. The configurations are proposals that no Triton has loaded yet.

## What works without changes

NVIDIA's Triton container serves the exported repository unchanged. Its native `onnxruntime` backend uses the CUDA
execution provider by itself if there is a GPU, because the exported `instance_group` names no kind.
`k8s/components/gpu` gives each Triton one GPU and changes nothing else.

`make bench` runs on a machine with a GPU without changes. It serves with the Triton of the wheel, which has no GPU
backend, so serving runs on the CPU. If the ONNX Runtime of `.venv-test` is `onnxruntime-gpu`, `benchmarks/pair.py` also
measures both steps with CUDA and TensorRT.

## What to change

### Memory between the steps

A sample's features at {RESOLUTION}² take {features / 1e6:.0f} MB. Triton keeps tensors between steps in a CUDA pool of
64 MB. Tensors that do not fit go to a pinned pool of 256 MB, and then to pageable memory; Triton's log says so once
("falling back to pinned system memory"). Outside of the first pool the features cross PCIe twice. That takes at least
{1000 * crossing:.0f} ms per sample on 16 lanes of PCIe 4.0, more than the floor of either step. So make the pool large
enough for two samples in flight on GPU 0, with a patch of `k8s/components/gpu`:

```yaml
- --cuda-memory-pool-byte-size=0:{2 * features}
```

`input_pinned_memory` and `output_pinned_memory` are on by default and matter only for tensors that leave the GPU:
image, label and JS map. A batch needs the pool times its samples. At this size `max_batch_size` is 1, because
`labelmint export` limits the bytes of a batch between the steps (`MAX_BATCH_BYTES`).

### Execution provider

These fields are for NVIDIA's container. The Triton that labelmint starts has no GPU, and labelmint refuses a repository
with them.

CUDA alone, in the `config.pbtxt` of both steps. `HEURISTIC` avoids a search for each new batch size. The tensor cores
multiply float32 matrices as TF32:

```text
{with_cuda_alone()}
```

TensorRT fuses elementwise operators into the convolutions; CUDA runs the operators that TensorRT leaves. The generator:

```text
{accelerated("generator")}
```

`style_interpreter` is the same with the shapes of its inputs. Because smallest, best and largest shape are the same,
there is one engine and one set of kernels. TensorRT builds an engine in minutes, for one kind of GPU and one version of
TensorRT. Without a cache that outlives the pod (`trt_engine_cache_path` on a volume, not on the `emptyDir` of
`k8s/base`), each new Triton builds its own, and scaling from zero takes that much longer. `precision_mode` `FP32` is
the safer choice; it still uses TF32.

Activations of StyleGAN2 exceed the range of FP16 if `conv_clamp` is not set (the original trains with 256 for this
reason), and labels change near ties. Before you use FP16, compare labels and calibrate again.

### Identity and calibration

A seed gives the same bytes within one device class and execution provider. On a GPU the model file does not guarantee
this: cuDNN and TensorRT choose kernels by shape, so a batch of another size may differ in its last bits. Until
`tests/torture/test_identity.py` has passed there, serve with `max_batch_size: 1`, or with one TensorRT profile.

TF32 changes JS scores by more than float rounding does, so the threshold must be measured on the GPU. `labelmint
calibrate` starts the Triton of the wheel, which runs on the CPU. It still needs an option for a Triton elsewhere, like
`--triton-url` of `serve`.

### Instances

Use one instance of each step per GPU. The two steps then work on different samples at the same time, which hides kernel
launches and copies of results. A second instance has a second arena of ONNX Runtime and, with TensorRT, a second
engine. It helps only if kernels are too small to fill the GPU, at 256² and below. For several GPUs in a pod, `gpus`
lists them, and each needs its own CUDA pool. One GPU per pod, as in `k8s/components/gpu`, needs neither.

### Strips

The interpreter processes the image in strips of 32 rows, which suits a CPU's cache. On a GPU there are two effects:
each kernel launch costs {1e6 * LAUNCH_SECONDS:.0f} µs (an assumption) unless something hides it, and maps that fit into
the second-level cache need not cross the memory. `strip_rows` is an argument of `StyleInterpreter`, not yet of
`labelmint export`; the best value must be measured. At K = {CLASSES[0]}, {RESOLUTION}²:

| Rows | Kernels, fused | Launching them, ms | Hidden map of a phase in FP16, MiB |
| --- | --- | --- | --- |
{strips_table()}

CUDA graphs (`trt_cuda_graph_enable` of TensorRT, `enable_cuda_graph` of CUDA) make launches nearly free, at a fixed
batch size.

## Floor and prediction

StyleGAN2 with its own channels (config F) at {RESOLUTION}², 10 classifiers, one sample. Milliseconds are those of
generator + interpreter.

- *Floor*: the necessary operations and bytes, at the published rates. No implementation is faster.
- *Fused*: each convolution, product and reduction reads its inputs and writes its outputs once; elementwise operators
  are free. This is TensorRT's best case.
- *Operator by operator*: each operator reads and writes memory. This is the CUDA provider's worst case.
- *Predicted* samples per second: {REACHED:.0%} of the published rates (an assumption), between the last two; one
  instance, the steps one after the other, nothing in the second-level cache.

| GPU | K | Precision | Floor, ms | Fused, ms | Operator by operator, ms | Samples per second at the floor | Predicted |
| --- | --- | --- | --- | --- | --- | --- | --- |
{prediction_table()}

The difference between floor and prediction is the interpreter's hidden layer, which crosses the memory once per
convolution. A kernel that keeps a tile of it on the chip through all three layers would gain more than any setting
above.

{check_on_this_machine()}

Published dense rates, from NVIDIA's data sheets of the
[A100](https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf)
and the [H100](https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet) (which has the rates
with sparsity: twice as high):

| GPU | TF32, TFlop/s | FP16, TFlop/s | Memory, TB/s | Second-level cache |
| --- | --- | --- | --- | --- |
{published}

The fields of Triton's backend, and the place of tensors between steps, are taken from its sources: `onnxruntime.cc` of
[onnxruntime_backend](https://github.com/triton-inference-server/onnxruntime_backend), `memory.cc` and
`ensemble_scheduler.cc` of [core](https://github.com/triton-inference-server/core).
"""


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
