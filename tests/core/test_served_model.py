"""The description of a model is what its configuration says, or an error that names what is wrong with it."""

import json
from dataclasses import replace

import pytest
from tritonclient.grpc import model_config_pb2 as triton

from labelmint.core.executor import Executor
from labelmint.core.served_model import MalformedModel, ServedModel, is_labelmint, read_served_model
from labelmint.core.task import KEYPOINTS, SEGMENTATION
from tests.support.served import CALIBRATION, CATS, DOGS

pytestmark = pytest.mark.unit

UINT8, FLOAT32 = triton.TYPE_UINT8, triton.TYPE_FP32
PARAMETERS = {
    "task": "segmentation",
    "class_names": '["background", "hair"]',
    "palette": "[[0, 0, 0], [255, 73, 32]]",
    "model": "faces",
    "model_digest": "d" * 64,
    "pipeline": "fused",
    "num_ws": "12",
    "layout": "paper",
    "num_heads": "10",
    "score_kind": "sum",
    "calibration": CALIBRATION.to_json(),
}
KEYPOINT_PARAMETERS = {"task": "keypoints", "keypoint_names": '["nose", "left eye"]'}


def names(count: int) -> dict[str, str]:
    """The parameters of a model with `count` classes."""
    classes, colours = [f"class {index}" for index in range(count)], [[index % 256, 0, 0] for index in range(count)]
    return {"class_names": json.dumps(classes), "palette": json.dumps(colours)}


def configuration(
    parameters: dict[str, str],
    *,
    size: int = 8,
    latent: int = 64,
    style_latent: int = 64,
    label_type: "triton.DataType" = UINT8,
) -> triton.ModelConfig:
    """A model of either task, as export describes it, with these parameters changed."""
    labels: dict[str, tuple[triton.DataType, list[int]]] = {"label": (label_type, [size, size])}
    if parameters.get("task") == "keypoints":
        labels = {"keypoints": (FLOAT32, [2, 2]), "confidence": (FLOAT32, [2])}
    config = triton.ModelConfig(name="faces", platform="ensemble")
    config.input.add(name="latent", data_type=FLOAT32, dims=[latent])
    config.input.add(name="style_latent", data_type=FLOAT32, dims=[style_latent])
    config.output.add(name="image", data_type=UINT8, dims=[size, size, 3])
    config.output.add(name="js_map", data_type=FLOAT32, dims=[size, size])
    config.output.add(name="js_score", data_type=FLOAT32, dims=[1])
    for name, (data_type, dims) in labels.items():
        config.output.add(name=name, data_type=data_type, dims=dims)
    for name, value in {**PARAMETERS, **parameters}.items():
        config.parameters[name].string_value = value
    return config


def problem_of(config: triton.ModelConfig) -> str:
    with pytest.raises(MalformedModel) as caught:
        read_served_model(config, "1")
    said = str(caught.value)
    assert said.startswith("model 'faces': ") and said.endswith("; export it again")
    return said.removeprefix("model 'faces': ").removesuffix("; export it again")


def test_a_description_has_everything_that_the_configuration_says() -> None:
    assert read_served_model(configuration({}), "3") == ServedModel(
        name="faces",
        triton_name="faces",
        version="3",
        pipeline="fused",
        task=SEGMENTATION,
        digest="d" * 64,
        resolution=8,
        z_dim=64,
        num_ws=12,
        layout="paper",
        num_heads=10,
        score_kind="sum",
        label_names=("background", "hair"),
        palette=((0, 0, 0), (255, 73, 32)),
        executor=Executor("onnxruntime", "onnxruntime"),
        calibration=CALIBRATION,
        calibrated_for=("onnxruntime",),
    )


def test_a_model_of_keypoints_has_their_names() -> None:
    model = read_served_model(configuration(KEYPOINT_PARAMETERS), "1")
    assert model.task is KEYPOINTS and model.label_names == ("nose", "left eye")


def test_a_model_may_be_uncalibrated() -> None:
    config = configuration({})
    del config.parameters["calibration"]
    assert read_served_model(config, "1").calibration is None


