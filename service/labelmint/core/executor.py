"""What runs the interpreter of a served model: labelmint's kernel, or a backend of Triton.

Rules of this file:
- Executors round in different orders, so the same files and seed may give other last digits of a score, and rarely
  another label. So the executor is part of a sample's identity, beside the model digest.
- Triton's configuration of the interpreter's step is the only source. It names the backend and, if the kernel runs in
  the place of the backend that the repository names, that backend too.
- A calibration belongs to an executor. The parameter `calibration` of an ensemble is that of the backend which the
  repository names, so that every Triton can serve the repository. `calibration.kernel` is that of the kernel in its
  place. A conditional generator has them for each class, under these names with the suffix `.class_N`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.calibration import CALIBRATION

KERNEL: Literal["kernel"] = "kernel"
ONNXRUNTIME: Literal["onnxruntime"] = "onnxruntime"
# What a user can choose for the interpreters of ONNX repositories.
Choice: TypeAlias = Literal["kernel", "onnxruntime"]

KERNEL_BACKEND = "labelmint"
STANDS_IN_FOR = "stands_in_for"  # the parameter of a step that names the backend in whose place the kernel runs
KERNEL_CALIBRATION = f"{CALIBRATION}.{KERNEL}"
CALIBRATIONS = (CALIBRATION, KERNEL_CALIBRATION)
_OF_CLASS = re.compile(r"(.+)\.class_(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Executor:
    """`name` is what runs the interpreter, `home` what runs it in a Triton that follows the repository."""

    name: str = ONNXRUNTIME
    home: str = ONNXRUNTIME

    @property
    def calibration(self) -> str:
        """The parameter of an ensemble with the calibration for this executor."""
        return CALIBRATION if self.name == self.home else f"{CALIBRATION}.{self.name}"


def executor_of(step: pb.ModelConfig) -> Executor:
    """Read the executor from the configuration of an ensemble's last step, as Triton or a repository has it."""
    name = KERNEL if step.backend == KERNEL_BACKEND else step.backend
    home = step.parameters[STANDS_IN_FOR].string_value if STANDS_IN_FOR in step.parameters else name
    return Executor(name, home)


def executor_at(
    configs: Mapping[tuple[str, str], Mapping[str, pb.ModelConfig]], ensemble: pb.ModelConfig, address: str
) -> Executor:
    """What runs the interpreter of an ensemble in the Triton at an address; every version of a step is the same.

    `configs` has the configurations of all models by (name, version), then by address. A Triton that does not tell its
    step is taken for one that follows an ONNX repository.
    """
    step = last_step(ensemble)
    found = (by_address[address] for (name, _), by_address in configs.items() if name == step and address in by_address)
    config = next(found, None)
    return Executor() if config is None else executor_of(config)


def last_step(config: pb.ModelConfig) -> str:
    """The name of an ensemble's last step, the interpreter's; "" if it has none."""
    steps = config.ensemble_scheduling.step
    return steps[-1].model_name if steps else ""


def calibration_of_class(parameter: str, class_index: int | None) -> str:
    """The parameter with the calibration of a generator class; None: of a model without classes, `parameter` itself."""
    return parameter if class_index is None else f"{parameter}.class_{class_index}"


def is_calibration(parameter: str) -> bool:
    """Whether a parameter of an ensemble holds a calibration: of the model, or of one of its generator classes."""
    of_class = _OF_CLASS.fullmatch(parameter)
    return (of_class[1] if of_class else parameter) in CALIBRATIONS


def calibrated_classes(parameters: Mapping[str, str]) -> set[int | None]:
    """The classes of all calibrations of an ensemble, of any executor; None for a calibration without a class."""
    classes = (_OF_CLASS.fullmatch(parameter) for parameter in parameters if is_calibration(parameter))
    return {None if of_class is None else int(of_class[2]) for of_class in classes}


def calibrations(executor: Executor, parameters: Mapping[str, str], class_index: int | None = None) -> dict[str, str]:
    """The calibrations of an ensemble as JSON, by the name of the executor that each was measured with.

    `class_index` chooses those of a generator class; None: those of a model without classes.
    """
    home, kernel = (calibration_of_class(name, class_index) for name in CALIBRATIONS)
    found = {executor.home: parameters[home]} if home in parameters else {}
    if kernel in parameters:
        found[KERNEL] = parameters[kernel]
    return found
