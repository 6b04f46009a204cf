"""Exports that several tests look at, made once.

Rules of this file:
- Who changes one takes a copy.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from labelmint.export.repository import export_repository
from tests.support.models import small


@pytest.fixture(scope="session")
def small_repository(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Callable[[str], Path]:
    """The repository of the model `tiny` in a format."""

    @functools.cache
    def exported(file_format: str) -> Path:
        if file_format == "onnx":
            return tiny_repository
        directory = tmp_path_factory.mktemp(file_format)
        export_repository(directory, "tiny", small(), file_format=file_format)
        return directory

    return exported
