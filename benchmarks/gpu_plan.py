"""Computes the floor and a prediction for StyleGAN2 at 1024 x 1024 on GPUs, with and without labelmint's kernel.

Rules of this file:
- Nothing here is measured on a GPU. `gpu/measure.py` measures.
- A GPU's rates are the dense rates that its maker publishes (half of the rates published "with sparsity").
- The steps run on torch's `meta` device, which computes only shapes. Each operator that depends on the inputs is a
  kernel; it takes the longer of its operations and its bytes at the GPU's rates. There are three sums: the floor
  (`floor.py`), kernels with elementwise operators fused into them, and a separate kernel for every operator.
- The operations and bytes of labelmint's kernel are counted from its own tiling (`labelmint.gpu.costs`), and its
  registers and memory are those of the compiler.
- Triton's ModelConfig message writes the configuration that the page shows.

Run it as `python benchmarks/gpu_plan.py`; it writes benchmarks/results/gpu_plan.json in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import floor
import random_models
import resuming
import torch
from google.protobuf import text_format
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.export.modules import GeneratorStep, Step, StyleInterpreterStep
from labelmint.gpu import costs
from labelmint.gpu.interpreter import Shape, tile_of
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter, hidden_widths
from labelmint.models.layout import channels_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu_plan.json"
RESOLUTION = 1024
CLASSES = (20, 34)
STRIPS = (8, 32, 128)  # rows; 32 is what is exported
REACHED = (0.5, 0.6)  # shares of the published rates that good kernels reach: an assumption
LAUNCH_SECONDS = 4e-6  # per kernel: an assumption
PCIE_BYTES_PER_SECOND = 32e9  # PCIe 4.0, 16 lanes, one direction, as specified


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: int  # 90 is sm_90
    tf32_flops: float
    fp16_flops: float
    bytes_per_second: float

    def flops(self, precision: str) -> float:
        return self.tf32_flops if precision == "tf32" else self.fp16_flops


GPUS = (
    Gpu("A100 SXM 80 GB", 80, 156e12, 312e12, 2.039e12),
    Gpu("H100 SXM", 90, 494.7e12, 989.4e12, 3.35e12),
    Gpu("H200 SXM", 90, 494.7e12, 989.4e12, 4.8e12),
    Gpu("B200 (HGX, 1,000 W)", 100, 1100e12, 2250e12, 8e12),
)
WIDTH = {"tf32": 1.0, "float16": 0.5}  # bytes relative to float32


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


def kernel_shape(resolution: int, classes: int) -> Shape:
    channels = channels_of("paper", random_models.stylegan2_spec(resolution).taps)
    return Shape(channels=channels, heads=10, hidden=hidden_widths(classes), classes=classes)


def own_kernel(gpu: Gpu, classes: int, precision: str) -> dict[str, Any]:
    """Return the costs of labelmint's kernel, its seconds at the published rates, and what the compiler made of it."""
    shape = kernel_shape(RESOLUTION, classes)
    counted = costs.costs(shape, tile_of(shape, precision, gpu.architecture), precision)
    made = costs.resources(shape, precision, gpu.architecture)
    seconds = floor.floor_seconds(
        counted.operations,
        counted.least_bytes,
        gpu.flops(precision),
        bytes_per_second=gpu.bytes_per_second,
    )
    return {
        "operations": counted.operations,
        "least_bytes": counted.least_bytes,
        "bytes_asked_for": counted.bytes_read + counted.bytes_written,
        "launches": counted.launches,
        "seconds": rounded(seconds),
        "tile": f"{made.tile.rows} x {made.tile.columns}",
        "warps": made.tile.warps,
        "registers": made.registers,
        "spilled_bytes": made.spilled_bytes,
        "shared_bytes": made.shared_bytes,
        "programs": made.programs,
        "occupancy": made.occupancy,
    }


def prediction(gpu: Gpu, classes: int, precision: str) -> dict[str, Any]:
    """Return the seconds of both steps in each sum, and the predicted range of pairs per second."""
    rates = (gpu.flops(precision), gpu.bytes_per_second, WIDTH[precision])
    kernels = kernels_of(RESOLUTION, classes)
    fused, single = (
        {step: rounded(roofline(some, rates, fused=is_fused)) for step, some in kernels.items()}
        for is_fused in (True, False)
    )
    least = {step: rounded(seconds) for step, seconds in floor_of(RESOLUTION, classes, rates).items()}
    own = own_kernel(gpu, classes, precision)
    low, high = REACHED
    launching = LAUNCH_SECONDS * own["launches"]
    slowest = single["generator"] / low + own["seconds"] / low + launching
    fastest = fused["generator"] / high + own["seconds"] / high + launching
    return {
        "gpu": gpu.name,
        "classes": classes,
        "precision": precision,
        "floor": least,
        "fused": fused,
        "single": single,
        "kernel": own,
        "kernel_seconds": [rounded(own["seconds"] / share + launching) for share in (high, low)],
        "pairs_with_kernel": [rounded(1 / slowest), rounded(1 / fastest)],
        "pairs_without": [rounded(low / sum(single.values())), rounded(high / sum(fused.values()))],
        "pairs_at_the_floor": rounded(1 / sum(least.values())),
    }


def rounded(number: float) -> float:
    """Round to four digits: the last bits of a sum say nothing."""
    return float(f"{number:.4g}")


def strips() -> list[dict[str, Any]]:
    """Return the kernels of one image by the rows of a strip, at the smaller number of classes."""
    rows = []
    for strip_rows in STRIPS:
        kernels = kernels_of(RESOLUTION, CLASSES[0], strip_rows)["style_interpreter"]
        count = sum(not kernel.elementwise for kernel in kernels)
        rows.append({"rows": strip_rows, "kernels": count, "launching_seconds": rounded(LAUNCH_SECONDS * count)})
    return rows


def checked_on_the_cpu() -> list[dict[str, Any]]:
    """Return the same sums for the CPU that `pair.py` measured, with its rates, and the measured seconds."""
    path = ROOT / "benchmarks" / "results" / "pair.json"
    figures = json.loads(path.read_text()) if path.exists() else {"models": {}}
    rows = []
    for name, model in figures["models"].items():
        if not name.startswith("r"):
            continue
        rates = figures["machine"]["flops_per_second"], figures["machine"]["bytes_per_second"], 1.0
        resolution, classes = (int(part[1:]) for part in name.split("_"))
        for step, kernels in kernels_of(resolution, classes).items():
            fused, single = (rounded(roofline(kernels, rates, fused=is_fused)) for is_fused in (True, False))
            measured = model["alone"][step]["onnxruntime"]["1"]["median"]
            rows.append({"model": model["title"], "step": step, "fused": fused, "single": single, "measured": measured})
    return rows


def tensorrt(step: str) -> str:
    """Return the part of a step's config.pbtxt that TensorRT needs."""
    inputs = steps_of(RESOLUTION, CLASSES[0])[step].inputs
    shapes = ",".join(f"{spec.name}:{'x'.join(map(str, (1, *spec.shape)))}" for spec in inputs)
    config = pb.ModelConfig()
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


def plan() -> dict[str, Any]:
    features = floor.feature_bytes(channels_of("paper", random_models.stylegan2_spec(RESOLUTION).taps))
    return {
        "resolution": RESOLUTION,
        "reached": list(REACHED),
        "launch_seconds": LAUNCH_SECONDS,
        "features_bytes": features,
        "crossing_seconds": rounded(2 * features / PCIE_BYTES_PER_SECOND),
        "gpus": [asdict(gpu) for gpu in GPUS],
        "predictions": [
            prediction(gpu, classes, precision) for classes in CLASSES for gpu in GPUS for precision in WIDTH
        ],
        "strips": strips(),
        "cpu": checked_on_the_cpu(),
        "tensorrt": tensorrt("generator"),
    }


def main() -> None:
    resuming.write(RESULTS, plan())


if __name__ == "__main__":
    main()
