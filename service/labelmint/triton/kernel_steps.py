"""Recognises the steps that the kernel can run in place of ONNX Runtime, and says where their weights lie.

Rules of this file:
- A step is recognised by the metadata of its ONNX file and by the names and sizes of its weights. It is not guessed
  from the graph. Whatever does not fit is left to ONNX Runtime, and `Unrecognised` says why.
- Nothing is copied to disk: the kernel reads the weights from the ONNX file. The description has the SHA-256 of the
  weights, so a file that is replaced afterwards does not load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.executor import KERNEL_BACKEND, STANDS_IN_FOR
from labelmint.core.served_model import ServedModel
from labelmint.core.task import UNCERTAINTY
from labelmint.kernel.interpreter import MAX_LEVELS, UnusableWeights, check_weights, read_slices
from labelmint.triton.model_config import model_file
from labelmint.triton.onnx_file import MAX_ONNX_BYTES, OnnxFile, read_onnx
from labelmint.untrusted.content import Malformed, RegularFile, quoted

STEP = "style_interpreter"
DESCRIPTION = "interpreter.json"  # in the place of the step's file
THREADS = "intra_op_thread_count"  # the parameter of a step that the kernel honours too
_FLOAT32 = 1


class Unrecognised(ValueError):
    """The kernel does not run this step; the message says why, without the step's name."""


def describe(directory: Path, config: pb.ModelConfig, model: ServedModel) -> dict[str, Any]:
    """Return what the kernel's backend needs to run the last step of `model`. Raises Unrecognised.

    `directory` has the step's file, and `config` is the step's configuration. The result is the `described` of
    `read_slices`, with the name of the `file` and the `sha256` of the weights.
    """
    filename = model_file(config)
    path = directory / filename
    try:
        with RegularFile(path, MAX_ONNX_BYTES) as file:
            described = _described(read_onnx(file))
        arrays, digest = read_slices(path, described)
        channels = check_weights(arrays)
        _check_fits(described, model)
    except (Malformed, UnusableWeights) as error:
        raise Unrecognised(f"{filename} {error}") from error
    wanted = {f"features_{r}": [c, r, r] for r, c in channels.items()}
    if {tensor.name: list(tensor.dims) for tensor in config.input} != wanted:
        raise Unrecognised(f"config.pbtxt declares other inputs than {filename} reads")
    if {tensor.name for tensor in config.output} != {output.name for output in (*model.task.labels, *UNCERTAINTY)}:
        raise Unrecognised(f"config.pbtxt declares other outputs than those of the task {model.task.name!r}")
    return {"file": filename, "sha256": digest, **described}


def configuration(config: pb.ModelConfig) -> pb.ModelConfig:
    """Return the step's configuration for Triton with the kernel in the place of its backend.

    Triton's batcher is left out, as in a repository of the format `native`: samples run one by one on all cores, and a
    finished sample would wait for the others of its batch.
    """
    changed = pb.ModelConfig()
    changed.CopyFrom(config)
    changed.backend, changed.default_model_filename = KERNEL_BACKEND, DESCRIPTION
    changed.ClearField("dynamic_batching")
    for key in [key for key in changed.parameters if key != THREADS]:
        del changed.parameters[key]
    changed.parameters[STANDS_IN_FOR].string_value = config.backend
    return changed


def _described(onnx: OnnxFile) -> dict[str, Any]:
    """Raises Malformed."""
    if onnx.metadata.get("labelmint.step") != STEP:
        raise Malformed("does not say that it is a Style Interpreter; export the model again")
    if onnx.twice:
        raise Malformed(f"has {quoted(min(onnx.twice))} twice")
    heads, classes = _number(onnx.metadata, "heads"), _number(onnx.metadata, "classes")
    levels = [4 << i for i in range(MAX_LEVELS) if f"projection_{4 << i}" in onnx.initializers]
    slices: dict[str, dict[str, Any]] = {}
    for name in (*(f"projection_{r}" for r in levels), "bias1", "weight2", "bias2", "weight3", "bias3"):
        tensor = onnx.initializers.get(name)
        if tensor is None or tensor.data_type != _FLOAT32:
            raise Malformed(f"has no float32 weights {name}")
        shape = list(tensor.dims[: 1 if name.startswith("bias") else 2])
        if not shape or any(size != 1 for size in tensor.dims[len(shape) :]) or shape[0] % heads:
            raise Malformed(f"has {name} {list(tensor.dims)}, which does not fit {heads} heads")
        if not name.startswith("projection"):
            shape = [heads, shape[0] // heads, *shape[1:]]
        slices[name] = {"offset": tensor.start, "shape": shape}
    if slices["bias3"]["shape"][1] < classes:
        raise Malformed(f"has bias3 for {slices['bias3']['shape'][1]} classes, not for {classes}")
    task, score_kind = (onnx.metadata.get(f"labelmint.{key}", "") for key in ("task", "score_kind"))
    return {"task": task, "score_kind": score_kind, "classes": classes, "slices": slices}


def _number(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(f"labelmint.{key}", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) > 0):
        raise Malformed(f"says {quoted(text)} for the number of {key}")
    return int(text)


def _check_fits(described: Mapping[str, Any], model: ServedModel) -> None:
    """Raises Malformed unless the file says of itself what its ensemble says."""
    given = (described["task"], described["score_kind"], described["classes"], described["slices"]["bias1"]["shape"][0])
    wanted = (model.task.name, model.score_kind, len(model.label_names), model.num_heads)
    for what, one, other in zip(
        ("task", "score kind", "number of classes", "number of heads"), given, wanted, strict=True
    ):
        if one != other:
            raise Malformed(
                f"says {quoted(str(one))} for the {what}, and the model {quoted(model.name)} says {other!r}"
            )
