"""Decides whether the child Triton may load a model directory: it accepts only what `labelmint export` writes.

Rules of this file:
- Triton runs code that it finds: a library or a model.py next to a model, an environment that a parameter names, an
  agent of the repository. So this file has allow lists of files, fields, parameters and their ranges. Anything else is
  refused, even if it is harmless. The error is one line that says what is refused and what to do.
- Nothing is read through a link that leads out of the repository. The repository itself may be a link.
- The reader of a file's format checks the file's content.
- The models of an external Triton (--triton-url) are not checked; its operator is responsible for them.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.errors import UnusableFile
from labelmint.core.executor import executor_of, is_calibration, last_step
from labelmint.core.generator_classes import GENERATOR_CLASSES
from labelmint.core.served_model import MalformedModel, ServedModel, read_served_model
from labelmint.core.task import TASKS
from labelmint.triton.model_config import PYTHON, check_artifacts, model_file, read_config, version_of
from labelmint.triton.onnx_file import MAX_ONNX_BYTES, check_onnx
from labelmint.triton.stored_zip import MAX_ZIP_BYTES, check_native
from labelmint.triton.torchscript_file import check_torchscript
from labelmint.untrusted.content import Malformed, RegularFile, quoted

# The name of a model and its directory. Triton gets it in --load-model, where `*` would mean all models.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,199}")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
MAX_BATCH = 1024
# Of one tensor of one sample. Feature maps at 1024x1024 have a tenth of it.
MAX_TENSOR_BYTES = 1 << 31

_Range = tuple[int, int]
_ANY: _Range = (-(1 << 63), 1 << 64)
_FLAG = re.compile("[01]")
_BOOLEAN = re.compile("true|false|0|1", re.IGNORECASE)
_THREADS = re.compile("[0-9]{1,3}")
_TEXT = re.compile(r"(?s).*")

# Backend: suffix of its file, largest size, function that checks the file, and allowed parameters.
_BACKENDS: Mapping[str, tuple[str, int, Callable[[RegularFile], None], Mapping[str, re.Pattern[str]]]] = {
    "onnxruntime": (
        ".onnx",
        MAX_ONNX_BYTES,
        check_onnx,
        {
            "intra_op_thread_count": _THREADS,
            "inter_op_thread_count": _THREADS,
            "execution_mode": _FLAG,
            "enable_mem_arena": _FLAG,
            "enable_mem_pattern": _FLAG,
        },
    ),
    "pytorch": (
        ".pt",
        MAX_ZIP_BYTES,
        check_torchscript,
        {
            "INTRA_OP_THREAD_COUNT": _THREADS,
            "INTER_OP_THREAD_COUNT": _THREADS,
            "INFERENCE_MODE": _BOOLEAN,
            "DISABLE_OPTIMIZED_EXECUTION": _BOOLEAN,
        },
    ),
    "labelmint": (".npz", MAX_ZIP_BYTES, check_native, {"intra_op_thread_count": _THREADS}),
}
# Parameters that describe an ensemble, beside its calibrations; the gateway reads them, Triton does not.
_DESCRIBED = dict.fromkeys(
    (
        *("model", "pipeline", "task", "model_digest", "layout", "num_heads", "num_ws", "score_kind"),
        *(task.names_parameter for task in TASKS.values()),
        *("palette", GENERATOR_CLASSES),
    ),
    _TEXT,
)
# Allowed fields of a configuration, and the range of numbers. Texts that name something are checked below.
_TENSORS: Mapping[str, _Range] = {
    f"{side}.{field}": limits
    for side in ("input", "output")
    for field, limits in (("name", _ANY), ("data_type", _ANY), ("dims", (1, MAX_TENSOR_BYTES)))
}
_COMMON: Mapping[str, _Range] = {
    "name": _ANY,
    "max_batch_size": (0, MAX_BATCH),
    "version_policy.latest.num_versions": (1, 1),
    **_TENSORS,
}
_ENSEMBLE_FIELDS: Mapping[str, _Range] = {
    **_COMMON,
    "platform": _ANY,
    "ensemble_scheduling.step.model_name": _ANY,
    "ensemble_scheduling.step.model_version": (-1, -1),
    "ensemble_scheduling.step.input_map": _ANY,
    "ensemble_scheduling.step.output_map": _ANY,
}
_MICROSECONDS: _Range = (0, 3_600_000_000)
_STEP_FIELDS: Mapping[str, _Range] = {
    **_COMMON,
    "backend": _ANY,
    "default_model_filename": _ANY,
    "instance_group.count": (1, 64),
    "instance_group.kind": _ANY,
    "instance_group.gpus": (0, 1024),
    **dict.fromkeys(("dynamic_batching", "dynamic_batching.default_queue_policy"), _ANY),  # allowed as empty messages
    "dynamic_batching.preferred_batch_size": (1, MAX_BATCH),
    "dynamic_batching.max_queue_delay_microseconds": _MICROSECONDS,
    "dynamic_batching.default_queue_policy.timeout_action": _ANY,
    "dynamic_batching.default_queue_policy.default_timeout_microseconds": _MICROSECONDS,
    "dynamic_batching.default_queue_policy.allow_timeout_override": _ANY,
    "dynamic_batching.default_queue_policy.max_queue_size": (0, 1 << 20),
    "model_warmup.name": _ANY,
    "model_warmup.batch_size": (0, MAX_BATCH),
    "model_warmup.inputs.data_type": _ANY,
    "model_warmup.inputs.dims": (1, MAX_TENSOR_BYTES),
    "model_warmup.inputs.zero_data": _ANY,
}
_MAX_REPEATED = 64  # inputs, outputs, steps, groups of instances
_ITEM_BYTES = {pb.TYPE_FP32: 4, pb.TYPE_INT32: 4, pb.TYPE_UINT8: 1}


def read_whole_model(repository: Path, name: str, calibrated: bool = True) -> ServedModel:
    """Read an ensemble that the child Triton may load; with `calibrated` False, without its calibrations.

    Its executor is that of the repository; the child Triton may run the kernel in its place.
    Raises UnusableFile unless an export wrote the ensemble and its steps match its digest.
    """
    check_models(repository, [name])
    return read_model(repository, name, calibrated)


def read_model(repository: Path, name: str, calibrated: bool = True) -> ServedModel:
    """Read an ensemble that only another Triton will load, so that its steps may be anything.

    Raises UnusableFile unless the steps match the ensemble's digest.
    """
    path = repository / name / "config.pbtxt"
    config = read_config(path)
    check_artifacts(repository, config)
    executor = executor_of(read_config(repository / last_step(config) / "config.pbtxt"))
    try:
        return read_served_model(config, str(version_of(path.parent)), executor, calibrated=calibrated)
    except MalformedModel as error:
        raise UnusableFile(path, f"is malformed: {error}") from error


def check_models(repository: Path, ensembles: Iterable[str]) -> None:
    """Raises UnusableFile unless these ensembles and their steps are as `labelmint export` writes them."""
    try:
        root = Path(os.path.realpath(repository, strict=True))
    except OSError as error:
        raise UnusableFile(repository, f"cannot be read: {error.strerror}") from error
    steps: dict[str, None] = {}
    for name in ensembles:
        directory = _directory(root, repository, name)
        config = _config(root, directory)
        _check_config(directory, config, _ENSEMBLE_FIELDS, parameters=_DESCRIBED)
        if config.platform != "ensemble":
            raise _refused(directory, f"is an ensemble with the platform {quoted(config.platform)}")
        _check_files(root, directory, {".gitkeep"})
        steps |= {step.model_name: None for step in config.ensemble_scheduling.step}
    directories = [_directory(root, repository, name) for name in steps]
    for directory in directories:  # before the generator's fields for GPUs, which say less
        if _config(root, directory).backend == PYTHON:
            raise UnusableFile(
                directory / "config.pbtxt",
                "names the backend 'python', as exports for GPUs do, and the gateway's own Triton runs on CPUs; if "
                "you exported it, start a Triton on GPUs with it and give its address (--triton-url), or export the "
                "model with `--format onnx`",
            )
    for directory in directories:
        _check_step(root, directory)


def _check_step(root: Path, directory: Path) -> None:
    config = _config(root, directory)
    if config.backend not in _BACKENDS:
        raise _refused(
            directory, f"names the backend {quoted(config.backend)}; supported backends: {', '.join(_BACKENDS)}"
        )
    suffix, max_bytes, check, parameters = _BACKENDS[config.backend]
    _check_config(directory, config, _STEP_FIELDS, parameters=parameters)
    filename = model_file(config)
    if not _NAME.fullmatch(filename.removesuffix(suffix)) or not filename.endswith(suffix):
        raise _refused(
            directory, f"has default_model_filename {quoted(filename)}, which is not the name of a {suffix} file"
        )
    _check_warmup(directory, config)
    version = _check_files(root, directory, {filename})
    path = directory / version / filename
    if not path.exists():
        raise UnusableFile(path, "is missing; the model needs it, export it again")
    with RegularFile(path, max_bytes) as file:
        try:
            check(file)
        except Malformed as problem:
            raise UnusableFile(path, f"{problem}; export the model again") from None


def _directory(root: Path, repository: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UnusableFile(
            repository, f"holds or names a model {quoted(name)}, which is not a name that an export gives"
        )
    directory = repository / name
    if not _is(stat.S_ISDIR, root, directory):
        raise UnusableFile(directory, "is not a directory; export the model again")
    return directory


def _config(root: Path, directory: Path) -> pb.ModelConfig:
    path = directory / "config.pbtxt"
    if path.exists() and not _is(stat.S_ISREG, root, path):
        raise UnusableFile(path, "is not a regular file; remove it and export the model again")
    return read_config(path)


def _check_files(root: Path, directory: Path, wanted: set[str]) -> str:
    """Return the version of a model. Its directory must have only the configuration and one version with `wanted`."""
    version = ""
    for name in _names(directory):
        path = directory / name
        if name == "config.pbtxt":
            continue  # already read
        if not _VERSION.fullmatch(name) or not _is(stat.S_ISDIR, root, path):
            raise _foreign(path)
        if version:
            raise UnusableFile(
                directory,
                "holds several version directories; `labelmint export --version` writes a separate model per version",
            )
        version = name
        for inner in _names(path):
            if inner not in wanted or not _is(stat.S_ISREG, root, path / inner):
                raise _foreign(path / inner)
    if not version:
        raise UnusableFile(directory, "holds 0 version directories, not one; export the model again")
    return version


def _names(directory: Path) -> Iterator[str]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                yield entry.name
    except OSError as error:
        raise UnusableFile(directory, f"cannot be read: {error.strerror}") from error


def _is(kind: Callable[[int], bool], root: Path, path: Path) -> bool:
    """Whether `path` has that file type. Raises UnusableFile for a link that leads out of the repository."""
    try:
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_relative_to(root):
            raise UnusableFile(path, "is a link out of the repository; replace it with a copy of its target")
        return kind(real.stat().st_mode)
    except OSError as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror}; export the model again") from error


def _foreign(path: Path) -> UnusableFile:
    name = quoted(path.name)
    if path.name.isprintable():
        return UnusableFile(path, "is not part of an export, and Triton may run it; remove it")
    return UnusableFile(path.parent, f"holds {name}, which is not part of an export; remove it")


def _refused(directory: Path, problem: str) -> UnusableFile:
    return UnusableFile(directory / "config.pbtxt", f"{problem}; export the model again")


def _unsupported(directory: Path, what: str) -> UnusableFile:
    return UnusableFile(
        directory / "config.pbtxt",
        f"has {what}, which the gateway's own Triton does not support; remove it, or serve the repository with a "
        "Triton that you start (--triton-url)",
    )


def _check_config(
    directory: Path, config: pb.ModelConfig, fields: Mapping[str, _Range], *, parameters: Mapping[str, re.Pattern[str]]
) -> None:
    for path, value in _leaves(config, ""):
        if path not in fields:
            raise _unsupported(directory, f"the field {path}")
        low, high = fields[path]
        if isinstance(value, int) and not low <= value <= high:
            raise _refused(directory, f"has {path} {value}, which is not within {low} and {high}")
    for key, parameter in config.parameters.items():
        text = parameter.string_value
        if parameters is _DESCRIBED and is_calibration(key):
            continue
        if key not in parameters:
            raise _unsupported(directory, f"the parameter {quoted(key)}")
        if not parameters[key].fullmatch(text):
            raise _refused(directory, f"has the parameter {key} {quoted(text)}, which is not one of its values")
    if config.name != directory.name:
        raise _refused(directory, f"names the model {quoted(config.name)}, which is not the name of its directory")
    sides = (config.input, config.output, config.instance_group, config.ensemble_scheduling.step, config.model_warmup)
    if any(len(side) > _MAX_REPEATED for side in sides):
        raise _refused(directory, f"has more than {_MAX_REPEATED} inputs, outputs, steps or instance groups")
    for tensor in (*config.input, *config.output):
        size = _ITEM_BYTES.get(tensor.data_type, 0)
        if not size or len(tensor.dims) > 8 or size * math.prod(tensor.dims) > MAX_TENSOR_BYTES:
            raise _refused(directory, f"declares the tensor {quoted(tensor.name)} of a type or size that no export has")


def _check_warmup(directory: Path, config: pb.ModelConfig) -> None:
    """Triton allocates the tensors that a warm-up declares. They may be a batch of the model's inputs, not more."""
    inputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input}
    for warmup in config.model_warmup:
        given = {name: (entry.data_type, list(entry.dims)) for name, entry in warmup.inputs.items()}
        if given != inputs or warmup.batch_size > max(1, config.max_batch_size):
            raise _refused(directory, "has a model_warmup that does not match the model's inputs")


def _leaves(message: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of each field that is set, and the values of maps. Leaves out the parameters."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if path == "parameters":
            continue
        if field.message_type is None:
            for item in value if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (value,):
                yield path, item
        elif field.message_type.GetOptions().map_entry:
            of_messages = field.message_type.fields_by_name["value"].message_type is not None
            for item in value.values():
                yield from _leaves(item, f"{path}.") if of_messages else ((path, item),)
        else:
            repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
            for item in value if repeated else (value,):
                yield from _of_message(item, path)


def _of_message(message: Any, path: str) -> Iterator[tuple[str, Any]]:
    found = list(_leaves(message, f"{path}."))
    # An empty message can have an effect, as `sequence_batching {}` does, so it is yielded too.
    yield from found or ((path, None),)
