"""Writes one Triton step as an ONNX file and compares it with torch before it is kept.

Rules of this file:
- The file uses standard operators only, opset 18 and IR version 8, so that the ONNX Runtime of older containers loads
  it.
- The batch dimension must be symbolic in the file. The exporter can fix it silently, so this file checks it.
- The same weights give the same bytes: names, traces and tool versions are removed.
- The file of a Style Interpreter says what it is, and its weights have the names of `labelmint.kernel.interpreter`, so
  that `labelmint.triton.kernel_steps` finds them.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Sequence

import onnx
import onnxruntime
import torch
from torch import Tensor

from labelmint.export.comparison import Array, ExportedStep, compare
from labelmint.export.modules import Step, StyleInterpreterStep, example_inputs
from labelmint.models.interpreter import StyleInterpreter

# torch logs every operator of optional packages that are not installed; this does not help a user who exports.
logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)

OPSET = 18
IR_VERSION = 8


def export_onnx(step: Step) -> ExportedStep:
    """Trace, clean, check and compare the step. Raises RuntimeError if the file would differ from the torch module."""
    step.eval()
    arguments = example_inputs(step, batch=2)
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = tuple({0: batch} for _ in arguments)
    takes_any_number = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(step.forward).parameters.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in step.inputs],
            output_names=[spec.name for spec in step.outputs],
            dynamic_shapes=(dynamic,) if takes_any_number else dynamic,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = _clean(program.model_proto)
    _assert_contract(model, step)
    if isinstance(step, StyleInterpreterStep):
        _describe(model, step.interpreter)
    data = model.SerializeToString(deterministic=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> Sequence[Array]:
        return session.run(None, {spec.name: x.numpy() for spec, x in zip(step.inputs, tensors, strict=True)})

    return ExportedStep(data, compare(step, run))


def _clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove everything that names the machine or the tool, and the intermediate shapes, which nothing reads."""
    model.ir_version = IR_VERSION
    model.producer_name = "labelmint"
    model.producer_version = ""
    model.doc_string = ""
    del model.metadata_props[:]
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
    return model


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


def _describe(model: onnx.ModelProto, interpreter: StyleInterpreter) -> None:
    """Name the weights of a Style Interpreter, keep each once, and write what the file is into its metadata.

    Raises RuntimeError if the exporter has changed the weights.
    """
    graph, weights = model.graph, _weights(interpreter)
    names = {weight.numpy().tobytes(): name for name, weight in weights.items()}
    renamed = {x.name: names[x.raw_data] for x in graph.initializer if x.raw_data in names}
    kept = {renamed[x.name]: x for x in graph.initializer if x.name in renamed}
    for name, weight in weights.items():
        if name not in kept:  # it equals other weights, which the file then has twice
            twin = names[weight.numpy().tobytes()]
            if twin not in kept:
                raise RuntimeError(f"the exporter changed the weights {twin}")
            kept[name] = onnx.numpy_helper.from_array(weight.numpy(), name)
    others = [x for x in graph.initializer if x.name not in renamed]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        # A node that gives weights another shape takes them in any shape.
        if node.op_type == "Reshape" and (name := node.input[0]) in kept:
            kept[name].dims[:] = weights[name].shape
    for name, tensor in kept.items():
        tensor.name = name
    ordered = [copy.deepcopy(x) for x in (*(kept[name] for name in weights), *others)]
    del graph.initializer[:]
    graph.initializer.extend(ordered)
    spec = interpreter.spec
    described = {"step": "style_interpreter", "task": spec.task, "score_kind": interpreter.score_kind}
    described |= {"heads": str(spec.num_heads), "classes": str(spec.num_classes)}
    for key, value in described.items():
        model.metadata_props.add(key=f"labelmint.{key}", value=value)


def _weights(interpreter: StyleInterpreter) -> dict[str, Tensor]:
    """Return the weights by their names in the file: of all heads together, [out,in] and [out]."""
    weight3, bias3 = interpreter.padded_outputs()
    found = {f"projection_{r}": interpreter.projection[str(r)] for r in interpreter.spec.channels}
    found |= {"bias1": interpreter.bias1, "weight2": interpreter.weight2.flatten(0, 1)}
    found |= {"bias2": interpreter.bias2.flatten(), "weight3": weight3.flatten(0, 1), "bias3": bias3.flatten()}
    return {name: weight.detach() for name, weight in found.items()}
