"""Triton's `onnxruntime` backend for the pip-installed server: runs an ONNX file with the onnxruntime wheel.

Rules of this file:
- It honours these parameters of the native backend: intra_op_thread_count, inter_op_thread_count, execution_mode,
  enable_mem_arena and enable_mem_pattern. `labelmint_backend` handles what all backends honour.
- The requests of one round run as one batch. This is safe because the exported graphs make a sample's result
  independent of the other samples in its batch.
"""

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from labelmint_backend import Backend, array_of

_EXECUTION_MODES = {
    "0": onnxruntime.ExecutionMode.ORT_SEQUENTIAL,
    "1": onnxruntime.ExecutionMode.ORT_PARALLEL,
}


class TritonPythonModel(Backend):
    name = "onnxruntime"
    default_filename = "model.onnx"

    def load(self, path, config, parameters):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", "0"))
        options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", "0"))
        options.execution_mode = _EXECUTION_MODES[parameters.get("execution_mode", "0")]
        options.enable_cpu_mem_arena = parameters.get("enable_mem_arena", "1") == "1"
        options.enable_mem_pattern = parameters.get("enable_mem_pattern", "1") == "1"
        # The steps of an ensemble share the cores; a spinning thread pool would take them from the next step.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        missing = {entry["name"] for entry in config["input"]} ^ set(self._inputs)
        if missing:
            raise pb_utils.TritonModelException(f"{path} and its config.pbtxt disagree on the inputs {sorted(missing)}")

    def run(self, requests):
        feeds = {}
        for name in self._inputs:
            parts = [array_of(request, name) for request in requests]
            feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        wanted = sorted({name for request in requests for name in request.requested_output_names()})
        outputs = dict(zip(wanted, self._session.run(wanted, feeds), strict=False))
        if not self.batched:
            return [outputs]
        answers, first = [], 0
        for request in requests:
            last = first + array_of(request, self._inputs[0]).shape[0]
            answers.append({name: array[first:last] for name, array in outputs.items()})
            first = last
        return answers
