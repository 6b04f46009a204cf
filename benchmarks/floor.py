"""Computes the floor of a step: the least time that its operations and bytes take on this machine's cores and memory.

Rules of this file:
- Only the operations of matrix products and convolutions count; a multiplication and an addition are two operations.
  Interpolation, activations and statistics are not counted, so no implementation can gain by doing less of them.
- A convolution is counted by its definition. An algorithm with fewer operations (Winograd) may fall below the floor.
- Bytes are those that must cross the memory once: inputs (weights, features) and outputs.
- The machine's rates are the best that any installed library reaches on large, favourable shapes. Each library is
  measured in a separate process, because it fixes its number of threads when it is loaded.

Run it as `python benchmarks/floor.py` on an idle machine; it prints one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from labelmint.models.interpreter import InterpreterSpec
from labelmint.models.stylegan2 import StyleGAN2Spec

# Rows, inner and columns of matrix products: two squares, and the first layer of ten heads over a map of 128 x 128.
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (1280, 512, 16384))
STREAM_BYTES = 256 << 20  # of each array that is streamed: far more than any cache holds
REPEATS = 7
FLOAT_BYTES = 4


def gemm_rate(threads: int | None = None) -> float:
    """Return floating-point operations per second of float32 matrix products: the best library at its best shape.

    `threads`: the number of cores to use; None means all.
    """
    return max(_measured(library, threads or available_cores()) for library in _GEMMS)


def bandwidth(threads: int | None = None) -> float:
    """Return bytes per second between memory and cores: the best of reading, copying, and adding two arrays."""
    return _measured("stream", threads or available_cores())


def rates() -> dict[str, float]:
    """Return both rates of all cores, as benchmarks store them with their rounds."""
    return {"flops_per_second": gemm_rate(), "bytes_per_second": bandwidth()}


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def floor_seconds(flops: float, bytes_moved: float, rate: float, *, bytes_per_second: float) -> float:
    """Return the least seconds of any implementation: computing and moving bytes overlap, so the longer of the two."""
    return max(flops / rate, bytes_moved / bytes_per_second)


def interpreter_flops(spec: InterpreterSpec) -> int:
    """Return the operations of one sample: first layer at each level's own resolution, small layers at every pixel."""
    (h1, h2), n, k = spec.hidden, spec.num_heads, spec.num_classes
    first = sum(n * h1 * channels * r**2 for r, channels in spec.channels.items())
    small = n * (h1 * h2 + h2 * k) * spec.resolution**2
    return 2 * (first + small)


def interpreter_bytes(spec: InterpreterSpec, batch: int = 1) -> int:
    """Return the bytes of a batch: features in; label (uint8), JS map and score (float32) out; the weights once."""
    (h1, h2), n, k = spec.hidden, spec.num_heads, spec.num_classes
    weights = n * (h1 * (spec.feature_dim + 1) + h2 * (h1 + 1) + k * (h2 + 1))
    outputs = (1 + FLOAT_BYTES) * spec.resolution**2 + FLOAT_BYTES
    return batch * (feature_bytes(spec.channels) + outputs) + FLOAT_BYTES * weights


def feature_bytes(channels: Any) -> int:
    """Return the bytes of one sample's feature maps {r: C_r} as float32."""
    return FLOAT_BYTES * sum(c * r**2 for r, c in channels.items())


def mapping_flops(spec: StyleGAN2Spec) -> int:
    """Return the operations from one latent to its w."""
    width = spec.mapping_width or spec.w_dim
    widths = [spec.z_dim, *[width] * (spec.mapping_layers - 1), spec.w_dim]
    return 2 * sum(a * b for a, b in itertools.pairwise(widths))


