"""Triton's `labelmint` backend: runs a Style Interpreter in the kernel of `interpreter.c`.

Rules of this file:
- The weights are an .npz of `labelmint export --format native`, or slices of an ONNX file that the gateway recognised
  and described as JSON. Slices that changed since then are refused.
- The only parameter it honours is intra_op_thread_count. The default is one thread for each core that the process may
  use.
- Samples run one by one, each on all threads. A batch would not make them faster, and the first sample of a batch would
  have to wait for the later ones.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from labelmint_backend import Backend, array_of
from labelmint_kernel.interpreter import Interpreter, KernelUnavailable, UnusableWeights, read_slices


class TritonPythonModel(Backend):
    name = "labelmint"
    default_filename = "interpreter.npz"

    def load(self, path, config, parameters):
        try:
            self._interpreter = Interpreter(weights_of(Path(path)), int(parameters.get("intra_op_thread_count", "0")))
        except KernelUnavailable as error:
            raise pb_utils.TritonModelException(str(error)) from None
        except UnusableWeights as error:
            raise pb_utils.TritonModelException(f"{path} {error}; export the model again") from None
        wanted = {f"features_{r}": [c, r, r] for r, c in self._interpreter.channels.items()}
        given = {entry["name"]: list(map(int, entry["dims"])) for entry in config["input"]}
        if given != wanted:
            raise pb_utils.TritonModelException(f"{path} reads {wanted}, but its config.pbtxt declares {given}")
        self._inputs = list(wanted)

    def run(self, requests):
        return [self._run_one(request) for request in requests]

    def _run_one(self, request):
        features = [array_of(request, name) for name in self._inputs]
        if not self.batched:
            return self._interpreter.run(features)
        samples = [self._interpreter.run([array[row] for array in features]) for row in range(features[0].shape[0])]
        return {name: np.stack([sample[name] for sample in samples]) for name in self._interpreter.outputs}


def weights_of(path):
    """Return what `Interpreter` takes. Raises UnusableWeights."""
    if path.suffix != ".json":
        return path
    described = json.loads(path.read_text(encoding="utf-8"))
    arrays, digest = read_slices(path.with_name(described["file"]), described)
    if digest != described["sha256"]:
        raise UnusableWeights("describes other weights than its model has now")
    return arrays
