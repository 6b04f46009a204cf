"""The interpreter's ONNX graph, made by repeating one strip, gives the bytes of the graph that torch unrolls."""

import hashlib
import json
import os
import subprocess
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from labelmint.core.calibration import SCORE_KINDS
from labelmint.core.task import TaskName
from labelmint.export import onnx_export, onnx_interpreter
from labelmint.export.modules import StyleInterpreterStep, example_inputs
from labelmint.export.onnx_export import export_onnx
from labelmint.export.onnx_trace import trace
from labelmint.export.repository import MAX_STRIPS
from labelmint.models.interpreter import StyleInterpreter, Weights, interleave
from labelmint.models.tasks import build_interpreter
from labelmint.triton import onnx_file
from labelmint.untrusted.content import RegularFile
from tests.support.interpreters import CHANNELS, SPEC

pytestmark = pytest.mark.torch

LEVELS = {
    "all levels": tuple(CHANNELS),
    "nothing above half the resolution": (4, 8, 16),
    "lower levels only": (4, 8),
    "no lower levels": (16, 32),
    "the resolution only": (32,),
    "one lower level": (8, 32),
}
# Every two of: levels, task, and a score with one map of a strip's pixels or with two. All three take twice as long.
PAIRWISE = [
    (levels, task, ("sum", "mixture_entropy")[(row + column) % 2])
    for row, levels in enumerate(LEVELS)
    for column, task in enumerate(("segmentation", "keypoints"))
]


def step_of(
    levels: Sequence[int] = tuple(CHANNELS), task: TaskName = "segmentation", score_kind: str = "sum", rows: int = 8
) -> StyleInterpreterStep:
    spec = replace(SPEC, channels={r: CHANNELS[r] for r in levels}, task=task)
    return StyleInterpreterStep(with_weights(build_interpreter(spec, score_kind, rows))).eval()


def with_weights(built: StyleInterpreter) -> StyleInterpreter:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.shape[-1] ** 0.5)
    return built


def unrolled(step: StyleInterpreterStep) -> bytes:
    """The step as torch's exporter alone writes it."""
    names = [spec.name for spec in step.inputs]
    model = trace(step, dict(zip(names, example_inputs(step, 2), strict=True)), [spec.name for spec in step.outputs])
    return model.SerializeToString()


def repeated(step: StyleInterpreterStep) -> bytes:
    """The step as the export writes it, not compared with torch: in random heat, rounding can move a keypoint."""
    model = onnx_interpreter.interpreter_graph(step)
    onnx_export._clean(model)
    return model.SerializeToString()


def results(data: bytes, feeds: Mapping[str, np.ndarray]) -> list[bytes]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [output.tobytes() for output in session.run(None, feeds)]


@pytest.mark.parametrize(("levels", "task", "score_kind"), PAIRWISE)
def test_repeating_a_strip_gives_the_bytes_of_the_unrolled_graph(levels: str, task: TaskName, score_kind: str) -> None:
    step = step_of(LEVELS[levels], task, score_kind)
    exported, whole = repeated(step), unrolled(step)
    for batch in (1, 3):
        inputs = zip(step.inputs, example_inputs(step, batch, seed=batch), strict=True)
        feeds = {spec.name: x.numpy() for spec, x in inputs}
        assert results(exported, feeds) == results(whole, feeds)


@pytest.mark.parametrize("rows", [2, 4, 16, 32, 64])
@pytest.mark.parametrize("score_kind", SCORE_KINDS)
def test_any_height_of_the_strips_is_exported(rows: int, score_kind: str) -> None:
    export_onnx(step_of(score_kind=score_kind, rows=rows))  # compares with torch


def test_the_graph_has_a_number_of_nodes_for_each_strip() -> None:
    """Otherwise the strips were not traced once, and an export of a large image takes a quarter of an hour."""
    traced = Counter[str]()

    def counted(*arguments: Any, **options: Any) -> onnx.ModelProto:
        traced["traces"] += 1
        model = trace(*arguments, **options)
        traced["nodes"] += len(model.graph.node)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_interpreter, "trace", counted)
        onnx_interpreter.interpreter_graph(step_of(rows=16))
        few = traced.copy()
        onnx_interpreter.interpreter_graph(step_of(rows=2))
    assert few["traces"] == 2 and traced - few == few


def test_the_weights_are_in_the_file_once_and_by_name() -> None:
    step = step_of()
    model = onnx.load_from_string(export_onnx(step).data)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = step.interpreter.weights()
    for name, weight in weights.items():
        assert stored[name].shape == tuple(weight.shape) and stored[name].tobytes() == weight.detach().numpy().tobytes()
    read = {name for node in model.graph.node for name in node.input}
    assert stored.keys() <= read, "the graph computes with the named weights"
    contents = Counter((x.dtype, x.shape, x.tobytes()) for x in stored.values())
    assert max(contents.values()) == 1


