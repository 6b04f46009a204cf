"""Estimates the memory that a Triton with the native ONNX Runtime backend needs on a CPU, from an exported repository.

Rules of this file:
- The estimate is above what `benchmarks/triton_memory.py` measured for every model there, so that it can be a limit.
- It reads only the repository: the size of each file, and the shapes of all tensors at the largest batch.
- Steps in other formats than ONNX have other backends, which were not measured, so there is no estimate for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from labelmint.triton.model_config import ensembles, is_fused, model_file, read_config, version_of

# The server, its libraries, and the requests that it holds.
TRITON_BYTES = 512 << 20
# ONNX Runtime keeps a packed copy of most weights beside the weights themselves.
WEIGHT_COPIES = 2
# ONNX Runtime's arena grows in blocks, each twice as large as the one before, and never gives one back. With batches of
# different sizes it needed 2.1 to 2.2 times the tensors that exist at the same time. The rest is a margin.
ARENA_FACTOR = 2.4


def needed_bytes(repository: Path, names: Iterable[str]) -> int:
    """Return the memory of a Triton that serves these ensembles, all steps busy with their largest batches."""
    return TRITON_BYTES + sum(_step_bytes(repository / step) for step in sorted(_steps(repository, names)))


def advice(repository: Path) -> str:
    """Return the sentence that `labelmint export` prints about the ONNX models of a repository; "" if it has none."""
    served = {name: config for name, config in ensembles(repository).items() if _is_onnx(repository, name)}
    if not served:
        return ""
    said = f"Triton needs up to {_mebibytes(repository, served)} MiB on a CPU to serve {', '.join(served)}"
    fused = [name for name, config in served.items() if is_fused(config)]
    if 0 < len(fused) < len(served):
        said += f"; {_mebibytes(repository, fused)} MiB without the staged ensembles (--no-staged)"
    return said


def _mebibytes(repository: Path, names: Iterable[str]) -> int:
    return math.ceil(needed_bytes(repository, names) / 2**20)


def _steps(repository: Path, names: Iterable[str]) -> set[str]:
    """Return the Triton models of these ensembles. Triton loads a step of two ensembles once."""
    configs = (read_config(repository / name / "config.pbtxt") for name in names)
    return {step.model_name for config in configs for step in config.ensemble_scheduling.step}


def _is_onnx(repository: Path, name: str) -> bool:
    configs = (read_config(repository / step / "config.pbtxt") for step in _steps(repository, [name]))
    return all(config.backend == "onnxruntime" and model_file(config).endswith(".onnx") for config in configs)


def _step_bytes(directory: Path) -> int:
    config = read_config(directory / "config.pbtxt")
    path = directory / str(version_of(directory)) / model_file(config)
    instances = sum(max(1, group.count) for group in config.instance_group) or 1
    arena = ARENA_FACTOR * live_bytes(onnx.load(path), max(1, config.max_batch_size))
    return instances * (WEIGHT_COPIES * path.stat().st_size + math.ceil(arena))


def live_bytes(model: onnx.ModelProto, batch: int) -> int:
    """Return the most bytes of tensors that exist at the same time while a batch of this size runs, without weights.

    Changes the model. A tensor exists from the node that computes it to the last one that reads it, an output of the
    model until the end.
    """
    sizes = _sizes(model, batch)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer} | {""}
    outputs = {value.name for value in graph.output}
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    live = highest = sum(sizes[value.name] for value in graph.input)
    for index, node in enumerate(graph.node):
        if weights.issuperset(node.input):  # ONNX Runtime computes this once, when it loads the model
            weights.update(node.output)
            continue
        live += sum(sizes[name] for name in node.output)
        highest = max(highest, live)
        ended = {name for name in (*node.input, *node.output) if last.get(name, index) == index}
        live -= sum(sizes[name] for name in ended - outputs - weights)
    return highest


def _sizes(model: onnx.ModelProto, batch: int) -> dict[str, int]:
    """Return the bytes of each tensor at this batch. Raises RuntimeError if the file does not determine one."""
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].Clear()  # otherwise the symbolic batch there would stay
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    sizes = {"": 0}  # "" stands for an optional tensor that is left out
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            elements = math.prod(dim.dim_value for dim in tensor.shape.dim)
            sizes[value.name] = elements * tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    computed = {name for node in graph.node for name in node.output}
    if unknown := sorted(computed - sizes.keys()):
        raise RuntimeError(f"the exported file does not determine the size of {unknown[0]!r} at batch {batch}")
    return sizes
