"""What an export of a conditional generator has more than any other, and what depends on it."""

from pathlib import Path

import pytest
import torch
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.executor import KERNEL_CALIBRATION
from labelmint.export.comparison import TOLERANCE
from labelmint.export.modules import GeneratorStep, example_inputs
from labelmint.export.repository import FORMATS, STAGED, export_repository
from labelmint.triton.artifacts import check_models, read_whole_model
from labelmint.triton.model_config import check_artifacts, ensembles, read_config
from tests.support.models import conditional_weights, export_conditional, files, small
from tests.support.repositories import gate_class

pytestmark = pytest.mark.torch

NAMES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conditional")
    export_conditional(directory)
    return directory


def digest(repository: Path) -> str:
    return read_config(repository / "kinds" / "config.pbtxt").parameters["model_digest"].string_value


def test_the_class_is_one_more_input_of_the_generator_and_the_ensembles(repository: Path) -> None:
    for name in ("kinds", "kinds_staged", "kinds_generator"):
        config = read_config(repository / name / "config.pbtxt")
        assert [tensor.name for tensor in config.input][-1] == "class_index" and len(config.input) == 5
        assert (config.input[-1].data_type, list(config.input[-1].dims)) == (pb.TYPE_INT32, [1])
        for warmup in config.model_warmup:
            assert warmup.inputs["class_index"].zero_data and list(warmup.inputs["class_index"].dims) == [1]
    for name in {*STAGED, "style_interpreter"} - {"generator"}:
        assert "class_index" not in (repository / f"kinds_{name}" / "config.pbtxt").read_text()
    for config in ensembles(repository).values():
        check_artifacts(repository, config)
    check_models(repository, ["kinds", "kinds_staged"])
    assert read_whole_model(repository, "kinds").generator_classes == NAMES


def test_a_model_without_classes_has_nothing_of_them(tiny_repository: Path) -> None:
    assert not [
        path
        for path in tiny_repository.rglob("*")
        if path.is_file() and (b"class_index" in (data := path.read_bytes()) or b"generator_classes" in data)
    ]


@pytest.mark.parametrize("file_format", ["onnx", "torchscript"])
@torch.no_grad()
def test_files_answer_what_torch_answers_for_every_class(file_format: str) -> None:
    step = GeneratorStep(*conditional_weights(tuple(map(str, range(50)))))
    exported = FORMATS[file_format](step)
    assert max(value for name, value in exported.difference.items() if name != "image") <= TOLERANCE
    drawn = torch.cat([example_inputs(step, 3, seed=seed)[-1] for seed in range(40)])
    assert (int(drawn.min()), int(drawn.max())) == (0, 49), "the comparison never sees some class"


def test_exporting_again_gives_the_same_bytes_and_keeps_the_calibrations(tmp_path: Path) -> None:
    export_conditional(tmp_path)
    for class_index, parameter in ((0, "calibration"), (2, "calibration"), (2, KERNEL_CALIBRATION)):
        gate_class(tmp_path, "kinds", class_index, threshold=10.0 + class_index, parameter=parameter)
    before = files(tmp_path)
    export_conditional(tmp_path)
    assert files(tmp_path) == before
    parameters = read_config(tmp_path / "kinds" / "config.pbtxt").parameters
    kept = {name for name in parameters if name.startswith("calibration")}
    assert kept == {"calibration.class_0", "calibration.class_2", "calibration.kernel.class_2"}
    assert read_whole_model(tmp_path, "kinds").calibrated_classes == (0, 2)


def test_other_weights_lose_the_calibrations_and_other_names_do_not(tmp_path: Path) -> None:
    """Names are no part of a sample."""
    export_conditional(tmp_path)
    gate_class(tmp_path, "kinds", 1, threshold=10.0)
    before = digest(tmp_path)
    export_repository(tmp_path, "kinds", conditional_weights(("one", "two", "three")), staged=False)
    assert digest(tmp_path) == before
    model = read_whole_model(tmp_path, "kinds")
    assert (model.generator_classes, model.calibrated_classes) == (("one", "two", "three"), (1,))
    generator, interpreter = conditional_weights()
    with torch.no_grad():
        generator.mapping.embed.weight[0, 2] += 1.0
    export_repository(tmp_path, "kinds", (generator, interpreter), staged=False)
    assert digest(tmp_path) != before
    assert read_whole_model(tmp_path, "kinds").calibrated_classes == ()


def test_a_generator_without_classes_takes_the_place_of_one_with(tmp_path: Path, tiny_repository: Path) -> None:
    export_repository(tmp_path, "tiny", conditional_weights())
    export_repository(tmp_path, "tiny", small())
    assert files(tmp_path) == files(tiny_repository)
