"""Writes the ONNX graph of the whole Style Interpreter: torch's exporter traces one strip, and its nodes are repeated.

Rules of this file:
- Strips differ only in the parts that `StyleInterpreter.run` prepares for them. That torch code runs once with a
  `_Value` in place of each tensor, which adds a node wherever torch would compute. So there is no second description of
  the interpreter, and a new task needs no change here.
- A strip's results leave it as one tensor. ONNX Runtime orders the nodes depth first from the outputs: with two, it
  would run all strips for the first output, and keep the heads' outputs of the whole image for the second.
- The weights have the names of `StyleInterpreter.weights`, and the file says what it is, so that
  `labelmint.triton.kernel_steps` finds them. A constant that several strips need is stored once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from labelmint.export.modules import StyleInterpreterStep, TensorSpec
from labelmint.export.onnx_trace import OPSET, trace
from labelmint.models.interpreter import StyleInterpreter, Weights

_DTYPES = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}


def interpreter_graph(step: StyleInterpreterStep) -> onnx.ModelProto:
    """Return the graph of the step, with its metadata."""
    interpreter, outputs = step.interpreter, [spec.name for spec in step.outputs]
    weights = {name: weight.detach().contiguous() for name, weight in interpreter.weights().items()}
    parts, results = _examples(interpreter, step.inputs, weights)
    strip = trace(_Strip(interpreter, list(parts)), parts | weights, ["strip"], without_batch=list(weights))
    rows = interpreter.spec.resolution
    joined = _zeros(2, rows, sum(math.prod(x.shape[2:-1]) for x in results), rows)
    finish = trace(_Finish(interpreter, results), {"joined": joined}, outputs)

    graph = _Graph(weights)
    given = interpreter.run(
        {r: graph.value(spec.name) for r, spec in zip(interpreter.spec.channels, step.inputs, strict=True)},
        {name: graph.value(name) for name in weights},
        lambda parts, weights: graph.inline(strip, (*parts.values(), *weights.values())),
        lambda *joined: graph.inline(finish, joined),
    )
    model = graph.model(step.inputs, dict(zip(step.outputs, given, strict=True)))
    spec = interpreter.spec
    described = {"step": "style_interpreter", "task": spec.task, "score_kind": interpreter.score_kind}
    described |= {"heads": str(spec.num_heads), "classes": str(spec.num_classes)}
    helper.set_model_props(model, {f"labelmint.{key}": value for key, value in described.items()})
    return model


class _Strip(nn.Module):
    """`StyleInterpreter.strip` of the parts, followed by the weights, with all results [B,S,...,R] in one [B,S,X,R]."""

    def __init__(self, interpreter: StyleInterpreter, parts: Sequence[str]) -> None:
        super().__init__()
        self._interpreter, self._names = interpreter, (*parts, *interpreter.weights())

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self._names, tensors, strict=True))
        results = self._interpreter.strip(named, named)
        # float32 holds every uint8 exactly.
        return torch.cat([x.to(torch.float32).unsqueeze(2).flatten(2, -2) for x in results], dim=2)


class _Finish(nn.Module):
    """`StyleInterpreter.finish` of the joined results of all strips; `results` are examples of a strip's."""

    def __init__(self, interpreter: StyleInterpreter, results: Sequence[Tensor]) -> None:
        super().__init__()
        self._interpreter, self._results = interpreter, [(x.dtype, x.shape[2:-1]) for x in results]

    def forward(self, joined: Tensor) -> tuple[Tensor, ...]:
        each, start = [], 0
        for dtype, shape in self._results:
            end = start + math.prod(shape)
            part = joined[:, :, start:end]
            each.append((part.unflatten(2, shape) if shape else part.squeeze(2)).to(dtype))
            start = end
        return self._interpreter.finish(*each)


def _examples(
    interpreter: StyleInterpreter, inputs: Sequence[TensorSpec], weights: Weights
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Return zeros in the shapes of a strip's parts, by name, and its results without values, for a batch of two."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # computes shapes only
        levels = zip(interpreter.spec.channels, inputs, strict=True)
        parts = next(interpreter.parts_of_strips({r: torch.empty(2, *spec.shape) for r, spec in levels}, weights))
        results = interpreter.strip(parts, weights)
    return {name: _zeros(*x.shape) for name, x in parts.items()}, results


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)


