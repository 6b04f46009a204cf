"""Writes the style interpreter as weights for the kernel of Triton's `labelmint` backend, and the other steps as ONNX.

Rules of this file:
- The file has only the plain arrays of `labelmint.kernel.interpreter.check_weights`; the kernel is part of the backend.
- The export compares the serving kernel with torch before the file is kept.
- The same weights give the same bytes: the arrays are stored in a fixed order, with fixed timestamps.
- `configure` leaves out Triton's batcher. Samples run one by one on all cores anyway, and without a batch a finished
  sample does not wait for the others.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.errors import IncompatibleWeights
from labelmint.export.comparison import Array, ExportedStep, compare
from labelmint.export.modules import Step, StyleInterpreterStep
from labelmint.export.onnx_export import export_onnx
from labelmint.export.weights import arrays_of
from labelmint.kernel.interpreter import Interpreter, UnusableWeights, check_weights
from labelmint.models.interpreter import StyleInterpreter

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest timestamp that a zip entry can have


def export_native(step: Step) -> ExportedStep:
    """Export the style interpreter as the kernel's weights, and any other step as ONNX.

    Raises IncompatibleWeights for an interpreter that the kernel cannot run, KernelUnavailable if this machine has no
    kernel, and RuntimeError if the kernel's results differ from torch's.
    """
    if not isinstance(step, StyleInterpreterStep):
        return export_onnx(step)
    data = weights_file(step.interpreter)
    kernel = Interpreter(io.BytesIO(data))

    def run(tensors: Sequence[Tensor]) -> Sequence[Array]:
        samples = [kernel.run([x[row].numpy() for x in tensors]) for row in range(tensors[0].shape[0])]
        return [np.stack([sample[name] for sample in samples]) for name in kernel.outputs]

    return ExportedStep(data, compare(step, run))


def configure(config: pb.ModelConfig) -> None:
    """Change the config.pbtxt of the style interpreter's step to serve this format."""
    config.backend = "labelmint"
    config.ClearField("dynamic_batching")


def weights_file(interpreter: StyleInterpreter) -> bytes:
    """Return the file that the kernel reads. Raises IncompatibleWeights if the kernel cannot run the interpreter."""
    arrays = arrays_of(interpreter)
    try:
        check_weights(arrays)
    except UnusableWeights as error:
        raise IncompatibleWeights(f"the interpreter {error}; export it with `--format onnx`") from error
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array, version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), entry.getvalue())
    return written.getvalue()
