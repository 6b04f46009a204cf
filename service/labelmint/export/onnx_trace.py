"""Traces a torch module into an ONNX graph with torch's own exporter.

Rules of this file:
- The batch dimension of the inputs that have one is symbolic. `onnx_export.py` checks that it stayed so.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import Tensor, nn

# torch logs every operator of optional packages that are not installed; this does not help a user who exports.
logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)

OPSET = 18


def trace(
    module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], *, without_batch: Sequence[str] = ()
) -> onnx.ModelProto:
    """Return the graph of the module: `inputs` are examples in the order of its arguments, with a batch of at least 2.

    Inputs in `without_batch` have a fixed shape.
    """
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = tuple({} if name in without_batch else {0: batch} for name in inputs)
    takes_any_number = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(dynamic,) if takes_any_number else dynamic,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto
