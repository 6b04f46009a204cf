"""Writes one Triton step as a TorchScript file and compares it with torch before it is kept.

Rules of this file:
- The step is traced as a function with the weights as its constants. Constants move to the device on which a server
  loads the file, but a device that the trace recorded does not. So operators that only make constants (`arange` and
  the like) are folded, and no device may be left in the graph.
- NVIDIA's libtorch backend finds inputs by the names of forward's arguments, which are the names of the contract.
  Outputs have no names in TorchScript: the backend takes those that are not called NAME__INDEX in the order of
  config.pbtxt, which is the order of the step. So the tensor contract holds, and the ensembles need no translation.
- A seed must always give the same bytes. But libtorch's convolutions sum in a different order at batch 1 than at
  batch 2 (measured on the CPU: the features differ in their last bits), and its fusing executor may change kernels once
  a model is warm. `configure` therefore leaves out Triton's batcher, which puts the seeds of several requests into one
  batch, and asks for the graph as it was traced. (A batcher that prefers batches of one is not an alternative, because
  it sleeps between them: measured with Triton 2.51, a queued request waits up to half a second for an idle model.)
- The same weights give the same bytes: source positions, which name the exporting machine, are left out of the archive.
- Every warning of the tracer is an error, except those whose cause is known to be harmless.
"""

from __future__ import annotations

import inspect
import io
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from labelmint.export.comparison import Array, ExportedStep, compare
from labelmint.export.modules import Step, example_inputs

if TYPE_CHECKING:  # a machine that only measures the steps has no client of Triton
    from tritonclient.grpc import model_config_pb2 as pb

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest timestamp that a zip entry can have


def export_torchscript(step: Step) -> ExportedStep:
    """Trace, fold, clean, check and compare the step. Raises RuntimeError if the file would differ from torch."""
    data = trace(step)
    loaded = torch.jit.load(io.BytesIO(data))

    def run(tensors: Sequence[Tensor]) -> Sequence[Array]:
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            return [output.numpy() for output in loaded(*tensors)]

    return ExportedStep(data, compare(step, run))


def trace(step: Step) -> bytes:
    """Return the step's file, not yet compared with torch. Raises RuntimeError if it does not match the contract."""
    step.eval()
    frozen = deepcopy(step).requires_grad_(False)  # the tracer accepts only such tensors as constants

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return frozen(*tensors)

    # The tracer names forward's arguments by this signature, even if the step takes any number of tensors.
    forward.__signature__ = inspect.Signature(
        [inspect.Parameter(spec.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for spec in step.inputs]
    )
    with _known_warnings(), torch.no_grad():
        traced = torch.jit.trace(
            forward, example_inputs(step, batch=2), check_inputs=[example_inputs(step, batch=1, seed=1)]
        )
        torch._C._jit_pass_constant_propagation(traced.graph)
        written = io.BytesIO()
        torch.jit.save(traced, written)
        data = _clean(written.getvalue())
        loaded = torch.jit.load(io.BytesIO(data))
    _assert_contract(loaded, step)
    return data


def configure(config: pb.ModelConfig) -> None:
    """Set a step's config.pbtxt so that a seed always gives the same bytes, with the native backend or labelmint's."""
    config.backend = "pytorch"
    config.ClearField("dynamic_batching")
    config.parameters["DISABLE_OPTIMIZED_EXECUTION"].string_value = "true"


@contextmanager
def _known_warnings() -> Iterator[None]:
    tracer = torch.jit.TracerWarning
    with warnings.catch_warnings():
        warnings.simplefilter("error", tracer)
        # The taps of a FIR filter are the same in every call, so they may be constants.
        warnings.filterwarnings("ignore", "torch.tensor results are registered as constants", tracer)
        # `to_uint8` tests whether the image is gray, which depends on the weights only.
        warnings.filterwarnings(
            "ignore", "Converting a tensor to a Python boolean", tracer, "labelmint.models.generator"
        )
        # TorchScript is the format that Triton's libtorch backend reads; its successor is a different format.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


def _clean(archive: bytes) -> bytes:
    """Return the archive without source positions and the hash over them, and with fixed timestamps."""
    cleaned = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(cleaned, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            if not name.endswith((".debug_pkl", "/.data/serialization_id")):
                new.writestr(zipfile.ZipInfo(name, _EPOCH), old.read(name))
    return cleaned.getvalue()


def _assert_contract(loaded: torch.jit.ScriptModule, step: Step) -> None:
    names = [argument.name for argument in loaded.forward.schema.arguments[1:]]
    if names != [spec.name for spec in step.inputs]:
        raise RuntimeError(f"the arguments of the traced function, {names}, do not match the contract")
    devices = [node for node in loaded.graph.findAllNodes("prim::Constant") if "Device" in str(node.output().type())]
    if devices:
        raise RuntimeError(f"the trace fixed a device: {devices[0]}")
