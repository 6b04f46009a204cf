"""Writes a model repository that Triton serves: the files of the steps, config.pbtxt files, calibration.

Rules of this file:
- config.pbtxt is the text form of Triton's own ModelConfig message; it is never built by concatenating strings.
- The ensemble's `parameters` carry everything that a client must know, because the gateway has no model table.
- A model directory is first written completely under a temporary name and then renamed. Writing the same weights twice
  gives the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.errors import IncompatibleWeights, UnusableFile
from labelmint.core.executor import is_calibration
from labelmint.core.generator_classes import GENERATOR_CLASSES
from labelmint.core.task import task_of
from labelmint.export import gpu_export, memory, modules, native_export, torchscript_export
from labelmint.export.comparison import ExportedStep
from labelmint.export.gpu_export import DEFAULT_PRECISION, export_gpu
from labelmint.export.modules import Step, TensorSpec
from labelmint.export.native_export import export_native
from labelmint.export.onnx_export import export_onnx
from labelmint.export.torchscript_export import export_torchscript
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.layout import channels_of
from labelmint.models.store import load_generator, load_interpreter
from labelmint.triton.model_config import (
    PYTHON,
    base_name,
    digest_of_steps,
    model_file,
    read_config,
    step_digest,
    write_config,
)

_DTYPES = {torch.float32: pb.TYPE_FP32, torch.int32: pb.TYPE_INT32, torch.uint8: pb.TYPE_UINT8}

MAX_STRIPS = 512  # of an interpreter; what more of them need, `triton.onnx_file` refuses

FUSED = ("generator", "style_interpreter")
STAGED = ("generator", "feature_aggregation", "mlp_heads", "uncertainty")
STEPS: Mapping[str, Callable[[Generator, StyleInterpreter], Step]] = {
    "generator": modules.GeneratorStep,
    "style_interpreter": lambda _, interpreter: modules.StyleInterpreterStep(interpreter),
    "feature_aggregation": lambda _, interpreter: modules.FeatureAggregationStep(interpreter),
    "mlp_heads": lambda _, interpreter: modules.MlpHeadsStep(interpreter),
    "uncertainty": lambda _, interpreter: modules.UncertaintyStep(interpreter),
}
FORMATS: Mapping[str, Callable[[Step], ExportedStep]] = {
    "onnx": export_onnx,
    "torchscript": export_torchscript,
    "native": export_native,
    "gpu": export_gpu,
}


def export_repository(
    repository: Path,
    model: str,
    weights: tuple[Generator, StyleInterpreter],
    *,
    file_format: str = "onnx",
    version: int = 1,
    staged: bool = True,
    precision: str = DEFAULT_PRECISION,
) -> dict[str, dict[str, float]]:
    """Write `<model>`, `<model>_staged` and their steps into `repository`; from version 2 on `<model>_v2` and so on.

    The staged pipeline is left out, and one of an earlier export removed, unless `staged`, if one sample's `hidden`
    tensor is larger than `MAX_BATCH_BYTES`, and in the format `gpu`. `file_format` is a key of `FORMATS`, and only the
    format `gpu` has a `precision`. An existing calibration is kept if the artifacts did not change. Returns, per step,
    the largest difference of each output between the file and torch. Raises IncompatibleWeights if the interpreter does
    not fit the generator, and UnusableFile if the name belongs to a version of another model.
    """
    generator, interpreter = weights
    _check_belong_together(generator, interpreter)
    _check_strips(interpreter)
    base = base_name(model, version)
    _check_name_is_free(repository / base, model)
    pipelines: dict[str, tuple[str, ...]] = {"fused": FUSED}
    # On a GPU, `hidden` would cross the memory, which is what the kernel avoids.
    if staged and file_format != "gpu" and modules.hidden_tensor(interpreter).bytes <= modules.MAX_BATCH_BYTES:
        pipelines["staged"] = STAGED
    wanted = dict.fromkeys(itertools.chain.from_iterable(pipelines.values()))
    steps = {name: STEPS[name](generator, interpreter) for name in STEPS if name in wanted}
    configs = {name: step_config(f"{base}_{name}", step, file_format, precision) for name, step in steps.items()}
    if file_format == "gpu":
        gpu_export.check_range(generator, interpreter, precision)
    repository.mkdir(parents=True, exist_ok=True)
    differences, files = {}, {}
    for name, step in tqdm(steps.items(), desc="export", unit="model"):
        exported = FORMATS[file_format](step)
        differences[name] = exported.difference
        files[name] = _files(configs[name], exported.data)
    for name, config in configs.items():
        write_model(repository, config, version, files=files[name])
    for pipeline, used in pipelines.items():
        name = base if pipeline == "fused" else f"{base}_{pipeline}"
        digest = digest_of_steps((step, _digest(configs[step], files[step])) for step in used)
        config = _ensemble_config(
            name, [(configs[step], steps[step]) for step in used], generator=generator, interpreter=interpreter
        )
        _describe(config, model, pipeline, digest=digest, generator=generator, interpreter=interpreter)
        _keep_calibration(repository / name / "config.pbtxt", config)
        write_model(repository, config, version, files={".gitkeep": b""})
    if "staged" not in pipelines:  # an earlier export may have left a staged pipeline with other weights
        for name in (f"{base}_staged", *(f"{base}_{step}" for step in STAGED if step not in wanted)):
            shutil.rmtree(repository / name, ignore_errors=True)
    gpu_export.write_flags(repository)
    return differences


def _files(config: pb.ModelConfig, data: bytes) -> dict[str, bytes]:
    """Return the files of a step by name. `data` is what its format writes."""
    return gpu_export.files(data) if config.backend == PYTHON else {model_file(config): data}


def _digest(config: pb.ModelConfig, files: Mapping[str, bytes]) -> str:
    return step_digest(config, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def _check_strips(interpreter: StyleInterpreter) -> None:
    resolution, rows = interpreter.spec.resolution, interpreter.strip_rows
    if resolution > rows * MAX_STRIPS:
        raise IncompatibleWeights(
            f"strips of {rows} rows would be {resolution // rows} at {resolution}x{resolution} pixels, and the export "
            f"writes at most {MAX_STRIPS}; set --strip-rows to at least {resolution // MAX_STRIPS}"
        )


def _check_belong_together(generator: Generator, interpreter: StyleInterpreter) -> None:
    spec = interpreter.spec
    try:
        given = channels_of(spec.layout, generator.spec.taps)
    except ValueError as error:
        raise IncompatibleWeights(f"the interpreter does not fit the generator: {error}") from error
    if dict(spec.channels) != given:
        raise IncompatibleWeights(
            f"the interpreter reads layout {spec.layout!r} with D={spec.feature_dim} channels {dict(spec.channels)}, "
            f"the generator gives D={sum(given.values())} channels {given}"
        )
    if spec.resolution != generator.spec.resolution:
        raise IncompatibleWeights(
            f"the interpreter labels {spec.resolution}x{spec.resolution} pixels, but the generator's images have "
            f"{generator.spec.resolution}x{generator.spec.resolution}"
        )


def _check_name_is_free(directory: Path, model: str) -> None:
    path = directory / "config.pbtxt"
    if path.exists() and (owner := read_config(path).parameters["model"].string_value) != model:
        raise UnusableFile(path, f"belongs to the model {owner!r}; export under another name or version")


def step_config(name: str, step: Step, file_format: str, precision: str = DEFAULT_PRECISION) -> pb.ModelConfig:
    """Return the configuration with which Triton serves a step as the model `name`, from a file of that format."""
    config = pb.ModelConfig(name=name, backend="onnxruntime", max_batch_size=step.max_batch)
    _add_tensors(config, step.inputs, step.outputs)
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(count=1)
    # No queue policy is set: with a timeout or a maximum queue size, Triton prepares no batch while the model is busy.
    # It then notices a request that arrived meanwhile only at the next request or after half a second, and notices
    # fewer and fewer over days (triton-inference-server/server#8870). The gateway's slots bound the queue instead.
    config.dynamic_batching.SetInParent()
    warmup = config.model_warmup.add(name="zeros", batch_size=1)
    for spec in step.inputs:
        entry = warmup.inputs[spec.name]
        entry.data_type = _DTYPES[spec.dtype]
        entry.dims.extend(spec.shape)
        entry.zero_data = True
    if file_format == "torchscript":
        torchscript_export.configure(config)
    elif file_format == "native" and isinstance(step, modules.StyleInterpreterStep):
        native_export.configure(config)
    else:
        # A memory pattern allocates one block for all tensors in addition to the arena of the first run: twice the
        # memory, and no gain.
        config.parameters["enable_mem_pattern"].string_value = "0"
    if file_format == "gpu":
        gpu_export.configure(config, step, precision)
    return config


def _ensemble_config(
    name: str, steps: Sequence[tuple[pb.ModelConfig, Step]], *, generator: Generator, interpreter: StyleInterpreter
) -> pb.ModelConfig:
    batch = min(step_config.max_batch_size for step_config, _ in steps)
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=batch)
    resolution = generator.spec.resolution
    image = TensorSpec("image", torch.uint8, (resolution, resolution, 3))
    inputs = modules.latent_inputs(generator.spec.z_dim, conditional=bool(generator.spec.generator_classes))
    _add_tensors(config, inputs, (image, *modules.label_outputs(interpreter)))
    config.version_policy.latest.num_versions = 1
    for step_config, step in steps:
        # Every tensor has the same name inside the ensemble as in its step.
        entry = config.ensemble_scheduling.step.add(model_name=step_config.name, model_version=-1)
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
    *,
    digest: str,
    generator: Generator,
    interpreter: StyleInterpreter,
) -> None:
    spec = interpreter.spec
    described = {
        "model": model,
        "pipeline": pipeline,
        "task": spec.task,
        "model_digest": digest,
        "layout": spec.layout,
        "num_heads": str(spec.num_heads),
        "num_ws": str(generator.spec.num_ws),
        "score_kind": interpreter.score_kind,
        task_of(spec.task).names_parameter: json.dumps(spec.class_names),
        "palette": json.dumps(spec.palette),
    }
    if generator.spec.generator_classes:
        described[GENERATOR_CLASSES] = json.dumps(generator.spec.generator_classes)
    for key, value in described.items():
        config.parameters[key].string_value = value


def _keep_calibration(path: Path, config: pb.ModelConfig) -> None:
    if not path.exists():
        return
    old = read_config(path)
    if old.parameters["model_digest"] != config.parameters["model_digest"]:
        return
    for parameter, value in old.parameters.items():
        if is_calibration(parameter):
            config.parameters[parameter].CopyFrom(value)


def write_model(repository: Path, config: pb.ModelConfig, version: int, *, files: Mapping[str, bytes]) -> None:
    """Write a model's directory, replacing an existing one.

    Triton requires a version directory even for an ensemble, and git does not store empty directories. So `files` of an
    ensemble is an empty `.gitkeep`.
    """
    final = repository / config.name
    aside = repository / f".{config.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    directory = aside / str(version)
    directory.mkdir(parents=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    write_config(aside / "config.pbtxt", config)
    # A rename cannot replace a directory that is not empty. So the old one is renamed first, and removed at the end.
    old = repository / f".{config.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    shutil.rmtree(old, ignore_errors=True)


def export_files(
    generator: Path,
    interpreter: Path,
    repository: Path,
    *,
    model: str,
    score_kind: str,
    file_format: str,
    version: int,
    staged: bool,
    precision: str,
    strip_rows: int | None,
) -> None:
    """`labelmint export`: read both weight files, write the repository, print differences to torch and the memory."""
    loaded = load_interpreter(interpreter, score_kind, strip_rows)
    differences = export_repository(
        repository,
        model,
        (load_generator(generator), loaded),
        file_format=file_format,
        version=version,
        staged=staged,
        precision=precision,
    )
    base = base_name(model, version)
    for step, outputs in differences.items():
        worst = max(outputs, key=lambda name: outputs[name])
        print(f"{base}_{step}: differs from torch by at most {outputs[worst]:.1e} ({worst})")
    if file_format == "gpu":
        print(gpu_export.compared(loaded))
    elif staged and "uncertainty" not in differences:
        mebibytes = modules.hidden_tensor(loaded).bytes >> 20
        print(f"{base}_staged: left out, because one hidden tensor alone has {mebibytes} MiB")
    for said in (gpu_export.advice(repository), memory.advice(repository)):
        if said:
            print(said)