class _Value:
    """Stands for a tensor in torch code: every operation on it adds a node to the graph."""

    def __init__(self, graph: _Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def __getitem__(self, key: tuple[slice, ...]) -> Tensor:
        cut = {axis: part for axis, part in enumerate(key) if part != slice(None)}
        if any(part.start is None or part.stop is None or part.step is not None for part in cut.values()):
            raise NotImplementedError(f"the slice {key} of a tensor in the graph")
        starts, ends = [part.start for part in cut.values()], [part.stop for part in cut.values()]
        return self.graph.add("Slice", self, *(torch.tensor(each) for each in (starts, ends, list(cut))))

    def __matmul__(self, other: Tensor) -> Tensor:
        return _matmul(cast(Tensor, self), other)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function not in _OPERATIONS:
            raise NotImplementedError(f"the operation {function} on a tensor in the graph")
        return _OPERATIONS[function](*args, **(kwargs or {}))


def _graph_of(*tensors: object) -> _Graph:
    return next(x.graph for x in tensors if isinstance(x, _Value))


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    return _graph_of(left, right).add("MatMul", left, right)


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return _graph_of(*tensors).add("Concat", *tensors, axis=dim)


def _conv2d(maps: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    given = (maps, weight) if bias is None else (maps, weight, bias)
    return _graph_of(*given).add("Conv", *given, strides=[stride, stride])


def _pad(maps: Tensor, pad: Sequence[int], mode: str, value: float | None = None) -> Tensor:
    left, right, top, bottom = pad
    if mode != "replicate" or value is not None:
        raise NotImplementedError(f"the padding {mode!r} of a tensor in the graph")
    amounts = torch.tensor([0, 0, top, left, 0, 0, bottom, right])
    return _graph_of(maps).add("Pad", maps, amounts, mode="edge")


_OPERATIONS: Mapping[Any, Any] = {
    torch.cat: _cat,
    torch.conv2d: _conv2d,
    F.pad: _pad,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.matmul: _matmul,
}


class _Graph:
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers = {name: numpy_helper.from_array(weight.numpy(), name) for name, weight in weights.items()}
        self._constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    def value(self, name: str) -> Tensor:
        return cast(Tensor, _Value(self, name))

    def add(self, operator: str, *inputs: Tensor | _Value, **attributes: Any) -> Tensor:
        names = [
            x.name if isinstance(x, _Value) else self._constant(numpy_helper.from_array(x.numpy())) for x in inputs
        ]
        node = helper.make_node(operator, names, [self._new_name(operator)], **attributes)
        self._nodes.append(node)
        return self.value(node.output[0])

    def inline(self, traced: onnx.ModelProto, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copy the nodes of a traced graph, with these inputs, and return its outputs."""
        graph = traced.graph
        names = {entry.name: cast(_Value, x).name for entry, x in zip(graph.input, inputs, strict=True)} | {"": ""}
        names |= {tensor.name: self._constant(tensor) for tensor in graph.initializer}
        for node in graph.node:
            if node.domain not in ("", "ai.onnx") or any(attribute.HasField("g") for attribute in node.attribute):
                raise RuntimeError(f"the traced strip has a node {node.op_type!r} that cannot be repeated")
            if node.op_type == "Identity":
                names[node.output[0]] = names[node.input[0]]
                continue
            copied = onnx.NodeProto(op_type=node.op_type, attribute=node.attribute)
            copied.input.extend(names[name] for name in node.input)
            for index, name in enumerate(node.output):
                names[name] = self._new_name(node.op_type, index) if name else ""
                copied.output.append(names[name])
            self._nodes.append(copied)
        return tuple(self.value(names[entry.name]) for entry in graph.output)

    def model(self, inputs: Sequence[TensorSpec], outputs: Mapping[TensorSpec, Tensor]) -> onnx.ModelProto:
        """Return the model; the outputs get the names of their specs."""
        renamed = {cast(_Value, x).name: spec.name for spec, x in outputs.items()}
        if len(renamed) < len(outputs) or renamed.keys() & {spec.name for spec in inputs}:
            raise RuntimeError("two tensors of the contract are one tensor of the graph")
        for node in self._nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        graph = helper.make_graph(
            self._nodes, "labelmint", _entries(inputs), _entries(outputs), list(self._initializers.values())
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])

    def _new_name(self, operator: str, output: int = 0) -> str:
        name = f"{operator.lower()}_{len(self._nodes)}"
        return f"{name}_{output}" if output else name

    def _constant(self, tensor: TensorProto) -> str:
        array = numpy_helper.to_array(tensor)
        key = (tensor.data_type, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]


def _entries(specs: Iterable[TensorSpec]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(x.name, _DTYPES[x.dtype], ["batch", *x.shape]) for x in specs]
