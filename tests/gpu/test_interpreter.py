"""The interpreter's kernel for GPUs, run on the CPU in Triton's interpreter: torch's answers, NaN, refusals."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from demo.committed import GENERATOR, INTERPRETER, KEYPOINTS

from labelmint.core.calibration import SCORE_KINDS
from labelmint.core.policy import latent_of
from labelmint.export.modules import GeneratorStep, StyleInterpreterStep
from labelmint.export.native_export import weights_file
from labelmint.gpu.interpreter import TILES
from labelmint.kernel.interpreter import read_weights
from labelmint.models.store import load_generator, load_interpreter
from tests.support.interpreted import Arrays, label
from tests.support.interpreters import features_of, in_torch, random_step

pytestmark = pytest.mark.torch

# Channels of the levels, heads, hidden widths and classes. In "projected", level R/2 has more channels than the kernel
# interpolates by itself.
SHAPES = {
    "smallest": ({4: 3, 8: 4, 16: 2}, 2, (4, 4), 2),
    "odd": ({4: 3, 8: 4, 16: 5, 32: 7, 64: 2}, 3, (13, 6), 21),
    "projected": ({4: 1, 8: 300, 16: 140, 32: 33}, 2, (40, 20), 34),
    "small": ({4: 3, 8: 4, 16: 5, 32: 7}, 2, (13, 6), 21),
    "many classes": ({4: 2, 8: 2, 16: 2}, 2, (16, 16), 255),
}
TASKS = ("segmentation", "keypoints")
# The largest difference of the JS divergence to float32 in torch, in nats, and the least share of equal labels, for
# random weights with many near ties.
BARS = {"float32": (5e-6, 1.0), "tf32": (5e-3, 0.98), "float16": (5e-3, 0.98), "bfloat16": (5e-2, 0.9)}


def step_of(shape: str, task: str, score_kind: str = "sum") -> StyleInterpreterStep:
    channels, heads, hidden, classes = SHAPES[shape]
    return random_step(channels, heads, hidden, classes=classes, task=task, score_kind=score_kind)


def weights_of(step: StyleInterpreterStep) -> Arrays:
    return read_weights(io.BytesIO(weights_file(step.interpreter)))


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_answers_what_torch_answers(shape: str, task: str, precision: str) -> None:
    step = step_of(shape, task)
    features = features_of(step, 0)
    want, (got,) = in_torch(step, features), label(weights_of(step), [features], precision)
    assert {name: (x.shape, x.dtype) for name, x in got.items()} == {n: (x.shape, x.dtype) for n, x in want.items()}
    js, agreement = BARS[precision]
    scale = step.interpreter.spec.num_classes if task == "keypoints" else 1  # its divergences are summed
    assert np.abs(got["js_map"] - want["js_map"]).max() <= js * scale
    assert got["js_score"] == pytest.approx(want["js_score"], rel=js)
    if task == "segmentation":
        assert (got["label"] == want["label"]).mean() >= agreement
    else:
        assert got["confidence"] == pytest.approx(want["confidence"], rel=2 * js, abs=4 * js)
        if precision == "float32":
            assert (got["keypoints"] == want["keypoints"]).all()


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("score_kind", [kind for kind in SCORE_KINDS if kind != "sum"])
@pytest.mark.parametrize("task", TASKS)
def test_the_other_score_kinds(task: str, score_kind: str, precision: str) -> None:
    step = step_of("small", task, score_kind)
    features = features_of(step, 0)
    (got,) = label(weights_of(step), [features], precision)
    assert got["js_score"] == pytest.approx(in_torch(step, features)["js_score"], rel=BARS[precision][0])


COMMITTED = sorted({dataclasses.astuple(tile) for tiles in TILES.values() for tile in tiles})


@pytest.mark.parametrize("tile", [None, *COMMITTED, (32, 4, 16, 4, 1, 16), (4, 32, 16, 4, 1, 16)])
def test_every_tile_gives_the_same_labels(tile: tuple[int, ...] | None) -> None:
    """A tile decides the padding and which points a program reads; only rounding may differ."""
    step = step_of("small", "segmentation")
    features = features_of(step, 0)
    want, (got,) = in_torch(step, features), label(weights_of(step), [features], tile=tile)
    assert np.abs(got["js_map"] - want["js_map"]).max() <= 5e-6
    assert (got["label"] == want["label"]).all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_no_sample_leaves_a_trace_in_the_next(precision: str, task: str) -> None:
    step = step_of("small", task)
    samples = [features_of(step, seed) for seed in (0, 1, 2, 1, 0)]
    answers = label(weights_of(step), samples, precision)
    for one, same in ((0, 4), (1, 3)):
        for name, array in answers[one].items():
            assert array.tobytes() == answers[same][name].tobytes(), name


def test_equal_votes_and_heats_go_to_the_first() -> None:
    for task in TASKS:
        step = step_of("small", task)
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.zero_()
        (got,) = label(weights_of(step), [features_of(step, 0)])
        assert not got["label" if task == "segmentation" else "keypoints"].any()
        assert got["js_map"].max() < 1e-6


def test_logits_of_thousands_overflow_no_exponential() -> None:
    step = step_of("small", "segmentation")
    with torch.no_grad():
        step.interpreter.weight3.mul_(1e3)
    for precision in ("float32", "float16"):
        (got,) = label(weights_of(step), [features_of(step, 0)], precision)
        assert np.isfinite(got["js_map"]).all() and got["js_map"].max() <= np.log(3) + 1e-5, "at most log of the heads"


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", range(4))
def test_one_feature_that_is_not_a_number_makes_the_score_none(level: int, task: str, precision: str) -> None:
    step = step_of("small", task)
    spoiled = [array.copy() for array in features_of(step, 0)]
    spoiled[level][0, 1, 2] = np.nan
    (got,) = label(weights_of(step), [spoiled], precision)
    assert np.isnan(got["js_score"]).all()
    resolution = got["js_map"].shape[0]
    position = (np.arange(resolution) + 0.5) * spoiled[level].shape[-1] / resolution - 0.5
    touched = (abs(position - 1) < 1)[:, None] & (abs(position - 2) < 1)[None, :]  # what is interpolated from it
    assert np.isnan(got["js_map"])[touched].all()
    if level == 3:
        assert np.isnan(got["js_map"]).sum() == 1, "a pixel of the last level is of no other's concern"
    if task == "keypoints":
        assert np.isnan(got["confidence"]).all()


@pytest.mark.parametrize("score_kind", [kind for kind in SCORE_KINDS if kind != "sum"])
@pytest.mark.parametrize("task", TASKS)
def test_no_score_kind_hides_what_is_not_a_number(task: str, score_kind: str) -> None:
    step = step_of("small", task, score_kind)
    features = features_of(step, 0)
    features[-1][0, 1, 2] = np.nan
    assert np.isnan(label(weights_of(step), [features])[0]["js_score"]).all()


@pytest.mark.parametrize("score_kind", ["sum", "mean_entropy"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38, -3e38])
def test_what_overflows_has_no_score(value: float, precision: str, task: str, score_kind: str) -> None:
    """Features that are infinite, or so large that sums overflow: never a finite score where torch has none."""
    step = step_of("small", task, score_kind)
    (got,) = label(weights_of(step), [[np.full_like(x, value) for x in features_of(step, 0)]], precision)
    assert np.isnan(got["js_score"]).all()
    if task == "segmentation":
        assert got["label"].max() < 21


@pytest.mark.parametrize("part", ["features", "sums", "hidden units"])
def test_what_float16_cannot_hold_has_no_score(part: str) -> None:
    """Float16 ends at 65,504: what lies above becomes NaN, wherever it arises, and no label looks sound."""
    step = step_of("small", "segmentation")
    features = features_of(step, 0)
    with torch.no_grad():
        if part == "features":
            features[-1][0, 3, 4] = 7e4
        elif part == "sums":
            step.interpreter.bias1.fill_(1e5)
        else:
            step.interpreter.bias1.view(2, 13)[1].fill_(6e4)
            step.interpreter.projection["32"].mul_(2e3)
    weights = weights_of(step)
    assert np.isnan(label(weights, [features], "float16")[0]["js_score"]).all()
    for precision in ("float32", "bfloat16"):
        assert np.isfinite(label(weights, [features], precision)[0]["js_score"]).all()


def test_weights_that_a_precision_cannot_hold_are_refused() -> None:
    step = step_of("small", "segmentation")
    with torch.no_grad():
        step.interpreter.weight2.mul_(1e6)
    with pytest.raises(ValueError, match="weight2 has numbers that float16 cannot hold; choose another precision"):
        label(weights_of(step), [], "float16")
    label(weights_of(step), [], "bfloat16")


def test_features_of_another_shape_are_refused() -> None:
    step = step_of("small", "segmentation")
    features = features_of(step, 0)
    for wrong in (features[:-1], features[::-1], [array.astype(np.float64) for array in features]):
        with pytest.raises(ValueError, match="expected float32 features on cpu of the shapes"):
            label(weights_of(step), [wrong])
    strided = [np.asfortranarray(array) for array in features]
    first, second = label(weights_of(step), [features, strided])
    assert first["js_map"].tobytes() == second["js_map"].tobytes()


def test_small_images_and_unknown_precisions_are_refused() -> None:
    weights = weights_of(step_of("smallest", "segmentation"))
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known: float32, tf32, float16, bfloat16"):
        label(weights, [], "fp8")
    del weights["projection_16"]
    with pytest.raises(ValueError, match="images of at least 16 pixels, not 8"):
        label(weights, [])


@pytest.mark.minutes
@pytest.mark.parametrize("task", TASKS)
def test_the_demo(task: str) -> None:
    """Labels of the demo in every precision, as in float32 in torch."""
    interpreter = load_interpreter(KEYPOINTS if task == "keypoints" else INTERPRETER).eval()
    generator = load_generator(GENERATOR)
    step = StyleInterpreterStep(interpreter)
    latent = torch.from_numpy(latent_of(7, generator.spec.z_dim))
    with torch.inference_mode():
        arguments = (latent, latent, torch.tensor([[generator.spec.num_ws]], dtype=torch.int32), torch.tensor([[0.7]]))
        _, *maps = GeneratorStep(generator, interpreter)(*arguments)
    features = [x[0].numpy() for x in maps]
    want = in_torch(step, features)
    tile = (32, 32, 128, 8, 1, 64)  # takes two thirds of the time of the usual one
    for precision, (js, agreement) in {
        "float32": (1e-5, 0.9999),
        "tf32": (2e-2, 0.999),
        "float16": (2e-2, 0.999),
    }.items():
        (got,) = label(weights_of(step), [features], precision, tile=tile)
        assert np.abs(got["js_map"] - want["js_map"]).max() <= js, precision
        if task == "segmentation":
            assert (got["label"] == want["label"]).mean() >= agreement, precision
        else:
            assert np.abs(got["keypoints"] - want["keypoints"]).max() <= 1, precision
