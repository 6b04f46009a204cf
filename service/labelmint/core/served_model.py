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
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.calibration import Calibration
from labelmint.core.executor import ONNXRUNTIME, Executor, calibrated_classes, calibrations, is_calibration
from labelmint.core.generator_classes import CLASS_INDEX, GENERATOR_CLASSES, check_class_names
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

    `generator_classes` are the names of the classes that a conditional generator draws; the index is class_index.
    `class_calibrations` has one entry for each, None where the class was not calibrated; such a model has no
    `calibration`. Both are empty for a generator without classes.
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
    # Thousands of them would make each hash slow.
    generator_classes: tuple[str, ...] = field(default=(), hash=False)
    class_calibrations: tuple[Calibration | None, ...] = field(default=(), hash=False)

    @property
    def calibrated_classes(self) -> tuple[int, ...]:
        """The index of each generator class that was calibrated, ascending."""
        return tuple(index for index, each in enumerate(self.class_calibrations) if each is not None)

    def calibration_of(self, class_index: int | None) -> Calibration | None:
        """The calibration that applies to samples of a generator class, or to all samples if the class is None."""
        return self.calibration if class_index is None else self.class_calibrations[class_index]

    def uncalibrated(self, class_index: int | None = None) -> str:
        """What is missing and what to do, where `calibration_of` has no calibration of the executor."""
        what, option = f"model {self.name!r}", f" --executor {ONNXRUNTIME}" if self.executor.name == ONNXRUNTIME else ""
        others = [name for name in self.calibrated_for if name != self.executor.name]
        but = f" for the executor {self.executor.name!r}, only for {others[0]!r}" if others else ""
        if class_index is not None:
            what, but = f"class {class_index} ({self.generator_classes[class_index]}) of {what}", ""
            option = f" --class-index {class_index}{option}"
        return f"{what} is not calibrated{but}; give max_js or run `labelmint calibrate {self.name}{option}`"


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
        parameters = {key: text for key, text in parameters.items() if not is_calibration(key)}
    try:
        return _read(config, version, parameters, executor=executor or Executor())
    except KeyError as error:
        raise MalformedModel(f"model {config.name!r}: config.pbtxt lacks {error}; export it again") from error
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise MalformedModel(f"model {config.name!r}: {error}; export it again") from error


def _read(config: pb.ModelConfig, version: str, parameters: Mapping[str, str], *, executor: Executor) -> ServedModel:
    inputs = {tensor.name: list(tensor.dims) for tensor in config.input}
    classes = _generator_classes(config, parameters)
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
    measured = _measured(parameters, executor)
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
        calibration=measured.get(None, {}).get(executor.name),
        calibrated_for=tuple(sorted({name for found in measured.values() for name in found})),
        generator_classes=classes,
        class_calibrations=tuple(measured.get(index, {}).get(executor.name) for index in range(len(classes))),
    )


def _list(name: str, text: str) -> list[Any]:
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _generator_classes(config: pb.ModelConfig, parameters: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the generator's classes, which it has if and only if the ensemble has the input for them."""
    inputs = [(tensor.data_type, list(tensor.dims)) for tensor in config.input if tensor.name == CLASS_INDEX]
    if bool(inputs) != (GENERATOR_CLASSES in parameters):
        has, lacks = f"the input {CLASS_INDEX}", f"the parameter {GENERATOR_CLASSES}"
        has, lacks = (has, lacks) if inputs else (lacks, has)
        raise ValueError(f"it has {has} and lacks {lacks}")
    if inputs not in ([], [(pb.TYPE_INT32, [1])]):
        raise ValueError(f"input {CLASS_INDEX} is not one TYPE_INT32")
    classes = check_class_names(_list(GENERATOR_CLASSES, parameters[GENERATOR_CLASSES])) if inputs else ()
    if inputs and not classes:
        raise ValueError(f"{GENERATOR_CLASSES} has no names")
    for index in calibrated_classes(parameters):
        if index is None and classes:
            raise ValueError("it has generator classes and a calibration without a class")
        if index is not None and index >= len(classes):
            raise ValueError(f"it has a calibration of class {index} and {len(classes)} generator classes")
    return classes


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


def _measured(parameters: Mapping[str, str], executor: Executor) -> dict[int | None, dict[str, Calibration]]:
    """All calibrations, by generator class and then by the name of the executor that each was measured with."""
    return {
        index: {
            name: _calibration(text, parameters, index)
            for name, text in calibrations(executor, parameters, index).items()
        }
        for index in calibrated_classes(parameters)
    }


def _calibration(text: str, parameters: Mapping[str, str], class_index: int | None) -> Calibration:
    calibration = _parsed(text)
    if calibration.class_index != class_index:
        raise ValueError(f"its calibration of class {class_index} was measured on class {calibration.class_index}")
    if calibration.score_kind != parameters["score_kind"]:
        raise ValueError(
            f"calibrated for score kind {calibration.score_kind!r}, the model is {parameters['score_kind']!r}"
        )
    # The staged pipeline has its own digest but the calibration of the fused pipeline.
    fused = parameters["pipeline"] == "fused"
    if fused and calibration.model_digest != parameters["model_digest"]:
        raise ValueError("its calibration was measured on a model with a different digest; calibrate this one too")
    return calibration


# Triton's models are read again and again, and a model may have a calibration for each of a thousand classes.
@lru_cache(maxsize=4096)
def _parsed(text: str) -> Calibration:
    return Calibration.from_json(text)
