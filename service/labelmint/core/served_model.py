"""The description of a served model, read from Triton's model configuration.

Rules of this file:
- The configuration that is stored with the model is the only source. There is no table of models here.
- An incomplete or contradictory configuration is refused as a whole, and the error names the problem. Every response
  can therefore use a description that was accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.calibration import Calibration
from labelmint.core.executor import CALIBRATIONS, ONNXRUNTIME, Executor, calibrations
from labelmint.core.task import IMAGE, UNCERTAINTY, Task, task_of

_TYPES = {"uint8": pb.TYPE_UINT8, "float32": pb.TYPE_FP32}
_DIGEST = re.compile("[0-9a-f]{64}")
_MAX_LABELS = 255  # classes: a label is one byte; export applies the same limit to keypoints
_MAX_COUNT = 1024  # for the generator's layers that take a style, and for the classifiers


class MalformedModel(ValueError):
    """A labelmint ensemble whose configuration cannot be served."""


@dataclass(frozen=True)
class ServedModel:
    """One ensemble in Triton. `triton_name` differs from `name` for the staged pipeline.

    `label_names` are the names of its classes or keypoints; `palette` has one colour for each. `calibration` is that of
    the `executor`; `calibrated_for` are the names of all executors that the model was calibrated for.
    """

    name: str
    triton_name: str
    version: str
    pipeline: str
    task: Task
    digest: str
    resolution: int
    z_dim: int
    num_ws: int
    layout: str
    num_heads: int
    score_kind: str
    label_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    executor: Executor
    calibration: Calibration | None
    calibrated_for: tuple[str, ...]

    @property
    def uncalibrated(self) -> str:
        """What is missing and what to do, for a model without a calibration of its executor."""
        others = [name for name in self.calibrated_for if name != self.executor.name]
        but = f" for the executor {self.executor.name!r}, only for {others[0]!r}" if others else ""
        option = f" --executor {ONNXRUNTIME}" if self.executor.name == ONNXRUNTIME else ""
        command = f"labelmint calibrate {self.name}{option}"
        return f"model {self.name!r} is not calibrated{but}; give max_js or run `{command}`"


def is_labelmint(config: pb.ModelConfig) -> bool:
    return config.platform == "ensemble" and "model_digest" in config.parameters


def read_served_model(
    config: pb.ModelConfig, version: str, executor: Executor | None = None, *, calibrated: bool = True
) -> ServedModel:
    """Read a model's description; raises MalformedModel with the model's name and the problem.

    Without an `executor`, the model is described as ONNX Runtime serves it. With `calibrated` False, its calibrations
    are not read.
    """
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    if not calibrated:
        parameters = {key: text for key, text in parameters.items() if key not in CALIBRATIONS}
    try:
        return _read(config, version, parameters, executor=executor or Executor())
    except KeyError as error:
        raise MalformedModel(f"model {config.name!r}: config.pbtxt lacks {error}; export it again") from error
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise MalformedModel(f"model {config.name!r}: {error}; export it again") from error


def _read(config: pb.ModelConfig, version: str, parameters: Mapping[str, str], *, executor: Executor) -> ServedModel:
    inputs = {tensor.name: list(tensor.dims) for tensor in config.input}
    outputs = {tensor.name: list(tensor.dims) for tensor in config.output}
    types = {tensor.name: tensor.data_type for tensor in config.output}
    task = task_of(parameters["task"])
    names = _names(task.names_parameter, parameters)
    palette = tuple(_colour(entry) for entry in _list("palette", parameters["palette"]))
    if len(names) != len(palette):
        raise ValueError(f"{len(names)} names of classes or keypoints but {len(palette)} colours")
    size, count = outputs["image"][0], len(names)
    if not 1 <= size <= 1 << 14 or inputs["latent"] != inputs["style_latent"] or not inputs["latent"][0] >= 1:
        raise ValueError(
            f"bad shapes: image {outputs['image']}, latent {inputs['latent']}, style_latent {inputs['style_latent']}"
        )
    for expected in (IMAGE, *UNCERTAINTY, *task.labels):
        name, dims, data_type = expected.name, list(expected.dims(size, count)), _TYPES[expected.dtype]
        if outputs[name] != dims:
            raise ValueError(f"output {name} is {outputs[name]}, not {dims} as task {task.name!r} requires")
        if types[name] != data_type:
            raise ValueError(f"output {name} is not {pb.DataType.Name(data_type)}")
    if not _DIGEST.fullmatch(parameters["model_digest"]):
        raise ValueError("model_digest is not a SHA-256 in hexadecimal digits")
    measured = {name: _calibration(text, parameters) for name, text in calibrations(executor, parameters).items()}
    return ServedModel(
        name=parameters["model"],
        triton_name=config.name,
        version=version,
        pipeline=parameters["pipeline"],
        task=task,
        digest=parameters["model_digest"],
        resolution=size,
        z_dim=inputs["latent"][0],
        num_ws=_count("num_ws", parameters),
        layout=parameters["layout"],
        num_heads=_count("num_heads", parameters),
        score_kind=parameters["score_kind"],
        label_names=names,
        palette=palette,
        executor=executor,
        calibration=measured.get(executor.name),
        calibrated_for=tuple(sorted(measured)),
    )


def _list(name: str, text: str) -> list[Any]:
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _names(name: str, parameters: Mapping[str, str]) -> tuple[str, ...]:
    names = _list(name, parameters[name])
    for entry in names:
        # JSON can escape a lone surrogate, but neither gRPC nor REST can encode it.
        if not isinstance(entry, str) or not entry or not entry.isprintable():
            raise ValueError(f"{name} has {entry!r}, which is not a printable name")
    if len(set(names)) < len(names):
        raise ValueError(f"{name} has {next(entry for entry in names if names.count(entry) > 1)!r} twice")
    if not 1 <= len(names) <= _MAX_LABELS:
        raise ValueError(f"{name} has {len(names)} names, not 1 to {_MAX_LABELS}")
    return tuple(names)


def _colour(entry: Any) -> tuple[int, int, int]:
    if not isinstance(entry, list) or [type(value) for value in entry] != [int, int, int]:
        raise ValueError(f"palette has {entry!r}, not three integers")
    red, green, blue = entry
    if not all(0 <= value <= 255 for value in entry):
        raise ValueError(f"palette has {entry!r}; each must be within 0 and 255")
    return red, green, blue


def _count(name: str, parameters: Mapping[str, str]) -> int:
    count = int(parameters[name])
    if not 1 <= count <= _MAX_COUNT:
        raise ValueError(f"{name} is {count}, not between 1 and {_MAX_COUNT}")
    return count


def _calibration(text: str, parameters: Mapping[str, str]) -> Calibration:
    calibration = Calibration.from_json(text)
    if calibration.score_kind != parameters["score_kind"]:
        raise ValueError(
            f"calibrated for score kind {calibration.score_kind!r}, the model is {parameters['score_kind']!r}"
        )
    # The staged pipeline has its own digest but the calibration of the fused pipeline.
    fused = parameters["pipeline"] == "fused"
    if fused and calibration.model_digest != parameters["model_digest"]:
        raise ValueError("its calibration was measured on a model with a different digest; calibrate this one too")
    return calibration
