"""Triton's `pytorch` backend for the pip-installed server: runs a TorchScript file with the torch wheel.

Rules of this file:
- It honours these parameters of the native backend: INTRA_OP_THREAD_COUNT, INTER_OP_THREAD_COUNT, INFERENCE_MODE and
  DISABLE_OPTIMIZED_EXECUTION. It also follows the native naming rules for tensors. `labelmint_backend` handles what all
  backends honour.
- Samples run one by one, even those of one request. libtorch's convolutions sum in a different order at batch 1 than at
  batch 2, but a seed must give the same bytes in every batch. On a CPU this costs nothing: measured on the demo, a
  batch takes longer than its samples one by one, because the larger tensors do not fit the cache.
- KIND_GPU puts the module on that GPU. Inputs and outputs still cross the host's memory between the steps, so
  NVIDIA's container, whose native backend keeps them on the GPU, is faster.
- torch is not part of the serving environment. Without it, the start fails with a message that says what to install.
"""

import os

import numpy as np
import triton_python_backend_utils as pb_utils
from labelmint_backend import Backend, array_of

# The steps of an ensemble share the cores. Threads that spin at OpenMP's barriers take the cores from other steps: a
# sample takes five times as long as soon as two steps run at once. OpenMP reads this variable when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "this model was exported as TorchScript and torch is not installed; run `pip install '.[torchscript]'` in a "
        "clone of labelmint, or export it with `--format onnx`"
    ) from None


class TritonPythonModel(Backend):
    name = "pytorch"
    default_filename = "model.pt"
    runs_on_gpus = True

    def load(self, path, config, parameters):
        # Like the native backend, use the default (all cores) for a count that is not positive.
        if (threads := int(parameters.get("INTRA_OP_THREAD_COUNT", "0"))) > 0:
            torch.set_num_threads(threads)
        if (threads := int(parameters.get("INTER_OP_THREAD_COUNT", "0"))) > 0:
            torch.set_num_interop_threads(threads)
        self._no_gradients = torch.inference_mode if _is_true(parameters, "INFERENCE_MODE", True) else torch.no_grad
        self._optimized = not _is_true(parameters, "DISABLE_OPTIMIZED_EXECUTION", False)
        self._module = torch.jit.load(path, map_location=self._usable_device())
        self._module.eval()
        arguments = [argument.name for argument in self._module.forward.schema.arguments[1:]]  # without self
        inputs = [entry["name"] for entry in config["input"]]
        if len(inputs) != len(arguments):
            raise pb_utils.TritonModelException(
                f"{path} takes {len(arguments)} inputs {arguments}, its config.pbtxt names {len(inputs)}: {inputs}"
            )
        self._inputs = _positions(inputs, arguments)
        self._outputs = _positions([entry["name"] for entry in config["output"]])

    def _usable_device(self):
        if self.device != "cpu" and not torch.cuda.is_available():
            raise pb_utils.TritonModelException(
                f"the instance group asks for {self.device}, but torch {torch.__version__} finds no GPU; install a "
                "torch for CUDA, or remove KIND_GPU from config.pbtxt"
            )
        return self.device

    def run(self, requests):
        return [self._run_one(request) for request in requests]

    def _run_one(self, request):
        names = sorted(self._inputs, key=self._inputs.__getitem__)
        tensors = [torch.from_numpy(array_of(request, name)).to(self.device) for name in names]
        wanted = {name: self._outputs[name] for name in request.requested_output_names()}
        with self._no_gradients(), torch.jit.optimized_execution(self._optimized):
            if not self.batched:
                results = [self._forward(tensors)]
            else:
                results = [self._forward([x[row : row + 1] for x in tensors]) for row in range(tensors[0].shape[0])]
        return {
            name: np.concatenate([outputs[index].cpu().numpy() for outputs in results])
            if len(results) > 1
            else results[0][index].contiguous().cpu().numpy()
            for name, index in wanted.items()
        }

    def _forward(self, tensors):
        outputs = self._module(*tensors)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def _positions(names, arguments=()):
    """Map each tensor of config.pbtxt to its position in forward's arguments or results, by the native backend's rules.

    If all names are arguments of forward, the names decide. If all names have the form NAME__INDEX, the index decides.
    Otherwise the given order decides.
    """
    if set(names) <= set(arguments):
        return {name: arguments.index(name) for name in names}
    indices = [name.partition("__")[2] for name in names]
    if all(index.isdigit() for index in indices):
        return {name: int(index) for name, index in zip(names, indices, strict=True)}
    return {name: index for index, name in enumerate(names)}


def _is_true(parameters, name, default):
    """Return a boolean parameter, which Triton writes as a string."""
    return parameters.get(name, str(default)).lower() in ("true", "1")
