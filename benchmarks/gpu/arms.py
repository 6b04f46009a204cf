"""The measured ways to run each part of a pair: every arm takes tensors on the device and returns its outputs there.

Rules of this file:
- An arm is a function that prepares a callable. What it cannot do here it raises; Unavailable says why in one line.
- All arms of a part get the same inputs and return the same outputs: the generator {image, features_4, ...}, the
  interpreter {label, js_map, js_score}, each with a batch dimension. `float32` multiplies without TF32 and is what the
  other arms are compared with.
- A pair is an arm of the generator and one of the interpreter, one after the other. Nothing is copied to the host.
- The matrix products of part `machine` are the rates that the others are compared with.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from reference import ReferenceInterpreter
from torch import Tensor, nn

from gpu.cases import Case
from labelmint.export.modules import GeneratorStep, Step, StyleInterpreterStep
from labelmint.export.weights import arrays_of
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter

Outputs = dict[str, Tensor]
Run = Callable[[Sequence[Tensor]], Outputs]
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BASELINE = "float32"


class Unavailable(Exception):
    """This arm cannot run here; the message says why."""


@dataclass
class Bench:
    """What arms are prepared from: a case, its modules on the device, and the files that another process exports."""

    case: Case
    device: torch.device
    files: Path
    export_seconds: float = 60.0
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator, interpreter = self.case.build()
        self.generator: Generator = generator.to(self.device)
        self.interpreter: StyleInterpreter = interpreter.to(self.device)
        self.steps = {
            "generator": GeneratorStep(self.generator, self.interpreter),
            "interpreter": StyleInterpreterStep(self.interpreter),
        }

    def in_one_strip(self) -> Step:
        """Return the interpreter that works on the whole image at once: fewer and larger kernels, more memory."""
        interpreter = StyleInterpreter(self.interpreter.spec, strip_rows=self.case.resolution)
        interpreter.load_state_dict(self.interpreter.state_dict())
        return StyleInterpreterStep(interpreter.to(self.device).eval().requires_grad_(False))

    def file(self, part: str, kind: str) -> Path:
        """Wait for an exported file. Raises Unavailable if its export failed or takes too long."""
        path, failed = self.files / f"{part}.{kind}", self.files / f"{part}.{kind}.failed"
        ends = time.monotonic() + self.export_seconds
        while not path.exists():
            if failed.exists():
                raise Unavailable(failed.read_text())
            if time.monotonic() > ends:
                raise Unavailable("out of time: the export of the file did not end")
            time.sleep(0.1)
        return path


# ---- precision -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def precision_of(name: str, device: torch.device) -> Iterator[None]:
    """Multiply as float32 or TF32, or let autocast choose the operators that run in half precision."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in settings]
    half = HALF.get(name)
    try:
        for each in settings:
            each.allow_tf32 = name != "float32"
        with torch.autocast(device.type, half) if half else contextlib.nullcontext():
            yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.allow_tf32 = value


# ---- torch -----------------------------------------------------------------------------------------------------------


def _module(bench: Bench, step: Step, module: Callable[..., Any], precision: str) -> Run:
    names, kinds = [spec.name for spec in step.outputs], [spec.dtype for spec in step.outputs]

    @torch.no_grad()
    def run(inputs: Sequence[Tensor]) -> Outputs:
        with precision_of(precision, bench.device):
            found = module(*inputs)
        return {name: x.to(kind) for name, x, kind in zip(names, found, kinds, strict=True)}

    return run


def eager(part: str, precision: str, *, whole: bool = False) -> Callable[[Bench], Run]:
    def prepare(bench: Bench) -> Run:
        step = bench.in_one_strip() if whole else bench.steps[part]
        return _module(bench, step, step, precision)

    return prepare


def compiled(part: str, precision: str) -> Callable[[Bench], Run]:
    def prepare(bench: Bench) -> Run:
        step = bench.in_one_strip() if part == "interpreter" else bench.steps[part]
        # The rehearsal traces as the GPU would; only a GPU's machine generates code.
        backend = "inductor" if bench.device.type == "cuda" else "eager"
        return _module(bench, step, torch.compile(step, backend=backend, dynamic=False), precision)

    return prepare


