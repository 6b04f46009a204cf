"""A Style Interpreter as a model of Triton's Python backend: it runs `interpreter.py` beside it, on the GPU.

Rules of this file:
- `labelmint export --format gpu` copies it, `interpreter.py` and `interpreter.npz` into the model's version directory.
  It imports nothing from this package, because the container that serves the model does not have it.
- Tensors enter and leave by DLPack, so features never leave the GPU.
- Samples run one by one, so a sample's bytes do not depend on its batch.
- A request that fails never affects the response to another request. What cannot work is refused when the model is
  loaded, in one line.
- A CPU runs it only for a rehearsal: with TRITON_INTERPRET=1 in the environment of tritonserver.
"""

import json
import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

try:
    import torch
    import triton  # noqa: F401 (a missing one is reported here, not at the first kernel)
except ModuleNotFoundError as error:
    if error.name not in ("torch", "triton"):
        raise
    raise ModuleNotFoundError(
        f"a model exported with `--format gpu` needs the Python packages torch and triton in Triton's container, and "
        f"{error.name} is missing: build the image of k8s/components/gpu-kernel, or export with `--format onnx`"
    ) from None

from interpreter import GpuInterpreter

FROM_HOST = (
    "features come from host memory, so they crossed PCIe: start tritonserver with "
    "--cuda-memory-pool-byte-size=0:N, N from triton.env beside the models"
)


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._device = _device(args["model_instance_kind"], args["model_instance_device_id"])
        path = Path(pb_utils.get_model_dir()) / "interpreter.npz"
        precision = config["parameters"]["precision"]["string_value"]
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            self._interpreter = GpuInterpreter(arrays, precision=precision, device=self._device)
        except Exception as error:
            said = f"{path} cannot be run ({error}); export the model again"
            raise pb_utils.TritonModelException(said) from None
        wanted = {f"features_{r}": [c, r, r] for r, c in self._interpreter.channels.items()}
        given = {entry["name"]: list(map(int, entry["dims"])) for entry in config["input"]}
        if given != wanted:
            raise pb_utils.TritonModelException(f"{path} reads {wanted}, but its config.pbtxt declares {given}")
        self._inputs = list(wanted)
        self._batched = config["max_batch_size"] > 0
        self._told = False
        # Compiles the kernel. Triton's own warm-up would make the features in host memory.
        self._interpreter.run([torch.zeros(given[name], device=self._device) for name in self._inputs])
        self._wait()

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        if request.is_cancelled():
            error = pb_utils.TritonError("request cancelled", pb_utils.TritonError.CANCELLED)
            return pb_utils.InferenceResponse(error=error)
        try:
            outputs = self._run(self._features(request))
            tensors = [pb_utils.Tensor.from_dlpack(name, outputs[name]) for name in request.requested_output_names()]
            self._wait()
            return pb_utils.InferenceResponse(output_tensors=tensors)
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"gpu: {error}"))

    def _wait(self):
        """Wait for the kernels, which run after the calls that start them.

        Triton copies the outputs on a stream of its own, which does not wait for this one. Waiting also shows an error
        of a request's kernels in that request.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _features(self, request):
        """Return the request's inputs on the device. They are valid as long as the request."""
        inputs = [pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs]
        tensors = [torch.from_dlpack(tensor.to_dlpack()) for tensor in inputs]
        if all(tensor.device == self._device for tensor in tensors):
            return tensors
        if not self._told:
            self._told = True
            pb_utils.Logger.log_warn(FROM_HOST)
        return [tensor.to(self._device) for tensor in tensors]

    def _run(self, features):
        if not self._batched:
            return self._interpreter.run(features)
        samples = [self._interpreter.run([tensor[row] for tensor in features]) for row in range(features[0].shape[0])]
        if len(samples) == 1:
            return {name: tensor[None] for name, tensor in samples[0].items()}
        return {name: torch.stack([sample[name] for sample in samples]) for name in self._interpreter.outputs}


def _device(kind, number):
    if kind == "GPU":
        if not torch.cuda.is_available():
            raise pb_utils.TritonModelException(
                f"the model needs a GPU, and torch {torch.__version__} finds none: check its build and the driver"
            )
        return torch.device("cuda", int(number))
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    raise pb_utils.TritonModelException(
        "the model runs on GPUs only, and its instance_group asks for a CPU; for CPUs export with `--format onnx`"
    )
