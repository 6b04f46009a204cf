"""Which steps the kernel runs in place of ONNX Runtime: those that say what they are, and none that is doubtful."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.served_model import read_served_model
from labelmint.kernel.interpreter import Interpreter, read_slices
from labelmint.triton.kernel_steps import THREADS, Unrecognised, configuration, describe
from labelmint.triton.model_config import read_config
from tests.support.models import tiny_weights

pytestmark = pytest.mark.torch

STEP = "tiny_style_interpreter"
Change = Callable[[onnx.ModelProto], None]


@pytest.fixture
def copy(tiny_repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_repository, tmp_path / "repository"))


def described(repository: Path) -> dict[str, object]:
    model = read_served_model(read_config(repository / "tiny" / "config.pbtxt"), "1")
    return describe(repository / STEP / "1", read_config(repository / STEP / "config.pbtxt"), model)


def change(repository: Path, changes: Change) -> None:
    path = repository / STEP / "1" / "model.onnx"
    model = onnx.load(path)
    changes(model)
    onnx.save(model, path)


def says(key: str, value: str | None) -> Change:
    """The metadata with another value, or without the key."""

    def changes(model: onnx.ModelProto) -> None:
        (entry,) = (entry for entry in model.metadata_props if entry.key == f"labelmint.{key}")
        if value is None:
            model.metadata_props.remove(entry)
        else:
            entry.value = value

    return changes


def weights(name: str, into: Callable[[np.ndarray], np.ndarray] | None) -> Change:
    """Weights with other values, or left out."""

    def changes(model: onnx.ModelProto) -> None:
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor)
        model.graph.initializer.remove(tensor)
        if into is not None:
            model.graph.initializer.append(numpy_helper.from_array(into(array), name))

    return changes


def once_more(model: onnx.ModelProto) -> None:
    entry = model.metadata_props.add()
    entry.key, entry.value = "labelmint.heads", "2"


def test_the_weights_are_those_of_the_export(tiny_repository: Path) -> None:
    found = described(tiny_repository)
    arrays, digest = read_slices(tiny_repository / STEP / "1" / str(found["file"]), found)
    assert digest == found["sha256"] and json.loads(json.dumps(found)) == found
    _, interpreter = tiny_weights()
    for name in ("weight2", "bias2", "weight3", "bias3"):
        assert arrays[name].tobytes() == getattr(interpreter, name).detach().numpy().tobytes(), name
    for r in interpreter.spec.channels:
        assert arrays[f"projection_{r}"].tobytes() == interpreter.projection[str(r)].detach().numpy().tobytes()
    assert Interpreter(arrays).channels == dict(interpreter.spec.channels)


def test_spare_rows_are_left_out(copy: Path) -> None:
    """The file may have more rows per head than classes; none of them may move another head's."""
    before, _ = read_slices(copy / STEP / "1" / "model.onnx", described(copy))
    spare = 3
    classes = before["bias3"].shape[1]

    def padded(array: np.ndarray) -> np.ndarray:
        heads = array.reshape(2, -1, *array.shape[1:])[:, :classes]
        return np.concatenate([heads, np.full((2, spare, *array.shape[1:]), 7, np.float32)], 1).reshape(
            -1, *array.shape[1:]
        )

    change(copy, weights("weight3", padded))
    change(copy, weights("bias3", padded))
    after, _ = read_slices(copy / STEP / "1" / "model.onnx", described(copy))
    for name, array in before.items():
        assert after[name].tobytes() == array.tobytes() and after[name].shape == array.shape, name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (says("step", None), "does not say that it is a Style Interpreter"),
        (says("step", "generator"), "does not say that it is a Style Interpreter"),
        (says("task", "depth"), "names the task 'depth'"),
        (says("task", "keypoints"), "says 'keypoints' for the task, and the model 'tiny' says 'segmentation'"),
        (says("score_kind", "mean"), "names the score_kind 'mean'"),
        (says("score_kind", "top10_mean"), "says 'top10_mean' for the score kind"),
        (says("heads", None), "says '' for the number of heads"),
        (says("heads", "-2"), "says '-2' for the number of heads"),
        (says("heads", "1" * 60), "for the number of heads"),
        (says("heads", "3"), "does not fit 3 heads"),
        (says("heads", "4"), "does not fit the other arrays"),
        (says("heads", "1"), "does not fit the other arrays"),
        (says("classes", "\u0662"), "for the number of classes"),
        (says("classes", "64"), "classes, not for 64"),
        (says("classes", "1"), "has 1 classes"),
        (weights("projection_8", None), r"levels|other inputs"),
        (weights("projection_16", None), r"config.pbtxt declares other inputs"),
        (weights("bias2", None), "has no float32 weights bias2"),
        (weights("bias2", lambda array: array.astype(np.float64)), "has no float32 weights bias2"),
        (weights("weight2", lambda array: array[:, :-1]), "does not fit the other arrays"),
        (weights("weight2", lambda array: np.concatenate([array, array], -1)), "does not fit 2 heads"),
        (once_more, "has 'labelmint.heads' twice"),
    ],
)
def test_a_doubtful_step_is_left_to_its_backend(copy: Path, changes: Change, reason: str) -> None:
    change(copy, changes)
    with pytest.raises(Unrecognised, match=reason):
        described(copy)


def test_a_damaged_file_is_left_to_its_backend(copy: Path) -> None:
    path = copy / STEP / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Unrecognised, match=r"model.onnx .*cut off"):
        described(copy)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_configuration_of_other_tensors_is_left_to_its_backend(copy: Path, side: str) -> None:
    path = copy / STEP / "config.pbtxt"
    path.write_text(path.read_text().replace('"features_8"', '"other"' if side == "input" else '"features_8"'))
    path.write_text(path.read_text().replace('"js_map"', '"other"' if side == "output" else '"js_map"'))
    with pytest.raises(Unrecognised, match=f"config.pbtxt declares other {side}s"):
        described(copy)


def test_the_configuration_keeps_what_the_kernel_honours(tiny_repository: Path) -> None:
    config = read_config(tiny_repository / STEP / "config.pbtxt")
    config.parameters[THREADS].string_value = "3"
    config.instance_group[0].count = 2
    before = pb.ModelConfig()
    before.CopyFrom(config)
    found = configuration(config)
    assert config == before
    assert found.backend == "labelmint" and not found.HasField("dynamic_batching")
    parameters = {key: value.string_value for key, value in found.parameters.items()}
    assert parameters == {THREADS: "3", "stands_in_for": "onnxruntime"}
    for field in ("name", "max_batch_size", "input", "output", "instance_group", "model_warmup", "version_policy"):
        assert getattr(found, field) == getattr(config, field), field
