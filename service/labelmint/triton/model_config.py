"""Reads and writes config.pbtxt: Triton's own ModelConfig message in text form.

Rules of this file:
- The same message gives the same bytes: maps are written in key order.
- A file is written aside and renamed.
- The model digest is defined here, since both the exporter that writes it and the server that checks it need it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.errors import UnusableFile

CALIBRATION = "calibration"


def read_config(path: Path) -> pb.ModelConfig:
    """Parse a config.pbtxt; raises UnusableFile naming the file and the line."""
    if not path.is_file():
        raise UnusableFile(path, "does not exist")
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise UnusableFile(path, f"is not a Triton model configuration: {error}") from error


def write_config(path: Path, config: pb.ModelConfig) -> None:
    text = text_format.MessageToString(config, use_index_order=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def ensembles(repository: Path) -> dict[str, pb.ModelConfig]:
    """The labelmint ensembles of a repository on disk, by Triton model name."""
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


def is_fused(config: pb.ModelConfig) -> bool:
    return str(config.parameters["pipeline"].string_value) == "fused"


def model_digest(artifacts: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over the steps' names and files in order: with a seed and options it names a sample for ever."""
    total = hashlib.sha256()
    for name, data in artifacts:
        total.update(f"{name}:{hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def check_artifacts(repository: Path, config: pb.ModelConfig) -> None:
    """Raises UnusableFile unless the ensemble's steps are the files that its digest was taken over."""
    prefix = f"{config.parameters['model'].string_value}_"
    artifacts = []
    for step in config.ensemble_scheduling.step:
        path = repository / step.model_name / "1" / "model.onnx"
        if not path.is_file():
            raise UnusableFile(path, f"is missing; the ensemble {config.name!r} needs it, export the model again")
        artifacts.append((step.model_name.removeprefix(prefix), path.read_bytes()))
    if model_digest(artifacts) != config.parameters["model_digest"].string_value:
        raise UnusableFile(
            repository / config.name / "config.pbtxt",
            "names another model digest than its steps have: a file is damaged or was exchanged; export it again",
        )
