"""Writes the style interpreter as a model of Triton's Python backend for GPUs, and the generator as ONNX for CUDA.

Rules of this file:
- The interpreter's step has three files: the weights as in the format `native`, the kernel's source, and `model.py`.
  The digest covers all of them, and the precision.
- The export runs the files that it will write, in a process of their own, and compares them with torch before they are
  kept. With a GPU it runs the whole interpreter there. Without one, Triton's interpreter runs the kernel on the CPU,
  which would take hours for a large image. So it then compares at REHEARSED_RESOLUTION, and says so.
- What Triton's command line must say for these models is written beside them, so nobody computes it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import triton_to_np_dtype

from labelmint.core.errors import IncompatibleWeights
from labelmint.export import gpu_run
from labelmint.export.comparison import Array, ExportedStep, compare
from labelmint.export.modules import GeneratorStep, Step, StyleInterpreterStep, example_inputs
from labelmint.export.native_export import weights_file
from labelmint.export.onnx_export import export_onnx
from labelmint.files import replacing
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.tasks import build_interpreter
from labelmint.triton.model_config import GPU_FILES, PRECISION, PYTHON, ensembles, read_config

DEFAULT_PRECISION = "float16"
REHEARSED_RESOLUTION = 32
# Triton's flags for the models, in the form of Kustomize's and docker's files of variables.
FLAGS_FILE = "triton.env"
POOL_VARIABLE = "CUDA_MEMORY_POOL_BYTES"
# A sample in the interpreter, and the next one in the generator.
SAMPLES_IN_FLIGHT = 2
_POOL_BYTES = 64 << 20  # Triton's default
_POOL_GRAIN = 512  # the pool gives memory in such pieces
_SOURCES = Path(__file__).parent.parent / "gpu"
_RANGE_SEEDS = 4
# Of ONNX Runtime's CUDA provider. HEURISTIC avoids a search for the fastest convolution, whose outcome may differ from
# start to start, and with it the last bits of a sample.
_CUDA = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}


def export_gpu(step: Step) -> ExportedStep:
    """Export the style interpreter as weights for the GPU's kernel, and any other step as ONNX.

    Raises IncompatibleWeights for an interpreter that the kernel cannot run, ModuleNotFoundError without triton, and
    RuntimeError if the kernel's results differ from torch's.
    """
    if not isinstance(step, StyleInterpreterStep):
        return export_onnx(step)
    if find_spec("triton") is None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")
    compared = step if _has_gpu() else StyleInterpreterStep(rehearsed(step.interpreter))

    def run(tensors: Sequence[Tensor]) -> Sequence[Array]:
        return _run(weights_file(compared.interpreter), tensors, [spec.name for spec in compared.outputs])

    return ExportedStep(weights_file(step.interpreter), compare(compared, run))


def files(weights: bytes) -> dict[str, bytes]:
    """Return the files of the interpreter's step by name."""
    sources = {name: (_SOURCES / name).read_bytes() for name in GPU_FILES if name.endswith(".py")}
    return {"interpreter.npz": weights, **sources}


def place_on_first_gpu(config: pb.ModelConfig) -> None:
    """Give an exported step, which has one instance, to the first GPU."""
    config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
    config.instance_group[0].gpus.append(0)


def configure(config: pb.ModelConfig, step: Step, precision: str) -> None:
    """Change the config.pbtxt of a step to serve this format on the first GPU, where the CUDA pool is."""
    place_on_first_gpu(config)
    # Samples run one by one. cuDNN chooses the generator's convolutions by shape, so a sample could differ in a batch;
    # the interpreter runs the samples of a batch one by one anyway.
    config.ClearField("dynamic_batching")
    if isinstance(step, StyleInterpreterStep):
        config.backend = PYTHON
        config.ClearField("parameters")
        config.ClearField("model_warmup")  # model.py warms up on the GPU; Triton would do it from host memory
        config.parameters[PRECISION].string_value = precision
        config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "no"
    else:
        config.max_batch_size = 1
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        for key, value in _CUDA.items():
            accelerator.parameters[key] = value
        accelerator.parameters["use_tf32"] = "0" if precision == "float32" else "1"


@torch.no_grad()
def check_range(generator: Generator, interpreter: StyleInterpreter, precision: str) -> None:
    """Raises IncompatibleWeights if the features of a few samples exceed float16 and it is the precision."""
    if precision != "float16":
        return
    step = GeneratorStep(generator, interpreter)
    limit = torch.finfo(torch.float16).max
    for seed in range(_RANGE_SEEDS):
        _, *features = step(*example_inputs(step, 1, seed=seed))
        largest = max(float(level.abs().max()) for level in features)
        if not largest <= limit:
            raise IncompatibleWeights(
                f"the generator's features reach {largest:.3g}, and float16 ends at {limit:.0f}; export it with "
                "`--precision bfloat16` or `--precision tf32`"
            )


