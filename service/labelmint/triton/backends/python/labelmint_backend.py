"""The base of labelmint's Python-based backends: it turns Triton's requests into arrays, and arrays into responses.

Rules of this file:
- It lies in the folder of Triton's Python backend, because every Python-based backend has that folder on its path.
- A backend reads config.pbtxt as the native backend of the same name does, so the same repository also runs in NVIDIA's
  container. This file honours dynamic batching, requested outputs, cancellation, warm-up (by Triton's core) and
  `default_model_filename`.
- A request that fails never affects the response to another request.
"""

import json
from pathlib import Path

import triton_python_backend_utils as pb_utils


class Backend:
    """The base of a `TritonPythonModel` that runs a file of the repository with a library of this environment.

    A subclass defines `name`, `default_filename` (the file name of its models), `load` and `run`. One that runs on GPUs
    also sets `runs_on_gpus`, and honours `device`.
    """

    name: str
    default_filename: str
    runs_on_gpus = False
    device = "cpu"  # that the instance group asks for, as torch writes it

    def load(self, path, config, parameters):
        """Load the file. `config` is the model's configuration; `parameters` are its parameters as strings."""
        raise NotImplementedError

    def run(self, requests):
        """Run one round of requests. Return for each, in order, {name: array} with at least the requested outputs."""
        raise NotImplementedError

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        return auto_complete_model_config  # labelmint exports complete configs

    def initialize(self, args):
        config = json.loads(args["model_config"])
        if args["model_instance_kind"] == "GPU":
            self.device = f"cuda:{args['model_instance_device_id']}"
        if self.device != "cpu" and not self.runs_on_gpus:
            raise pb_utils.TritonModelException(
                "this backend runs on the CPU only; for GPUs use NVIDIA's Triton container, which has the native one"
            )
        self.batched = config["max_batch_size"] > 0
        filename = config.get("default_model_filename") or self.default_filename
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self.load(str(Path(pb_utils.get_model_dir()) / filename), config, parameters)

    def execute(self, requests):
        responses = [None] * len(requests)
        live = []
        for index, request in enumerate(requests):
            if request.is_cancelled():
                error = pb_utils.TritonError("request cancelled", pb_utils.TritonError.CANCELLED)
                responses[index] = pb_utils.InferenceResponse(error=error)
            else:
                live.append(index)
        if not live:
            return responses
        for index, response in zip(live, self._answers([requests[index] for index in live]), strict=True):
            responses[index] = response
        return responses

    def _answers(self, requests):
        try:
            return [_response(*pair) for pair in zip(requests, self.run(requests), strict=True)]
        except Exception as error:
            if len(requests) > 1:  # run each request alone to find the one that fails
                return [response for request in requests for response in self._answers([request])]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self.name}: {error}"))]


def array_of(request, name):
    """Return an input of a request as a NumPy array in Triton's shared memory; it is valid as long as the request."""
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def _response(request, outputs):
    tensors = [pb_utils.Tensor(name, outputs[name]) for name in request.requested_output_names()]
    return pb_utils.InferenceResponse(output_tensors=tensors)
