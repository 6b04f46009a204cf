"""Reads and writes config.pbtxt: Triton's ModelConfig message in text form.

Rules of this file:
- The same message always yields the same bytes, because maps are written in key order.
- A file is written under a temporary name and renamed. A file is read only if it is a regular text file of bounded
  size.
- The model digest and the names of versions are defined here, because both the exporter that writes them and the
  gateway that checks them need them.
- Each version of a model is a separate set of Triton models. Triton's version directories share one configuration, so
  an ensemble's steps, digest and calibration could not differ between them. Each Triton model therefore has one
  version directory, named after the version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.errors import UnusableFile
from labelmint.files import replacing
from labelmint.untrusted.content import Malformed, RegularFile

# With a calibration of 1,000 generator classes for each of two executors, a configuration has 4.7 MB.
MAX_CONFIG_BYTES = 16 << 20
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_HASHED_BYTES = 1 << 20  # at a time

# The backend of the interpreter's step of `--format gpu`, all files of that step, and the parameter that names the type
# in which its kernel multiplies.
PYTHON = "python"
GPU_FILES = ("interpreter.npz", "interpreter.py", "model.py")
PRECISION = "precision"


def read_config(path: Path) -> pb.ModelConfig:
    """Parse a config.pbtxt. Raises UnusableFile, which names the file and the line."""
    with RegularFile(path, MAX_CONFIG_BYTES) as file:
        try:
            text = file.read(0, file.size).decode("utf-8")
            # Parsers interpret these differently.
            if found := _CONTROL.search(text):
                raise Malformed(f"it has the control character {found[0]!r}")
            return text_format.Parse(text, pb.ModelConfig())
        except (text_format.ParseError, UnicodeDecodeError, Malformed) as error:
            said = str(error) if len(str(error)) <= 300 else f"{str(error)[:300]}..."
            raise UnusableFile(path, f"is not a Triton model configuration: {said}") from error


def config_text(config: pb.ModelConfig) -> str:
    return text_format.MessageToString(config, use_index_order=True)


def write_config(path: Path, config: pb.ModelConfig) -> None:
    """Write a config.pbtxt. Raises UnusableFile for one that `read_config` would refuse for its size."""
    text = config_text(config)
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise UnusableFile(
            path,
            f"would be larger than {MAX_CONFIG_BYTES >> 20} MiB; it was left as it is. Calibrate fewer generator "
            "classes of this model",
        )
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def ensembles(repository: Path) -> dict[str, pb.ModelConfig]:
    """Return the labelmint ensembles of a repository on disk, by Triton model name."""
    if not repository.is_dir():
        raise UnusableFile(repository, "is not a directory; give the model repository that `labelmint export` wrote")
    found = {}
    for directory in sorted(repository.iterdir()):
        if directory.is_dir() and not directory.name.startswith("."):
            config = read_config(directory / "config.pbtxt")
            if "model_digest" in config.parameters:
                found[directory.name] = config
    if not found:
        raise UnusableFile(repository, "holds no labelmint ensemble; write one with `labelmint export`")
    return found


def base_name(model: str, version: int) -> str:
    """Return the fused ensemble's name in Triton: the prefix for the names of its steps and the staged ensemble."""
    return model if version == 1 else f"{model}_v{version}"


def version_of(directory: Path) -> int:
    """Return the version of a model directory. Raises UnusableFile unless it has exactly one."""
    found = [entry.name for entry in directory.iterdir() if entry.name.isdecimal()]
    if len(found) != 1:
        raise UnusableFile(
            directory,
            f"holds {len(found)} version directories, not one; "
            "`labelmint export --version` writes a separate model per version",
        )
    return int(found[0])


def is_fused(config: pb.ModelConfig) -> bool:
    return str(config.parameters["pipeline"].string_value) == "fused"


def model_file(config: pb.ModelConfig) -> str:
    """Return the name of a step's file: from its configuration, or else its backend's default."""
    # All other backends that can run an exported step read ONNX and use this name.
    default = {"pytorch": "model.pt", "labelmint": "interpreter.npz", PYTHON: "model.py"}.get(
        config.backend, "model.onnx"
    )
    return config.default_model_filename or default


def model_files(config: pb.ModelConfig) -> tuple[str, ...]:
    """Return the names of all files of a step. A step of the Python backend has code beside its weights."""
    return GPU_FILES if config.backend == PYTHON else (model_file(config),)


def step_digest(config: pb.ModelConfig, files: Mapping[str, str]) -> str:
    """Return the digest of a step from those of its files: of one file its own; of several, of names and digests.

    What decides the results of a step of the Python backend beside its files, the precision, counts as well.
    """
    if config.backend != PYTHON:
        return files[model_file(config)]
    precision = config.parameters[PRECISION].string_value
    return _sha256_of_lines([*(f"{name}:{files[name]}" for name in GPU_FILES), f"{PRECISION}:{precision}"])


def digest_of_steps(artifacts: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over the steps' names and digests, in order. With a seed and options, it identifies a sample for ever."""
    return _sha256_of_lines(f"{name}:{digest}" for name, digest in artifacts)


def _sha256_of_lines(lines: Iterable[str]) -> str:
    total = hashlib.sha256()
    for line in lines:
        total.update(f"{line}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_HASHED_BYTES):
            found.update(data)
    return found.hexdigest()


def check_artifacts(repository: Path, config: pb.ModelConfig) -> None:
    """Raises UnusableFile unless the ensemble's digest was computed from the files of its steps."""
    version = version_of(repository / config.name)
    prefix = f"{base_name(config.parameters['model'].string_value, version)}_"
    artifacts = []
    for step in config.ensemble_scheduling.step:
        directory = repository / step.model_name
        step_config = read_config(directory / "config.pbtxt")
        files = {name: directory / str(version) / name for name in model_files(step_config)}
        for path in files.values():
            if not path.is_file():
                raise UnusableFile(path, f"is missing; the ensemble {config.name!r} needs it, export the model again")
        digest = step_digest(step_config, {name: _sha256(path) for name, path in files.items()})
        artifacts.append((step.model_name.removeprefix(prefix), digest))
    if digest_of_steps(artifacts) != config.parameters["model_digest"].string_value:
        raise UnusableFile(
            repository / config.name / "config.pbtxt",
            "has a model digest that does not match its steps: a file is damaged or was replaced; export it again",
        )
