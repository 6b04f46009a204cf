"""What runs an interpreter, as Triton says it; whose calibration applies, and what is said where there is none."""

from dataclasses import replace

import pytest
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.executor import Executor, executor_of
from labelmint.core.served_model import read_served_model
from tests.support.served import CALIBRATION, MODEL

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("backend", "stands_in_for", "name", "parameter"),
    [
        ("onnxruntime", "", "onnxruntime", "calibration"),
        ("pytorch", "", "pytorch", "calibration"),
        ("labelmint", "", "kernel", "calibration"),
        ("labelmint", "onnxruntime", "kernel", "calibration.kernel"),
    ],
)
def test_the_step_says_what_runs_it(backend: str, stands_in_for: str, name: str, parameter: str) -> None:
    step = pb.ModelConfig(backend=backend)
    if stands_in_for:
        step.parameters["stands_in_for"].string_value = stands_in_for
    executor = executor_of(step)
    assert (executor.name, executor.calibration) == (name, parameter)


@pytest.mark.parametrize(
    ("executor", "others", "said"),
    [
        (Executor(), (), "is not calibrated; give max_js or run `labelmint calibrate faces --executor onnxruntime`"),
        (Executor("kernel"), (), "is not calibrated; give max_js or run `labelmint calibrate faces`"),
        (
            Executor("kernel"),
            ("onnxruntime",),
            "is not calibrated for the executor 'kernel', only for 'onnxruntime'; "
            "give max_js or run `labelmint calibrate faces`",
        ),
        (
            Executor(),
            ("kernel",),
            "is not calibrated for the executor 'onnxruntime', only for 'kernel'; "
            "give max_js or run `labelmint calibrate faces --executor onnxruntime`",
        ),
    ],
)
def test_one_sentence_says_what_to_do(executor: Executor, others: tuple[str, ...], said: str) -> None:
    model = replace(MODEL, executor=executor, calibration=None, calibrated_for=others)
    assert model.uncalibrated() == f"model 'faces' {said}"


def test_a_model_without_its_calibrations_is_not_spoilt_by_them() -> None:
    config = pb.ModelConfig(name="faces", platform="ensemble")
    for name in ("latent", "style_latent"):
        config.input.add(name=name, data_type=pb.TYPE_FP32, dims=[4])
    for name, dims, kind in (
        ("image", [8, 8, 3], pb.TYPE_UINT8),
        ("label", [8, 8], pb.TYPE_UINT8),
        ("js_map", [8, 8], pb.TYPE_FP32),
        ("js_score", [1], pb.TYPE_FP32),
    ):
        config.output.add(name=name, data_type=kind, dims=dims)
    texts = {"task": "segmentation", "class_names": '["a", "b"]', "palette": "[[0, 0, 0], [1, 1, 1]]", "model": "faces"}
    texts |= {"model_digest": "d" * 64, "pipeline": "fused", "num_ws": "3", "layout": "paper", "num_heads": "2"}
    texts |= {"score_kind": "sum", "calibration": CALIBRATION.to_json()}
    texts["calibration.kernel"] = replace(CALIBRATION, threshold=1.0).to_json()
    for key, text in texts.items():
        config.parameters[key].string_value = text
    for executor, threshold in ((Executor(), CALIBRATION.threshold), (Executor("kernel"), 1.0)):
        model = read_served_model(config, "1", executor)
        assert model.calibration is not None and model.calibration.threshold == threshold
        assert model.calibrated_for == ("kernel", "onnxruntime")
    config.parameters["calibration.kernel"].string_value = replace(CALIBRATION, model_digest="e" * 64).to_json()
    assert read_served_model(config, "1", calibrated=False).calibrated_for == ()
    with pytest.raises(ValueError, match="a different digest"):
        read_served_model(config, "1")
