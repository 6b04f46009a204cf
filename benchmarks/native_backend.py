"""Runs ensembles as Triton's native ONNX Runtime backend does, in this process, and prints memory, threads and times.

Rules of this file:
- Like that backend: a session with an arena for each step, one batch at a time in a session, a warm-up with one sample,
  the options of config.pbtxt. It is not NVIDIA's container: the server and its copies of tensors are missing.
- A caller sends a batch through the steps of an ensemble, one after the other. Two callers per ensemble keep its steps
  busy at the same time.
- Every third batch is the largest one, and the others have random sizes: an arena grows most when sizes change.
- Memory is the maximum of this process, less what it had before it loaded a model.

Run it as `python benchmarks/native_backend.py model_repository faces`; `benchmarks/triton_memory.py` does.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.triton.model_config import model_file, read_config, version_of

_DTYPES = {pb.TYPE_FP32: np.float32, pb.TYPE_INT32: np.int32, pb.TYPE_UINT8: np.uint8}
CALLERS = 2


class Step:
    """A Triton model with one instance."""

    def __init__(self, directory: Path, options: onnxruntime.SessionOptions) -> None:
        self.config = read_config(directory / "config.pbtxt")
        options.enable_mem_pattern = self.config.parameters["enable_mem_pattern"].string_value != "0"
        path = directory / str(version_of(directory)) / model_file(self.config)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._busy = threading.Lock()
        self.run(inputs_of(self.config, 1, np.random.RandomState(0)))

    def run(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Add the step's outputs to the tensors of a batch."""
        feeds = {entry.name: tensors[entry.name] for entry in self.config.input}
        names = [entry.name for entry in self.config.output]
        with self._busy:
            return tensors | dict(zip(names, self._session.run(names, feeds), strict=True))


def inputs_of(config: pb.ModelConfig, batch: int, random: np.random.RandomState) -> dict[str, Any]:
    return {entry.name: random.randn(batch, *entry.dims).astype(_DTYPES[entry.data_type]) for entry in config.input}


def options_of(arguments: argparse.Namespace) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    if arguments.one_pool:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = arguments.threads
    if arguments.no_spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("ensembles", nargs="+")
    parser.add_argument("--batches", type=int, default=12, help="of each caller")
    parser.add_argument("--alone", action="store_true", help="one caller of the first ensemble, one sample at a time")
    parser.add_argument("--threads", type=int, default=0, help="of a pool; 0: one for each core")
    parser.add_argument("--one-pool", action="store_true", help="all models share a pool, as with k8s/base")
    parser.add_argument("--no-spinning", action="store_true", help="as in labelmint's own backend")
    print(json.dumps(measure(parser.parse_args())))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    if arguments.one_pool:
        onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)
    before = status("VmHWM")
    configs = [read_config(arguments.repository / name / "config.pbtxt") for name in arguments.ensembles]
    names = {step.model_name for config in configs for step in config.ensemble_scheduling.step}
    steps = {name: Step(arguments.repository / name, options_of(arguments)) for name in sorted(names)}

    def call(config: pb.ModelConfig, seed: int) -> None:
        random, largest = np.random.RandomState(seed), config.max_batch_size
        for index in range(arguments.batches):
            batch = 1 if arguments.alone else random.randint(1, largest + 1) if index % 3 else largest
            tensors = inputs_of(config, batch, random)
            for step in config.ensemble_scheduling.step:
                tensors = steps[step.model_name].run(tensors)

    callers = configs[:1] if arguments.alone else configs * CALLERS
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(callers)) as pool:
        list(pool.map(call, callers, range(len(callers))))
    return {
        "mebibytes": (status("VmHWM") - before) / 1024,
        "threads": status("Threads") - len(callers),
        "seconds": (time.perf_counter() - wall) / arguments.batches,
        "cpu_seconds": (time.process_time() - cpu) / arguments.batches,
    }


if __name__ == "__main__":
    main()