def test_the_staged_pipeline_has_the_calibration_of_the_fused_one() -> None:
    config = configuration({"pipeline": "staged", "model_digest": "e" * 64})
    config.name = "faces_staged"
    model = read_served_model(config, "1")
    assert (model.name, model.triton_name, model.pipeline) == ("faces", "faces_staged", "staged")
    assert model.digest == "e" * 64 and model.calibration == CALIBRATION


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"task": "depth"}, "unknown task 'depth'; known: segmentation, keypoints"),
        ({"palette": "{}"}, "palette is not a list"),
        ({"palette": "[[0, 0, 0]]"}, "2 names of classes or keypoints but 1 colours"),
        ({"palette": '["red", [0, 0, 0]]'}, "palette has 'red', not three integers"),
        ({"palette": "[[true, 0, 0], [0, 0, 0]]"}, "palette has [True, 0, 0], not three integers"),
        ({"palette": "[[0, 0, 256], [0, 0, 0]]"}, "palette has [0, 0, 256]; each must be within 0 and 255"),
        ({"palette": "[[0, -1, 0], [0, 0, 0]]"}, "palette has [0, -1, 0]; each must be within 0 and 255"),
        ({"class_names": '"ab"'}, "class_names is not a list"),
        ({"class_names": "[7, 8]"}, "class_names has 7, which is not a printable name"),
        ({"class_names": '["", "hair"]'}, "class_names has '', which is not a printable name"),
        ({"class_names": '["a\\nb", "hair"]'}, "class_names has 'a\\nb', which is not a printable name"),
        ({"class_names": '["skin", "hair", "hair"]'}, "class_names has 'hair' twice"),
        ({"class_names": "[]"}, "class_names has 0 names, not 1 to 255"),
        (names(256), "class_names has 256 names, not 1 to 255"),
        ({"num_ws": "0"}, "num_ws is 0, not between 1 and 1024"),
        ({"num_heads": "1025"}, "num_heads is 1025, not between 1 and 1024"),
        ({"model_digest": "d" * 63}, "model_digest is not a SHA-256 in hexadecimal digits"),
        ({"model_digest": "D" * 64}, "model_digest is not a SHA-256 in hexadecimal digits"),
        ({"score_kind": "mean"}, "calibrated for score kind 'sum', the model is 'mean'"),
        (
            {"model_digest": "e" * 64},
            "its calibration was measured on a model with a different digest; calibrate this one too",
        ),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, str], problem: str) -> None:
    assert problem_of(configuration(parameters)) == problem


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "calibration"])
def test_a_missing_parameter_is_named(name: str) -> None:
    config = configuration({})
    del config.parameters[name]
    assert problem_of(config) == f"config.pbtxt lacks '{name}'"


@pytest.mark.parametrize(("size", "latent", "style_latent"), [(0, 64, 64), (16385, 64, 64), (8, 0, 0), (8, 64, 63)])
def test_sizes_that_no_model_has_are_named(size: int, latent: int, style_latent: int) -> None:
    config = configuration({}, size=size, latent=latent, style_latent=style_latent)
    image = f"image [{size}, {size}, 3]"
    assert problem_of(config) == f"bad shapes: {image}, latent [{latent}], style_latent [{style_latent}]"


def test_an_output_of_another_shape_or_type_is_named() -> None:
    config = configuration({})
    config.output[0].dims[1] = 16
    assert problem_of(config) == "output image is [8, 16, 3], not [8, 8, 3] as task 'segmentation' requires"
    config = configuration(KEYPOINT_PARAMETERS)
    config.output[3].dims[0] = 3
    assert problem_of(config) == "output keypoints is [3, 2], not [2, 2] as task 'keypoints' requires"
    assert problem_of(configuration({}, label_type=FLOAT32)) == "output label is not TYPE_UINT8"


