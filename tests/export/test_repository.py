"""The committed model repository is what its weights export to, and keeps the promises of the tensor contract."""

import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from demo.committed import GENERATOR, INTERPRETER, KEYPOINTS
from onnx import numpy_helper

from labelmint.core.calibration import SCORE_KINDS, Calibration
from labelmint.core.errors import IncompatibleWeights
from labelmint.core.served_model import read_served_model
from labelmint.core.task import TASKS
from labelmint.export import onnx_export, repository
from labelmint.export.modules import GeneratorStep, StyleInterpreterStep, example_inputs
from labelmint.export.onnx_export import IR_VERSION, export_onnx
from labelmint.export.onnx_trace import OPSET
from labelmint.export.repository import STAGED, export_repository
from labelmint.export.repository import STEPS as STEP_OF
from labelmint.models.generator import Generator
from labelmint.models.store import load_generator, load_interpreter
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint.triton.model_config import check_artifacts, ensembles, read_config
from tests.conftest import REPOSITORY, ROOT
from tests.support.models import files, random_interpreter, small, tiny_weights

pytestmark = pytest.mark.torch


INTERPRETERS = {"faces": INTERPRETER, "faces_keypoints": KEYPOINTS}
STEPS = [
    f"{model}_{step}"
    for model in INTERPRETERS
    for step in ("generator", "style_interpreter", "feature_aggregation", "mlp_heads", "uncertainty")
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, exported again from its weights, over a copy that has the calibration."""
    directory = tmp_path_factory.mktemp("export") / "repository"
    shutil.copytree(REPOSITORY, directory)
    generator = load_generator(GENERATOR)
    for model, weights in INTERPRETERS.items():
        export_repository(directory, model, (generator, load_interpreter(weights)))
    return directory


def test_exporting_again_gives_the_committed_bytes(exported: Path) -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, pinned = line.partition(";")[0].strip().partition("==")
        if pinned and (installed := version(name).partition("+")[0]) != pinned:
            pytest.skip(f"{name} is {installed}; the committed bytes were made with {pinned}")
    assert files(exported) == files(REPOSITORY)


def test_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in REPOSITORY.rglob("*") if path.is_file()) < 42e6


@pytest.mark.parametrize("step", STEPS)
def test_files_keep_to_standard_operators_and_a_symbolic_batch(step: str) -> None:
    model = onnx.load(REPOSITORY / step / "1" / "model.onnx")
    assert model.ir_version == IR_VERSION <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)] and OPSET <= 20
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param, value.name
    text = model.SerializeToString()
    assert b"/home/" not in text and b".py" not in text


@pytest.mark.parametrize("step", STEPS)
def test_weights_are_finite(step: str) -> None:
    model = onnx.load(REPOSITORY / step / "1" / "model.onnx")
    for tensor in model.graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor).astype(np.float64)).all(), tensor.name


def test_ensembles_describe_themselves() -> None:
    found = ensembles(REPOSITORY)
    assert set(found) == {"faces", "faces_staged", "faces_keypoints", "faces_keypoints_staged"}
    for name, config in found.items():
        check_artifacts(REPOSITORY, config)
        model = read_served_model(config, "1")
        assert model.name == name.removesuffix("_staged") and model.resolution == 128
        assert (model.task.name, len(model.label_names)) == (
            ("keypoints", 7) if model.name == "faces_keypoints" else ("segmentation", 16)
        )
        assert isinstance(model.calibration, Calibration) and model.calibration.seed_count >= 1000
    assert len({config.parameters["model_digest"].string_value for config in found.values()}) == 4


def test_both_models_have_the_same_generator() -> None:
    """Git and a registry of layers keep equal files once."""
    first, second = (REPOSITORY / f"{model}_generator" / "1" / "model.onnx" for model in INTERPRETERS)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("step", STEPS)
def test_the_queue_has_no_policy(step: str) -> None:
    """With one, Triton's batcher leaves requests waiting for half a second beside an idle model."""
    config = read_config(REPOSITORY / step / "config.pbtxt")
    assert config.backend == "onnxruntime"
    assert config.HasField("dynamic_batching") and not config.dynamic_batching.HasField("default_queue_policy")


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path, tiny_repository: Path) -> None:
    differences = export_repository(tmp_path, "tiny", tiny_weights())
    assert {f"faces_{step}" for step in differences} == set(STEPS[:5])
    assert all(value < 1e-3 for step in differences.values() for value in step.values())
    assert files(tmp_path) == files(tiny_repository)
    assert not list(tmp_path.rglob("*.part")) and not list(tiny_repository.rglob("*.part"))


def test_a_calibration_does_not_survive_other_weights(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "faces", tmp_path / "faces")
    export_repository(tmp_path, "faces", small())
    assert "calibration" not in read_config(tmp_path / "faces" / "config.pbtxt").parameters


def test_an_interpreter_of_other_features_is_refused(tmp_path: Path) -> None:
    _, interpreter = small()
    other = StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=16, channels={4: 4, 8: 4, 16: 2})
    with pytest.raises(IncompatibleWeights, match=r"layout 'paper' with D=20 .* the generator gives D=16"):
        export_repository(tmp_path / "repository", "tiny", (Generator(other), interpreter))
    assert not (tmp_path / "repository").exists()


def test_more_strips_than_the_service_reads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, interpreter = small()
    strips = interpreter.spec.resolution // interpreter.strip_rows
    monkeypatch.setattr(repository, "MAX_STRIPS", strips)
    repository._check_strips(interpreter)
    interpreter.strip_rows //= 2
    with pytest.raises(IncompatibleWeights, match=f"would be {2 * strips} at .* set --strip-rows to at least"):
        export_repository(tmp_path / "repository", "tiny", (generator, interpreter))
    assert not (tmp_path / "repository").exists()


def test_a_file_that_differs_from_torch_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provoked by convolution weights that are changed on their way into the file."""
    clean = onnx_export._clean

    def tampered(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4:
                tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1), tensor.name))
        clean(model)

    monkeypatch.setattr(onnx_export, "_clean", tampered)
    with pytest.raises(RuntimeError, match=r"differs from torch|values differ"):
        export_onnx(GeneratorStep(*small()))


@pytest.mark.parametrize("score_kind", SCORE_KINDS)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_the_steps_one_by_one_answer_what_the_fused_one_answers(task: str, score_kind: str) -> None:
    generator, _ = small()
    interpreter = random_interpreter(generator, task)
    interpreter.score_kind = score_kind
    fused = StyleInterpreterStep(interpreter)
    tensors = features = example_inputs(fused, 2)
    for name in STAGED[1:]:
        tensors = STEP_OF[name](generator, interpreter)(*tensors)
    for spec, one, other in zip(fused.outputs, tensors, fused(*features), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=spec.name: f"{name}: {text}")
