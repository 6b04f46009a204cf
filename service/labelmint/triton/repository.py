"""Reads a model of a repository on disk after it has checked that the model is intact.

Rules of this file:
- The child Triton loads only models that passed this check of structure, artifacts and configuration.
"""

from __future__ import annotations

from pathlib import Path

from labelmint.core.calibration import CALIBRATION
from labelmint.core.errors import UnusableFile
from labelmint.core.served_model import MalformedModel, ServedModel, read_served_model
from labelmint.triton.artifacts import check_models
from labelmint.triton.model_config import check_artifacts, read_config, version_of


def read_whole_model(repository: Path, name: str, calibrated: bool = True) -> ServedModel:
    """Read an ensemble that the child Triton may load; with `calibrated` False, without its calibration.

    Raises UnusableFile unless an export wrote the ensemble and its steps match its digest.
    """
    check_models(repository, [name])
    path = repository / name / "config.pbtxt"
    config = read_config(path)
    check_artifacts(repository, config)
    if not calibrated:
        config.parameters.pop(CALIBRATION, None)
    try:
        return read_served_model(config, str(version_of(path.parent)))
    except MalformedModel as error:
        raise UnusableFile(path, f"is malformed: {error}") from error
