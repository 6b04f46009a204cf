"""Triton's `onnxruntime` backend for the pip-installed server: runs an ONNX file with the onnxruntime wheel.

Rules of this file:
- A model's config.pbtxt means here what it means to the native backend of that name, so that the same repository
  runs in NVIDIA's container. Honoured: dynamic batching, requested outputs, cancellation, warm-up (by the core),
  `default_model_filename`, and the parameters intra_op_thread_count, inter_op_thread_count and execution_mode.
- A failure of one request never touches another one's answer.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

_EXECUTION_MODES = {
    "0": onnxruntime.ExecutionMode.ORT_SEQUENTIAL,
    "1": onnxruntime.ExecutionMode.ORT_PARALLEL,
}


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        return auto_complete_model_config  # our configs are complete

    def initialize(self, args):
        config = json.loads(args["model_config"])
        if args["model_instance_kind"] == "GPU":
            raise pb_utils.TritonModelException(
                "this backend runs on the CPU; for GPUs use NVIDIA's Triton container, which has the native one"
            )
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", "0"))
        options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", "0"))
        options.execution_mode = _EXECUTION_MODES[parameters.get("execution_mode", "0")]
        # The steps of an ensemble share the cores; a spinning pool would take them from the next step.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        filename = config.get("default_model_filename") or "model.onnx"
        path = str(Path(pb_utils.get_model_dir()) / filename)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        missing = {entry["name"] for entry in config["input"]} ^ set(self._inputs)
        if missing:
            raise pb_utils.TritonModelException(f"{path} and its config.pbtxt disagree on the inputs {sorted(missing)}")
        self._batched = config["max_batch_size"] > 0

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
            return self._run(requests)
        except Exception as error:
            if len(requests) > 1:  # find the culprit: each for itself
                return [response for request in requests for response in self._answers([request])]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {error}"))]

    def _run(self, requests):
        feeds = {}
        for name in self._inputs:
            parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        wanted = sorted({name for request in requests for name in request.requested_output_names()})
        outputs = dict(zip(wanted, self._session.run(wanted, feeds), strict=False))
        if not self._batched:
            (request,) = requests
            return [self._response(request, outputs, slice(None))]
        responses, first = [], 0
        for request in requests:
            size = pb_utils.get_input_tensor_by_name(request, self._inputs[0]).as_numpy().shape[0]
            responses.append(self._response(request, outputs, slice(first, first + size)))
            first += size
        return responses

    @staticmethod
    def _response(request, outputs, rows):
        tensors = [pb_utils.Tensor(name, outputs[name][rows]) for name in request.requested_output_names()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
