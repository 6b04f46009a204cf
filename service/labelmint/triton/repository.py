"""A model of a repository on disk, read only where it is whole.

Rules of this file:
- Our own Triton loads nothing that was not read here: structure, artifacts and configuration are checked first.
"""

from __future__ import annotations

from pathlib import Path

from labelmint.core.calibration import CALIBRATION
from labelmint.core.errors import UnusableFile
from labelmint.core.served_model import MalformedModel, ServedModel, read_served_model
from labelmint.triton.artifacts import check_models
from labelmint.triton.model_config import check_artifacts, read_config, version_of


def read_whole_model(repository: Path, name: str, calibrated: bool = True) -> ServedModel:
    """An ensemble on disk that our own Triton may load; without its calibration where that is not wanted.

    Raises UnusableFile unless an export wrote it and its steps are the files that its digest names.
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
