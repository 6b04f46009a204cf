"""What a client must know of a model, read from Triton's model configuration.

Rules of this file:
- The configuration that travels with the model is the only source; there is no model table here.
- A configuration that lacks or contradicts something is refused whole, with the name of what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.calibration import Calibration

# The outputs of the ensemble that are a task's labels.
LABEL_OUTPUTS: Mapping[str, tuple[str, ...]] = {"segmentation": ("label",), "keypoints": ("keypoints", "confidence")}


class MalformedModel(ValueError):
    """A labelmint ensemble whose configuration cannot be served."""


@dataclass(frozen=True)
class ServedModel:
    """One ensemble in Triton. `triton_name` differs from `name` for the staged pipeline.

    `task` is a key of LABEL_OUTPUTS; `label_names` are those of its classes or of its keypoints, and `palette` has one
    colour for each.
    """

    name: str
    triton_name: str
    version: str
    pipeline: str
    task: str
    digest: str
    resolution: int
    z_dim: int
    num_ws: int
    layout: str
    num_heads: int
    score_kind: str
    label_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    calibration: Calibration | None


def is_labelmint(config: pb.ModelConfig) -> bool:
    return config.platform == "ensemble" and "model_digest" in config.parameters


def read_served_model(config: pb.ModelConfig, version: str) -> ServedModel:
    """Raises MalformedModel naming the model and what is wrong with its configuration."""
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    try:
        return _read(config, version, parameters)
    except KeyError as error:
        raise MalformedModel(f"model {config.name!r}: config.pbtxt lacks {error}; export it again") from error
    except (ValueError, TypeError) as error:
        raise MalformedModel(f"model {config.name!r}: {error}; export it again") from error


def _read(config: pb.ModelConfig, version: str, parameters: Mapping[str, str]) -> ServedModel:
    inputs = {tensor.name: list(tensor.dims) for tensor in config.input}
    outputs = {tensor.name: list(tensor.dims) for tensor in config.output}
    task = parameters["task"]
    if task not in LABEL_OUTPUTS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(LABEL_OUTPUTS)}")
    names = tuple(json.loads(parameters["class_names" if task == "segmentation" else "keypoint_names"]))
    palette = tuple((int(r), int(g), int(b)) for r, g, b in json.loads(parameters["palette"]))
    if len(names) != len(palette):
        raise ValueError(f"{len(names)} names of classes or keypoints but {len(palette)} colours")
    size, count = outputs["image"][0], len(names)
    expected = {"image": [size, size, 3], "js_map": [size, size], "js_score": [1]}
    expected |= {"label": [size, size]} if task == "segmentation" else {"keypoints": [count, 2], "confidence": [count]}
    for name, dims in expected.items():
        if outputs[name] != dims:
            raise ValueError(f"output {name} is {outputs[name]}, not {dims} as task {task!r} has it")
    calibration = Calibration.from_json(parameters["calibration"]) if "calibration" in parameters else None
    if calibration is not None and calibration.score_kind != parameters["score_kind"]:
        raise ValueError(
            f"calibrated for score kind {calibration.score_kind!r}, the model is {parameters['score_kind']!r}"
        )
    # The staged pipeline has a digest of its own, and the calibration of the fused one.
    fused = parameters["pipeline"] == "fused"
    if calibration is not None and fused and calibration.model_digest != parameters["model_digest"]:
        raise ValueError("its calibration was measured on a model of another digest: calibrate this one, too")
    return ServedModel(
        name=parameters["model"],
        triton_name=config.name,
        version=version,
        pipeline=parameters["pipeline"],
        task=task,
        digest=parameters["model_digest"],
        resolution=size,
        z_dim=inputs["latent"][0],
        num_ws=int(parameters["num_ws"]),
        layout=parameters["layout"],
        num_heads=int(parameters["num_heads"]),
        score_kind=parameters["score_kind"],
        label_names=names,
        palette=palette,
        calibration=calibration,
    )
