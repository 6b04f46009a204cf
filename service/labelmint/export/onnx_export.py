"""Writes one Triton step as an ONNX file and compares it with torch before it is kept.

Rules of this file:
- The file uses standard operators only, opset 18 and IR version 8, so that the ONNX Runtime of older containers loads
  it.
- The batch dimension must be symbolic in the file. The exporter can fix it silently, so this file checks it.
- The same weights give the same bytes: names, traces and tool versions are removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnxruntime
from torch import Tensor

from labelmint.export.comparison import Array, ExportedStep, compare
from labelmint.export.modules import Step, StyleInterpreterStep, example_inputs
from labelmint.export.onnx_interpreter import interpreter_graph
from labelmint.export.onnx_trace import trace

IR_VERSION = 8


def export_onnx(step: Step) -> ExportedStep:
    """Trace, clean, check and compare the step. Raises RuntimeError if the file would differ from the torch module."""
    step.eval()
    if isinstance(step, StyleInterpreterStep):
        model = interpreter_graph(step)
    else:
        examples = zip((spec.name for spec in step.inputs), example_inputs(step, batch=2), strict=True)
        model = trace(step, dict(examples), [spec.name for spec in step.outputs])
        del model.metadata_props[:]  # the tool's own
    _clean(model)
    _assert_contract(model, step)
    data = model.SerializeToString(deterministic=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> Sequence[Array]:
        return session.run(None, {spec.name: x.numpy() for spec, x in zip(step.inputs, tensors, strict=True)})

    return ExportedStep(data, compare(step, run))


def _clean(model: onnx.ModelProto) -> None:
    """Remove everything that names the machine or the tool, and the intermediate shapes, which nothing reads."""
    model.ir_version = IR_VERSION
    model.producer_name = "labelmint"
    model.producer_version = ""
    model.doc_string = ""
    del model.functions[:]
    graph = model.graph
    graph.name = "labelmint"
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)


def _assert_contract(model: onnx.ModelProto, step: Step) -> None:
    domains = {entry.domain for entry in model.opset_import}
    if domains - {"", "ai.onnx"}:
        raise RuntimeError(f"non-standard operator domains in the export: {sorted(domains)}")
    for side, specs in ((model.graph.input, step.inputs), (model.graph.output, step.outputs)):
        if [value.name for value in side] != [spec.name for spec in specs]:
            raise RuntimeError(f"exported tensors {[value.name for value in side]} do not match the contract")
        for value, spec in zip(side, specs, strict=True):
            dims = value.type.tensor_type.shape.dim
            if not dims[0].dim_param:
                raise RuntimeError(f"{spec.name}: the exporter fixed the batch dimension at {dims[0].dim_value}")
            if tuple(dim.dim_value for dim in dims[1:]) != spec.shape:
                raise RuntimeError(f"{spec.name}: exported shape {dims} is not {spec.shape}")