def rehearsed(interpreter: StyleInterpreter) -> StyleInterpreter:
    """Return an interpreter of at most REHEARSED_RESOLUTION with the same heads, made of the highest levels."""
    spec = interpreter.spec
    factor = max(1, spec.resolution // REHEARSED_RESOLUTION)
    channels = {r // factor: c for r, c in spec.channels.items() if r // factor >= 4}
    smaller = build_interpreter(
        replace(spec, resolution=spec.resolution // factor, channels=channels), interpreter.score_kind
    )
    weights = interpreter.state_dict()
    weights = {name: x for name, x in weights.items() if not name.startswith("projection.")}
    weights |= {f"projection.{r}": interpreter.projection[str(r * factor)] for r in channels}
    smaller.load_state_dict(weights)
    return smaller.eval()


def compared(interpreter: StyleInterpreter) -> str:
    """Return the sentence that `labelmint export` prints about what it compared with torch."""
    if _has_gpu():
        return "style_interpreter: compared in float32 on the GPU"
    size, whole = min(interpreter.spec.resolution, REHEARSED_RESOLUTION), interpreter.spec.resolution
    said = f"style_interpreter: compared in float32 on the CPU, at {size}x{size}"
    if size < whole:
        said += f" with the weights of the highest levels, because {whole}x{whole} would take hours without a GPU"
    return f"{said}; no GPU has run it"


def write_flags(repository: Path) -> None:
    """Write what Triton's flags must say for the models of a repository, or remove it if no model needs any."""
    path, bytes_needed = repository / FLAGS_FILE, pool_bytes(repository)
    if not bytes_needed:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as aside:
        aside.write_text(
            "# Written by `labelmint export --format gpu` for the models of this repository.\n"
            f"{POOL_VARIABLE}={bytes_needed}\n"
        )


def advice(repository: Path) -> str:
    """Return the sentence that `labelmint export` prints about the memory of GPU models; "" if there are none."""
    if not (bytes_needed := pool_bytes(repository)):
        return ""
    return (
        f"Triton needs --cuda-memory-pool-byte-size=0:{bytes_needed} ({bytes_needed >> 20} MiB of GPU 0), "
        f"so that features stay on the GPU; {repository / FLAGS_FILE} has the number for k8s/components/gpu-kernel"
    )


def pool_bytes(repository: Path) -> int:
    """Return the bytes of all tensors that the steps return, of SAMPLES_IN_FLIGHT samples of each GPU model.

    Returns 0 if there is no GPU model, and at least what Triton takes without the flag.
    """
    total = 0
    for config in ensembles(repository).values():
        steps = [read_config(repository / step.model_name / "config.pbtxt") for step in config.ensemble_scheduling.step]
        if any(step.backend == PYTHON for step in steps):
            sample = sum(_bytes(tensor) for step in steps for tensor in step.output)
            total += SAMPLES_IN_FLIGHT * max(1, config.max_batch_size) * sample
    return total and max(_POOL_BYTES, _up(total, 1 << 20))


def _bytes(tensor: pb.ModelOutput) -> int:
    kind = np.dtype(triton_to_np_dtype(pb.DataType.Name(tensor.data_type).removeprefix("TYPE_")))
    return _up(math.prod(tensor.dims) * kind.itemsize, _POOL_GRAIN)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _run(weights: bytes, tensors: Sequence[Tensor], outputs: Sequence[str]) -> list[Array]:
    """Run the exported files in a process of their own: Triton's interpreter is chosen before triton is imported."""
    with tempfile.TemporaryDirectory(prefix="labelmint-gpu-") as name:
        directory = Path(name)
        for file, data in files(weights).items():
            (directory / file).write_bytes(data)
        np.savez(directory / gpu_run.FEATURES, *(tensor.numpy() for tensor in tensors))
        device = "cuda" if _has_gpu() else "cpu"
        environment = dict(os.environ) | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
        command = [sys.executable, "-m", gpu_run.__name__, str(directory), device]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode == gpu_run.UNUSABLE:
            raise IncompatibleWeights(f"the interpreter {done.stdout.strip()}; export it with `--format onnx`")
        if done.returncode != 0:
            raise RuntimeError(f"the kernel failed: {(done.stderr.strip() or 'nothing').splitlines()[-1]}")
        with np.load(directory / gpu_run.OUTPUTS) as found:
            return [found[output] for output in outputs]
