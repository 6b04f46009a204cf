"""What the child Triton gets as its model repository: links to the user's models, with the kernel where it can run.

Rules of this file:
- The user's files stay as they are. A model's directory here is a real one with links in it. Triton reads it when it
  lists its models, and a link that leads nowhere would spoil the list.
- For a step that the kernel runs, the directory has its own config.pbtxt and a description of the weights. So Triton's
  own configuration of the step says what runs it, after any restart, and the gateway reads it there.
- A file is written only if its content is another one, because Triton loads a model again whose files are newer.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.executor import KERNEL, ONNXRUNTIME, Choice, last_step
from labelmint.core.served_model import MalformedModel, read_served_model
from labelmint.kernel.interpreter import KernelUnavailable, library_here
from labelmint.triton.kernel_steps import DESCRIPTION, Unrecognised, configuration, describe
from labelmint.triton.model_config import config_text, is_fused, model_file, read_config, version_of

logger = logging.getLogger(__name__)

_Files: TypeAlias = dict[str, "str | Path"]  # by path in a model's directory: the text, or the target of the link


class Mirror:
    """Shows models of `repository` in `directory`, for a Triton whose interpreters run in `executor`."""

    def __init__(self, repository: Path, directory: Path, executor: Choice, *, told: set[str]) -> None:
        """`told` has the reasons that were logged before, as each reason is logged once in all starts of Triton."""
        self._repository = repository.absolute()
        self._directory = directory
        self._executor = executor
        self._told = told
        directory.mkdir()

    def show(self, ensembles: Iterable[str]) -> None:
        """Show these ensembles and their steps as they are on disk now. Raises UnusableFile."""
        for name in ensembles:
            config = read_config(self._repository / name / "config.pbtxt")
            self._write(name, self._links(name))
            for step in config.ensemble_scheduling.step:
                in_kernel = self._in_the_kernel(config) if step.model_name == last_step(config) else {}
                self._write(step.model_name, in_kernel or self._links(step.model_name))

    def _links(self, name: str) -> _Files:
        return {path.name: path for path in (self._repository / name).iterdir()}

    def _in_the_kernel(self, ensemble: pb.ModelConfig) -> _Files:
        """Return the directory with which the kernel runs an ensemble's interpreter; empty if its backend runs it."""
        step = last_step(ensemble)
        config = read_config(self._repository / step / "config.pbtxt")
        if self._executor != KERNEL or config.backend != ONNXRUNTIME or not is_fused(ensemble):
            return {}
        version = str(version_of(self._repository / step))
        directory = self._repository / step / version
        try:
            library_here()
            described = describe(directory, config, read_served_model(ensemble, version, calibrated=False))
        except (KernelUnavailable, Unrecognised, MalformedModel) as error:
            self._tell(f"{step} runs in ONNX Runtime and not in the kernel, which is faster: {error}")
            return {}
        filename = model_file(config)
        return {
            "config.pbtxt": config_text(configuration(config)),
            f"{version}/{DESCRIPTION}": json.dumps(described),
            f"{version}/{filename}": directory / filename,
        }

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("%s", reason)

    def _write(self, name: str, files: _Files) -> None:
        directory = self._directory / name
        if _shown(directory) == files:
            return
        shutil.rmtree(directory, ignore_errors=True)
        for path, content in files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                (directory / path).symlink_to(content)
            else:
                (directory / path).write_text(content, encoding="utf-8")


def _shown(directory: Path) -> Mapping[str, str | Path]:
    """Return what `_write` has written into a directory. It does not follow the links there."""
    found: dict[str, str | Path] = {}
    for path in directory.iterdir() if directory.exists() else ():
        if path.is_symlink():
            found[path.name] = path.readlink()
        elif path.is_dir():
            found |= {f"{path.name}/{name}": content for name, content in _shown(path).items()}
        else:
            found[path.name] = path.read_text(encoding="utf-8")
    return found
