"""Runs the file of one step with one library, in a separate process: seconds by batch size, and the outputs.

Rules of this file:
- It imports NumPy and the library, and nothing of labelmint, because it also runs in an environment with another ONNX
  Runtime.
- A library is configured like the service's backend of that name; OpenVINO computes in float32.
- Seconds are those of a call with arrays in and arrays out, after one warm-up call with the same batch size. A library
  that is served sample by sample runs a batch sample by sample.

Run by other benchmarks: `python benchmarks/step_runner.py LIBRARY FILE INPUTS`; `--available` lists the libraries here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
PROVIDERS = {
    "onnxruntime": ["CPUExecutionProvider"],
    "openvino": [
        (
            "OpenVINOExecutionProvider",
            {"device_type": "CPU", "load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "f32"}})},
        )
    ],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}
TORCH = ("torchscript",)


def available() -> list[str]:
    """Return the libraries that this environment has."""
    found = []
    try:
        import onnxruntime

        present = onnxruntime.get_available_providers()
        for library, providers in PROVIDERS.items():
            first = providers[0]
            if (first if isinstance(first, str) else first[0]) in present:
                found.append(library)
    except ModuleNotFoundError:
        pass
    try:
        import torch  # noqa: F401

        found += TORCH
    except ModuleNotFoundError:
        pass
    return found


def onnx_session(file: Path, library: str = "onnxruntime"):
    """Return a session with the options of `labelmint/triton/backends/onnxruntime` and the exported config.pbtxt."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=PROVIDERS[library])


def load(library: str, file: Path, outputs: list[str]) -> Run:
    if library in TORCH:
        return _torchscript(file, outputs)
    session = onnx_session(file, library)
    return lambda arrays: dict(zip(outputs, session.run(outputs, arrays), strict=True))


def _torchscript(file: Path, outputs: list[str]) -> Run:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is loaded
    import torch

    module = torch.jit.load(str(file), map_location="cpu")
    module.eval()
    names = [argument.name for argument in module.forward.schema.arguments[1:]]

    def run(arrays: Arrays) -> Arrays:
        tensors = [torch.from_numpy(arrays[name]) for name in names]
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            rows = [module(*(x[row : row + 1] for x in tensors)) for row in range(len(tensors[0]))]
        return {
            name: np.concatenate([row[index].numpy() for row in rows]) if len(rows) > 1 else rows[0][index].numpy()
            for index, name in enumerate(outputs)
        }

    return run


def first_of(arrays: Arrays, batch: int) -> Arrays:
    return {name: np.ascontiguousarray(array[:batch]) for name, array in arrays.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--available", action="store_true", help="list the libraries of this environment")
    parser.add_argument("library", nargs="?", choices=(*PROVIDERS, *TORCH))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("inputs", nargs="?", type=Path, help="npz with the largest batch")
    parser.add_argument("--outputs", nargs="+", help="names, in the order of the step")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=1, help="timed calls of each batch size, which take turns")
    parser.add_argument("--save", type=Path, help="npz for the outputs of each batch size, as NAME@BATCH")
    arguments = parser.parse_args()
    if arguments.available:
        print(json.dumps(available()))
        return
    with np.load(arguments.inputs) as file:
        inputs = dict(file)
    started = time.perf_counter()
    run = load(arguments.library, arguments.file, arguments.outputs)
    loaded = time.perf_counter() - started
    batches = {batch: first_of(inputs, batch) for batch in arguments.batches}
    came_out = {batch: run(arrays) for batch, arrays in batches.items()}
    if arguments.save:
        np.savez(
            arguments.save,
            **{f"{name}@{batch}": array for batch, arrays in came_out.items() for name, array in arrays.items()},
        )
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(arguments.repeats):
        for batch, arrays in batches.items():
            begun = time.perf_counter()
            run(arrays)
            seconds[batch].append(time.perf_counter() - begun)
    print(json.dumps({"load_seconds": loaded, "seconds": seconds}))


if __name__ == "__main__":
    main()
