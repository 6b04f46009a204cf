"""Writes a model repository that Triton serves: ONNX files, config.pbtxt files, calibration.

Rules of this file:
- config.pbtxt is the text form of Triton's own ModelConfig message; nothing is pasted together as strings.
- The ensemble's `parameters` carry all that a client must know; the gateway has no model table of its own.
- A model directory is written aside, whole, and renamed; writing the same weights twice gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.errors import IncompatibleWeights
from labelmint.export.modules import (
    FeatureAggregationStep,
    GeneratorStep,
    MlpHeadsStep,
    Step,
    StyleInterpreterStep,
    TensorSpec,
    UncertaintyStep,
    label_outputs,
    latent_inputs,
)
from labelmint.export.onnx_export import export_onnx
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.layout import channels_of
from labelmint.models.store import load_generator, load_interpreter
from labelmint.models.stylegan2 import Generator
from labelmint.triton.model_config import CALIBRATION, model_digest, read_config, write_config

MAX_BATCH_SIZE = 16
# Triton copies the tensors between steps several times; a step's batch is bounded by what one copy may weigh.
MAX_BATCH_BYTES = 384 << 20
# A request older than this has no client any more; nothing waits in a queue for ever.
QUEUE_TIMEOUT_MICROSECONDS = 60_000_000
MAX_QUEUE_SIZE = 512

_DTYPES = {torch.float32: pb.TYPE_FP32, torch.int32: pb.TYPE_INT32, torch.uint8: pb.TYPE_UINT8}

FUSED = ("generator", "style_interpreter")
STAGED = ("generator", "feature_aggregation", "mlp_heads", "uncertainty")


def export_repository(
    repository: Path, model: str, generator: Generator, interpreter: StyleInterpreter
) -> dict[str, dict[str, float]]:
    """Write `<model>`, `<model>_staged` and their steps into `repository`.

    Returns, per step, the largest difference of each output between ONNX and torch. Raises IncompatibleWeights when the
    interpreter was not trained on this generator's features. A calibration is kept if the artifacts did not change.
    """
    spec, given = interpreter.spec, channels_of(interpreter.spec.layout, generator.spec.channels)
    if dict(spec.channels) != given:
        raise IncompatibleWeights(
            f"the interpreter reads layout {spec.layout!r} with D={spec.feature_dim} channels {dict(spec.channels)}, "
            f"the generator gives D={sum(given.values())} channels {given}"
        )
    steps: dict[str, Step] = {
        "generator": GeneratorStep(generator, interpreter),
        "style_interpreter": StyleInterpreterStep(interpreter),
        "feature_aggregation": FeatureAggregationStep(interpreter),
        "mlp_heads": MlpHeadsStep(interpreter),
        "uncertainty": UncertaintyStep(interpreter),
    }
    repository.mkdir(parents=True, exist_ok=True)
    differences, data = {}, {}
    for name, step in tqdm(steps.items(), desc="export", unit="model"):
        exported = export_onnx(step)
        differences[name], data[name] = exported.difference, exported.data
    for name, step in steps.items():
        _write_model(repository, _step_config(f"{model}_{name}", step), data[name])
    for pipeline, used in (("fused", FUSED), ("staged", STAGED)):
        name = model if pipeline == "fused" else f"{model}_{pipeline}"
        digest = model_digest((step, data[step]) for step in used)
        config = _ensemble_config(name, model, [(step, steps[step]) for step in used], generator, interpreter)
        _describe(config, model, pipeline, digest, generator, interpreter)
        _keep_calibration(repository / name / "config.pbtxt", config)
        _write_model(repository, config, None)
    return differences


def _max_batch(step: Step) -> int:
    heaviest = max(sum(spec.bytes for spec in side) for side in (step.inputs, step.outputs))
    return max(1, min(MAX_BATCH_SIZE, MAX_BATCH_BYTES // heaviest))


def _step_config(name: str, step: Step) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, backend="onnxruntime", max_batch_size=_max_batch(step))
    _add_tensors(config, step.inputs, step.outputs)
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(count=1)
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = pb.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = QUEUE_TIMEOUT_MICROSECONDS
    policy.allow_timeout_override = True
    policy.max_queue_size = MAX_QUEUE_SIZE
    warmup = config.model_warmup.add(name="zeros", batch_size=1)
    for spec in step.inputs:
        entry = warmup.inputs[spec.name]
        entry.data_type = _DTYPES[spec.dtype]
        entry.dims.extend(spec.shape)
        entry.zero_data = True
    return config


def _ensemble_config(
    name: str, model: str, steps: Sequence[tuple[str, Step]], generator: Generator, interpreter: StyleInterpreter
) -> pb.ModelConfig:
    batch = min(_max_batch(step) for _, step in steps)
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=batch)
    resolution = generator.spec.resolution
    image = TensorSpec("image", torch.uint8, (resolution, resolution, generator.spec.image_channels))
    _add_tensors(config, latent_inputs(generator.spec.z_dim), (image, *label_outputs(interpreter.spec.resolution)))
    config.version_policy.latest.num_versions = 1
    for step_name, step in steps:
        # Every tensor has the same name inside the ensemble as in its step.
        entry = config.ensemble_scheduling.step.add(model_name=f"{model}_{step_name}", model_version=-1)
        for spec in step.inputs:
            entry.input_map[spec.name] = spec.name
        for spec in step.outputs:
            entry.output_map[spec.name] = spec.name
    return config


def _add_tensors(config: pb.ModelConfig, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    for spec in inputs:
        config.input.add(name=spec.name, data_type=_DTYPES[spec.dtype], dims=spec.shape)
    for spec in outputs:
        config.output.add(name=spec.name, data_type=_DTYPES[spec.dtype], dims=spec.shape)


def _describe(
    config: pb.ModelConfig,
    model: str,
    pipeline: str,
    digest: str,
    generator: Generator,
    interpreter: StyleInterpreter,
) -> None:
    spec = interpreter.spec
    described = {
        "model": model,
        "pipeline": pipeline,
        "task": "segmentation",
        "model_digest": digest,
        "layout": spec.layout,
        "num_heads": str(spec.num_heads),
        "num_ws": str(generator.spec.num_ws),
        "score_kind": interpreter.score_kind,
        "class_names": json.dumps(spec.class_names),
        "palette": json.dumps(spec.palette),
    }
    for key, value in described.items():
        config.parameters[key].string_value = value


def _keep_calibration(path: Path, config: pb.ModelConfig) -> None:
    if not path.exists():
        return
    old = read_config(path)
    unchanged = old.parameters["model_digest"] == config.parameters["model_digest"]
    if unchanged and CALIBRATION in old.parameters:
        config.parameters[CALIBRATION].CopyFrom(old.parameters[CALIBRATION])


def _write_model(repository: Path, config: pb.ModelConfig, data: bytes | None) -> None:
    final = repository / config.name
    aside = repository / f".{config.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    version = aside / "1"
    version.mkdir(parents=True)
    if data is None:
        # Triton wants a version directory even of an ensemble, and git keeps no empty ones.
        (version / ".gitkeep").touch()
    else:
        (version / "model.onnx").write_bytes(data)
    write_config(aside / "config.pbtxt", config)
    # A directory cannot replace one that is not empty: the old one steps aside, and goes when the new one stands.
    old = repository / f".{config.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    shutil.rmtree(old, ignore_errors=True)


def export_files(generator: Path, interpreter: Path, repository: Path, model: str, score_kind: str) -> None:
    """`labelmint export`: read both weights, write the repository, print the differences to torch."""
    loaded = load_interpreter(interpreter, score_kind)
    differences = export_repository(repository, model, load_generator(generator), loaded)
    for step, outputs in differences.items():
        worst = max(outputs, key=lambda name: outputs[name])
        print(f"{model}_{step}: differs from torch by at most {outputs[worst]:.1e} ({worst})")