def strips_in_order_of_execution(data: bytes, feeds: Mapping[str, np.ndarray], prefix: Path) -> list[int]:
    """Return the number of the strip of each node that ONNX Runtime runs after a strip's convolutions, in its order."""
    model = onnx.load_from_string(data)
    joining = max((node for node in model.graph.node if node.op_type == "Concat"), key=lambda node: len(node.input))
    made_by = {output: index for index, node in enumerate(model.graph.node) for output in node.output}
    ends = [made_by[name] for name in joining.input]
    for index, node in enumerate(model.graph.node):
        node.name = str(index)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    executed = (event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node")
    shared = {"Slice", "MatMul", "Concat"}  # strips share the lower levels, which the first of them projects
    nodes = [int(name) for name in executed if name.isdigit() and int(name) <= ends[-1]]
    return [bisect(ends, node - 1) for node in nodes if model.graph.node[node].op_type not in shared]


@pytest.mark.parametrize("task", ["segmentation", "keypoints"])
def test_onnx_runtime_ends_a_strip_before_it_begins_another(task: TaskName, tmp_path: Path) -> None:
    """Otherwise the memory of strips adds up to that of the whole image."""
    step = step_of(task=task, rows=4)
    inputs = zip(step.inputs, example_inputs(step, 1), strict=True)
    feeds = {spec.name: x.numpy() for spec, x in inputs}
    order = strips_in_order_of_execution(repeated(step), feeds, tmp_path / "profile")
    assert len(order) >= 8 * 10, "the profile names the nodes"
    assert len(list(groupby(order))) == 8 == len(set(order))


def test_the_service_reads_as_many_strips_as_are_exported(tmp_path: Path) -> None:
    def fields(rows: int) -> int:
        path = tmp_path / f"{rows}.onnx"
        path.write_bytes(repeated(step_of(rows=rows)))
        with RegularFile(path, onnx_file.MAX_ONNX_BYTES) as file:
            walk = onnx_file._Walk(file)
            walk.model()
        return onnx_file.MAX_FIELDS - walk._left

    more_strips = SPEC.resolution // 2 - SPEC.resolution // 4
    of_a_strip = (fields(2) - fields(4)) / more_strips
    assert of_a_strip * MAX_STRIPS < 0.9 * onnx_file.MAX_FIELDS


def test_equal_weights_keep_their_names() -> None:
    step = StyleInterpreterStep(StyleInterpreter(SPEC))  # all weights are zero
    model = onnx.load_from_string(export_onnx(step.eval()).data)
    assert step.interpreter.weights().keys() <= {tensor.name for tensor in model.graph.initializer}


def test_two_processes_write_the_same_bytes() -> None:
    program = (
        "import hashlib; from tests.export.test_onnx_interpreter import *; "
        "print(hashlib.sha256(export_onnx(step_of()).data).hexdigest())"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.split()[-1] == hashlib.sha256(export_onnx(step_of()).data).hexdigest()


class _Brightest(StyleInterpreter):
    """Another task: the largest output of all heads, and the number of the pixel that has it."""

    def strip(self, parts: Mapping[str, torch.Tensor], weights: Weights) -> tuple[torch.Tensor, ...]:
        return (interleave(self.outputs(parts, weights).amax(dim=(2, 3))),)  # [B,S,R]

    def finish(self, *joined: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (brightest,) = joined
        label = (brightest.flatten(1).argmax(dim=1)[:, None, None] + torch.zeros_like(brightest)).to(torch.uint8)
        return label, brightest, self.score(brightest)


def test_another_task_needs_no_change_of_the_export() -> None:
    """Its strips have one result, not two as in our tasks."""
    export_onnx(StyleInterpreterStep(with_weights(_Brightest(SPEC, "sum", 8))).eval())


def test_an_operation_that_the_export_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = StyleInterpreter.project
    monkeypatch.setattr(
        StyleInterpreter, "project", lambda self, maps, r, *rest, **more: -lower(self, maps, r, *rest, **more)
    )
    with pytest.raises((NotImplementedError, TypeError), match="neg|bad operand"):
        export_onnx(step_of())


def test_a_strip_with_a_graph_in_a_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_loop(*arguments: Any, **options: Any) -> onnx.ModelProto:
        model = trace(*arguments, **options)
        body = helper.make_graph([], "body", [], [])
        model.graph.node.add(op_type="Loop", attribute=[helper.make_attribute("body", body)])
        return model

    monkeypatch.setattr(onnx_interpreter, "trace", with_loop)
    with pytest.raises(RuntimeError, match="'Loop' that cannot be repeated"):
        export_onnx(step_of())