def reference(bench: Bench) -> Run:
    """The published interpreter: upsample all, concatenate, one classifier after the other."""
    spec = bench.case.interpreter_spec
    needed = 3 * 4 * spec.feature_dim * spec.resolution**2  # levels, their concatenation, and one copy of it
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info(bench.device)[0]
        if needed > free:
            raise Unavailable(f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
    module: nn.Module = ReferenceInterpreter(bench.interpreter).eval().to(bench.device)
    levels = list(spec.channels)

    def run(inputs: Sequence[Tensor]) -> Outputs:
        with precision_of("tf32", bench.device):
            label, js_map, js_score = module(dict(zip(levels, inputs, strict=True)))
        return {"label": label, "js_map": js_map, "js_score": js_score}

    return run


# ---- exported files --------------------------------------------------------------------------------------------------


def torchscript(part: str) -> Callable[[Bench], Run]:
    """The file that `labelmint export --format torchscript` writes, run as Triton's backend runs it."""

    def prepare(bench: Bench) -> Run:
        module = torch.jit.load(str(bench.file(part, "pt")), map_location=bench.device).eval()
        names = [spec.name for spec in bench.steps[part].outputs]

        def run(inputs: Sequence[Tensor]) -> Outputs:
            count = inputs[0].shape[0]
            with torch.inference_mode(), torch.jit.optimized_execution(False):
                found = [module(*(x[row : row + 1] for x in inputs)) for row in range(count)]
            return {name: torch.cat(parts) for name, parts in zip(names, zip(*found, strict=True), strict=True)}

        return run

    return prepare


def onnxruntime(part: str) -> Callable[[Bench], Run]:
    """The file that `labelmint export` writes, in ONNX Runtime with the CUDA provider; on a CPU with the CPU's."""

    def prepare(bench: Bench) -> Run:
        import onnxruntime as library

        provider = "CUDAExecutionProvider" if bench.device.type == "cuda" else "CPUExecutionProvider"
        if provider not in library.get_available_providers():
            raise Unavailable("not installed: ONNX Runtime with CUDA (onnxruntime-gpu)")
        options = library.SessionOptions()
        options.enable_mem_pattern = False  # as in the step's configuration
        session = library.InferenceSession(str(bench.file(part, "onnx")), options, providers=[provider])
        if session.get_providers()[0] != provider:
            raise Unavailable(f"ONNX Runtime did not load {provider}; its log says why")
        specs = bench.steps[part].outputs

        def run(inputs: Sequence[Tensor]) -> Outputs:
            binding, kept = session.io_binding(), [x.contiguous() for x in inputs]
            place = {"device_type": bench.device.type, "device_id": bench.device.index or 0}
            for entry, x in zip(session.get_inputs(), kept, strict=True):
                binding.bind_input(entry.name, **place, **_buffer(x))
            outputs = {
                spec.name: torch.empty(len(kept[0]), *spec.shape, dtype=spec.dtype, device=bench.device)
                for spec in specs
            }
            for name, x in outputs.items():
                binding.bind_output(name, **place, **_buffer(x))
            if bench.device.type == "cuda":
                torch.cuda.synchronize(bench.device)  # ONNX Runtime has a stream of its own
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return outputs

        return run

    return prepare


def _buffer(x: Tensor) -> dict[str, Any]:
    kinds = {torch.float32: "float32", torch.int32: "int32", torch.uint8: "uint8"}
    import numpy as np

    return {"element_type": np.dtype(kinds[x.dtype]), "shape": tuple(x.shape), "buffer_ptr": x.data_ptr()}


# ---- labelmint's kernel ----------------------------------------------------------------------------------------------


def kernel(precision: str) -> Callable[[Bench], Run]:
    """labelmint's kernel for GPUs. It labels a batch sample by sample, as it is served."""

    def prepare(bench: Bench) -> Run:
        from labelmint.gpu.interpreter import GpuInterpreter

        interpreter = GpuInterpreter(arrays_of(bench.interpreter), precision=precision, device=bench.device)

        def run(inputs: Sequence[Tensor]) -> Outputs:
            found = [interpreter.run([x[row] for x in inputs]) for row in range(len(inputs[0]))]
            return {name: torch.stack([each[name] for each in found]) for name in interpreter.outputs}

        return run

    return prepare


# ---- the machine's own rates -----------------------------------------------------------------------------------------


def side_of(case: Case) -> int:
    return 64 if case.tiny else 8192


def product(precision: str) -> Callable[[Bench], Run]:
    """A square matrix product of a favourable size."""

    def prepare(bench: Bench) -> Run:
        side, kind = side_of(bench.case), HALF.get(precision, torch.float32)
        random = torch.Generator(bench.device).manual_seed(0)
        a, b = (torch.randn(side, side, generator=random, device=bench.device).to(kind) for _ in range(2))
        out = torch.empty(side, side, dtype=kind, device=bench.device)

        def run(_: Sequence[Tensor]) -> Outputs:
            with precision_of("tf32" if precision == "tf32" else "float32", bench.device):
                return {"product": torch.mm(a, b, out=out)}

        return run

    return prepare


def copy(bench: Bench) -> Run:
    """A copy in the device's memory; it reads and writes each byte."""
    source = torch.zeros(copied_bytes(bench.case), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return lambda _: {"copy": target.copy_(source)}


def copied_bytes(case: Case) -> int:
    return 1 << (20 if case.tiny else 30)


# ---- all arms --------------------------------------------------------------------------------------------------------

# By part, in the order of preparation: what compiles for long, or may need too much memory, comes late.
MACHINE: Mapping[str, Callable[[Bench], Run]] = {
    **{f"gemm_{precision}": product(precision) for precision in PRECISIONS},
    "copy": copy,
}
GENERATOR: Mapping[str, Callable[[Bench], Run]] = {
    BASELINE: eager("generator", "float32"),
    "eager_tf32": eager("generator", "tf32"),
    "torchscript": torchscript("generator"),
    "onnxruntime": onnxruntime("generator"),
    "compiled_tf32": compiled("generator", "tf32"),
    "compiled_float16": compiled("generator", "float16"),
}
INTERPRETER: Mapping[str, Callable[[Bench], Run]] = {
    BASELINE: eager("interpreter", "float32"),
    **{f"kernel_{precision}": kernel(precision) for precision in PRECISIONS},
    "eager_tf32": eager("interpreter", "tf32"),
    "eager_whole_tf32": eager("interpreter", "tf32", whole=True),
    "torchscript": torchscript("interpreter"),
    "onnxruntime": onnxruntime("interpreter"),
    "compiled_tf32": compiled("interpreter", "tf32"),
    "compiled_float16": compiled("interpreter", "float16"),
    "reference": reference,
}
PAIRS = (
    (BASELINE, BASELINE),
    ("eager_tf32", "kernel_tf32"),
    ("torchscript", "kernel_float16"),
    ("onnxruntime", "kernel_float16"),
    ("compiled_float16", "kernel_float16"),
    ("torchscript", "torchscript"),
    ("onnxruntime", "onnxruntime"),
    ("compiled_tf32", "compiled_tf32"),
    ("compiled_float16", "compiled_float16"),
)


def pair_name(generator: str, interpreter: str) -> str:
    return f"{generator} + {interpreter}"


def chained(generator: Run, interpreter: Run) -> Run:
    """Return the pair of two prepared arms."""

    def run(inputs: Sequence[Tensor]) -> Outputs:
        drawn = generator(inputs)
        image = drawn.pop("image")
        return {"image": image, **interpreter(list(drawn.values()))}

    return run


def arms_of() -> dict[str, tuple[str, ...]]:
    """Return the names of all arms, by part."""
    pairs = tuple(pair_name(*names) for names in PAIRS)
    return {"machine": tuple(MACHINE), "generator": tuple(GENERATOR), "interpreter": tuple(INTERPRETER), "pair": pairs}