def generator_flops(spec: StyleGAN2Spec) -> int:
    """Return the operations of one sample without style mixing.

    They are those of mapping, styles, demodulation, convolutions, their FIR filters and ToRGB.
    """
    total = mapping_flops(spec)
    previous: int | None = None
    for r in spec.resolutions:
        channels = spec.channels[r]
        convolutions = [(channels, r)] if previous is None else [(previous, r // 2), (channels, r)]
        for inputs, side in convolutions:  # an up-convolution multiplies at its input's resolution
            total += 2 * (spec.w_dim * inputs + inputs * channels)  # style and demodulation
            total += 2 * 9 * inputs * channels * side**2
        if previous is not None:  # the filter runs in two passes; the first keeps one more column
            total += 2 * len(spec.resample_filter) * channels * r * (r + 1 + r)
            if spec.architecture == "resnet":
                total += 2 * previous * channels * (r // 2) ** 2
        if spec.architecture == "skip" or r == spec.resolution:
            total += 2 * (spec.w_dim * channels + channels * spec.image_channels * r**2)
        previous = channels
    return total


def generator_bytes(spec: StyleGAN2Spec, channels: Any, batch: int = 1) -> int:
    """Return the bytes of a batch: features {r: C_r} and an image (uint8) out; weights and constant noise once."""
    width = spec.mapping_width or spec.w_dim
    widths = [spec.z_dim, *[width] * (spec.mapping_layers - 1), spec.w_dim]
    weights = sum((a + 1) * b for a, b in itertools.pairwise(widths)) + spec.channels[4] * 16
    previous: int | None = None
    for r in spec.resolutions:
        here = spec.channels[r]
        for inputs in (here,) if previous is None else (previous, here):
            weights += inputs * (spec.w_dim + 1) + here * (9 * inputs + 1) + r**2
        if previous is not None and spec.architecture == "resnet":
            weights += previous * here
        if spec.architecture == "skip" or r == spec.resolution:
            weights += here * (spec.w_dim + 1) + spec.image_channels * (here + 1)
        previous = here
    return batch * (feature_bytes(channels) + 3 * spec.resolution**2) + FLOAT_BYTES * weights


def _measured(what: str, threads: int) -> float:
    """Return the rate that a separate process measures with `threads` threads."""
    count = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    command = [sys.executable, __file__, "--only", what, "--threads", count]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def _best(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of REPEATS calls, after one warm-up call."""
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _numpy(a: np.ndarray, b: np.ndarray, _: int) -> Callable[[], object]:
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    return lambda: np.matmul(a, b, out=out)


def _torch(a: np.ndarray, b: np.ndarray, threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    left, right = torch.from_numpy(a), torch.from_numpy(b)
    out = torch.empty(a.shape[0], b.shape[1])
    return lambda: torch.mm(left, right, out=out)


def _onnxruntime(a: np.ndarray, b: np.ndarray, threads: int) -> Callable[[], object]:
    import onnx
    import onnxruntime

    # The left matrix is the constant, like the weights of a 1x1 convolution.
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["a", "b"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, b.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (a.shape[0], b.shape[1]))],
        [onnx.numpy_helper.from_array(a, "a")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    run = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run
    return lambda: run(None, {"b": b})


_GEMMS = {"numpy": _numpy, "torch": _torch, "onnxruntime": _onnxruntime}


def _gemm(library: str, threads: int) -> float:
    rng = np.random.default_rng(0)
    rates = []
    for rows, inner, columns in SHAPES:
        a = rng.standard_normal((rows, inner), np.float32)
        b = rng.standard_normal((inner, columns), np.float32)
        rates.append(2 * rows * inner * columns / _best(_GEMMS[library](a, b, threads)))
    return max(rates)


def _stream(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    a, b, c = (torch.zeros(STREAM_BYTES // FLOAT_BYTES) for _ in range(3))
    seconds = (_best(lambda: a.sum()), _best(lambda: b.copy_(a)) / 2, _best(lambda: torch.add(a, b, out=c)) / 3)
    return STREAM_BYTES / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=(*_GEMMS, "stream"), help="print one rate, measured in this process")
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()
    if arguments.only:
        print(_stream(arguments.threads) if arguments.only == "stream" else _gemm(arguments.only, arguments.threads))
        return
    figures = {
        "cores": available_cores(),
        "flops_per_second": {library: _measured(library, available_cores()) for library in _GEMMS},
        "flops_per_second_one_core": {library: _measured(library, 1) for library in _GEMMS},
        "bytes_per_second": bandwidth(),
        "bytes_per_second_one_core": bandwidth(1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