def test_the_smallest_and_the_largest_model_can_be_served() -> None:
    smallest = configuration({**names(1), "num_ws": "1", "num_heads": "1"}, size=1, latent=1, style_latent=1)
    largest = configuration({**names(255), "num_ws": "1024", "num_heads": "1024"}, size=16384)
    for config, expected in ((smallest, (1, 1, 1, 1, 1)), (largest, (16384, 64, 1024, 1024, 255))):
        model = read_served_model(config, "1")
        sizes = (model.resolution, model.z_dim, model.num_ws, model.num_heads, len(model.label_names))
        assert sizes == expected and len(model.palette) == len(model.label_names)


def test_a_models_own_ensembles_are_told_from_others() -> None:
    assert is_labelmint(configuration({}))
    assert not is_labelmint(triton.ModelConfig(platform="ensemble"))
    step = configuration({})
    step.platform = "onnxruntime_onnx"
    assert not is_labelmint(step)


CLASSES = '["cat", "dog", "fox"]'


def conditional(parameters: dict[str, str], *, data_type: "triton.DataType" = triton.TYPE_INT32) -> triton.ModelConfig:
    """A model whose generator draws classes, without calibrations but those in `parameters`."""
    config = configuration({"generator_classes": CLASSES, **parameters})
    if "calibration" not in parameters:
        del config.parameters["calibration"]
    config.input.add(name="class_index", data_type=data_type, dims=[1])
    return config


def test_a_conditional_model_has_its_classes_and_a_calibration_for_each() -> None:
    kernel = replace(DOGS, threshold=1.0)
    config = conditional({"calibration.class_1": DOGS.to_json(), "calibration.kernel.class_1": kernel.to_json()})
    model = read_served_model(config, "1")
    assert model.generator_classes == ("cat", "dog", "fox") and model.calibration is None
    assert model.class_calibrations == (None, DOGS, None) and model.calibrated_classes == (1,)
    assert [model.calibration_of(index) for index in (None, 0, 1, 2)] == [None, None, DOGS, None]
    assert read_served_model(config, "1", Executor("kernel", "onnxruntime")).class_calibrations == (None, kernel, None)
    assert read_served_model(config, "1", calibrated=False).calibrated_classes == ()
    assert hash(model) == hash(read_served_model(config, "1"))
    plain = read_served_model(configuration({}), "1")
    assert (plain.generator_classes, plain.class_calibrations, plain.calibrated_classes) == ((), (), ())
    assert plain.calibration_of(None) == CALIBRATION


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"generator_classes": "[]"}, "generator_classes has no names"),
        ({"generator_classes": '"ab"'}, "generator_classes is not a list"),
        ({"generator_classes": '["cat", "cat"]'}, "two generator classes have the name 'cat'"),
        ({"calibration.class_3": CATS.to_json()}, "it has a calibration of class 3 and 3 generator classes"),
        ({"calibration.class_1": CATS.to_json()}, "its calibration of class 1 was measured on class 0"),
        ({"calibration.class_1": CALIBRATION.to_json()}, "its calibration of class 1 was measured on class None"),
        ({"calibration": CALIBRATION.to_json()}, "it has generator classes and a calibration without a class"),
        (
            {"calibration.kernel.class_0": replace(CATS, model_digest="e" * 64).to_json()},
            "its calibration was measured on a model with a different digest; calibrate this one too",
        ),
    ],
)
def test_contradictions_about_classes_are_named(parameters: dict[str, str], problem: str) -> None:
    assert problem_of(conditional(parameters)) == problem


def test_the_names_of_the_classes_and_their_input_belong_together() -> None:
    nameless = conditional({})
    del nameless.parameters["generator_classes"]
    assert problem_of(nameless) == "it has the input class_index and lacks the parameter generator_classes"
    deaf = configuration({"generator_classes": CLASSES})
    assert problem_of(deaf) == "it has the parameter generator_classes and lacks the input class_index"
    assert problem_of(conditional({}, data_type=FLOAT32)) == "input class_index is not one TYPE_INT32"
    wide = conditional({})
    wide.input[-1].dims[0] = 2
    assert problem_of(wide) == "input class_index is not one TYPE_INT32"
    unconditional = configuration({"calibration.class_0": CATS.to_json()})
    assert problem_of(unconditional) == "it has a calibration of class 0 and 0 generator classes"
