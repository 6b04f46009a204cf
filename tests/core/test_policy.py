"""Tests of the gateway's decisions, which are pure functions."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from labelmint.core.errors import InvalidRequest, Uncalibrated
from labelmint.core.policy import (
    SEED_END,
    Gate,
    Mixing,
    SampleOptions,
    Walk,
    check_batch,
    check_class,
    check_has_label,
    check_seed,
    gate_of,
    group_id,
    latent_of,
    mixing_of,
    mixings_of,
    terms_of,
    window_of,
)
from labelmint.core.task import KEYPOINTS
from tests.support.served import CALIBRATION, CATS, CONDITIONAL, DOGS, MODEL

pytestmark = pytest.mark.unit


def test_latent_is_the_official_one() -> None:
    latent = latent_of(7, 64)
    assert latent.dtype == np.float32 and latent.shape == (1, 64)
    np.testing.assert_array_equal(latent, np.random.RandomState(7).randn(1, 64).astype(np.float32))
    assert latent_of(SEED_END - 1, 4).shape == (1, 4)


def test_each_thread_draws_the_same_latents() -> None:
    with ThreadPoolExecutor(1) as pool:
        np.testing.assert_array_equal(pool.submit(latent_of, 7, 64).result(), latent_of(7, 64))


@pytest.mark.parametrize("seed", [-1, SEED_END])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(InvalidRequest, match=r"seed: .* is out of range; seeds are 0 to 4294967295"):
        check_seed(seed)


@pytest.mark.parametrize("count", [0, 65])
def test_batch_size_is_bounded(count: int) -> None:
    with pytest.raises(InvalidRequest, match=r"seeds: \d+ given; a batch takes 1 to 64"):
        check_batch(range(count))


def test_a_batch_is_its_seeds() -> None:
    assert check_batch([5]) == (5,)
    assert check_batch(list(range(64))) == tuple(range(64))
    with pytest.raises(InvalidRequest, match="seeds: -1 is out of range") as caught:
        check_batch([5, -1])
    assert caught.value.metadata == {"field": "seeds"}


def test_the_default_gate_is_the_calibrated_one() -> None:
    gate = gate_of(MODEL, SampleOptions())
    assert gate == Gate(1.0, CALIBRATION.threshold, CALIBRATION.id)
    assert gate.accepts(CALIBRATION.threshold)
    assert not gate.accepts(math.nextafter(CALIBRATION.threshold, math.inf))
    assert not gate.accepts(math.nan)


def test_quantiles_tighten_and_loosen() -> None:
    tight = gate_of(MODEL, SampleOptions(max_quantile=0.5))
    loose = gate_of(MODEL, SampleOptions(max_quantile=1.0))
    assert tight.threshold == pytest.approx(np.median(np.arange(2000) / 10.0))
    assert loose.threshold == CALIBRATION.quantiles[-1]
    for gate in (tight, loose):
        assert (gate.truncation_psi, gate.calibration_id) == (CALIBRATION.truncation_psi, CALIBRATION.id)


def test_max_js_needs_no_calibration() -> None:
    gate = gate_of(replace(MODEL, calibration=None), SampleOptions(truncation_psi=0.7, max_js=3.0))
    assert gate == Gate(0.7, 3.0, "")


def test_the_default_truncation_is_the_calibrated_one() -> None:
    calibration = replace(CALIBRATION, truncation_psi=0.7)
    assert gate_of(replace(MODEL, calibration=calibration), SampleOptions()).truncation_psi == 0.7
    assert gate_of(replace(MODEL, calibration=None), SampleOptions(max_js=3.0)).truncation_psi == 1.0


def test_the_ends_of_a_range_can_be_asked_for() -> None:
    for psi in (0.0, 2.0):
        assert gate_of(MODEL, SampleOptions(truncation_psi=psi, max_js=0.0)) == Gate(psi, 0.0, "")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (SampleOptions(truncation_psi=math.nan), "truncation_psi: nan is out of range; give 0 to 2"),
        (SampleOptions(truncation_psi=-0.1), "truncation_psi: -0.1 is out of range; give 0 to 2"),
        (SampleOptions(truncation_psi=2.1), "truncation_psi: 2.1 is out of range; give 0 to 2"),
        (SampleOptions(truncation_psi=2.1, max_js=1.0), "truncation_psi: 2.1 is out of range; give 0 to 2"),
        (SampleOptions(truncation_psi=math.inf, max_js=1.0), "truncation_psi: inf is out of range; give 0 to 2"),
        (SampleOptions(max_js=-1.0), "max_js: -1.0 is not a JS score; give nats, at least 0"),
        (SampleOptions(max_js=math.inf), "max_js: inf is not a JS score; give nats, at least 0"),
        (SampleOptions(max_js=math.nan), "max_js: nan is not a JS score; give nats, at least 0"),
        (SampleOptions(max_js=1.0, max_quantile=0.5), "max_js: give max_js or max_quantile, not both"),
        (SampleOptions(max_quantile=0.0), "max_quantile: 0.0 is out of range; give above 0 and at most 1"),
        (SampleOptions(max_quantile=1.1), "max_quantile: 1.1 is out of range; give above 0 and at most 1"),
        (SampleOptions(max_quantile=math.nan), "max_quantile: nan is out of range; give above 0 and at most 1"),
    ],
)
def test_bad_options_name_their_field(options: SampleOptions, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        gate_of(MODEL, options)
    assert str(caught.value) == problem
    assert caught.value.metadata == {"field": problem.partition(":")[0]}


def test_a_threshold_is_never_applied_where_it_was_not_measured() -> None:
    with pytest.raises(Uncalibrated, match=r"truncation_psi: 0.7 was not calibrated, only 1; give max_js"):
        gate_of(MODEL, SampleOptions(truncation_psi=0.7))
    with pytest.raises(Uncalibrated, match="max_js: model 'faces' is not calibrated") as caught:
        gate_of(replace(MODEL, calibration=None), SampleOptions())
    assert caught.value.metadata == {"field": "max_js"}


def test_a_threshold_is_never_applied_to_mixed_samples() -> None:
    mixed = SampleOptions(style_seed=1, crossover=7)
    for options in (mixed, replace(mixed, max_quantile=1.0)):
        with pytest.raises(Uncalibrated, match=r"crossover: mixed samples .* threshold, 179\.91 \(see GetModel\)"):
            gate_of(MODEL, options)
    assert gate_of(MODEL, replace(mixed, max_js=CALIBRATION.threshold)) == Gate(1.0, CALIBRATION.threshold, "")


def test_mixing_takes_a_style_seed_and_a_layer() -> None:
    assert mixing_of(MODEL, SampleOptions()) is None
    for crossover in (1, MODEL.num_ws - 1):
        assert mixing_of(MODEL, SampleOptions(style_seed=0, crossover=crossover)) == Mixing(0, crossover)


def test_a_batch_mixes_by_seed_or_as_a_whole() -> None:
    assert mixings_of(MODEL, SampleOptions(), (), count=2) == (None, None)
    assert mixings_of(MODEL, SampleOptions(style_seed=5, crossover=3), (), count=2) == (Mixing(5, 3), Mixing(5, 3))
    assert mixings_of(MODEL, SampleOptions(crossover=3), (5, 6), count=2) == (Mixing(5, 3), Mixing(6, 3))


@pytest.mark.parametrize(
    ("options", "style_seeds", "problem"),
    [
        (SampleOptions(style_seed=1), (), "crossover: missing; .*: model 'faces' has 12 layers, give 1 to 11"),
        (SampleOptions(crossover=7), (), "style_seed: missing; a crossover needs a style seed"),
        (SampleOptions(style_seed=SEED_END, crossover=7), (), "style_seed: 4294967296 is out of range"),
        (SampleOptions(style_seed=1, crossover=0), (), "crossover: 0 is out of range; .*, give 1 to 11"),
        (SampleOptions(style_seed=1, crossover=-1), (), "crossover: -1 is out of range"),
        (SampleOptions(style_seed=1, crossover=12), (), "crossover: 12 is out of range"),
        (SampleOptions(), (1, 2), "crossover: missing"),
        (SampleOptions(crossover=12), (1, 2), "crossover: 12 is out of range"),
        (SampleOptions(crossover=7), (1,), "style_seeds: 1 given for 2 seeds"),
        (SampleOptions(crossover=7), (1, 2, 3), "style_seeds: 3 given for 2 seeds"),
        (SampleOptions(crossover=7), (1, -2), "style_seeds: -2 is out of range"),
        (SampleOptions(style_seed=1, crossover=7), (1, 2), "style_seed: give style_seed .* or style_seeds, not both"),
    ],
)
def test_bad_mixings_name_their_field(options: SampleOptions, style_seeds: tuple[int, ...], problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        mixings_of(MODEL, options, style_seeds, count=2)
    assert re.match(problem, str(caught.value))
    assert caught.value.metadata == {"field": problem.partition(":")[0]}


def test_a_group_is_one_shape_in_any_style() -> None:
    group = group_id(MODEL, 7, Mixing(1, 6), truncation_psi=1.0)
    assert len(group) == 16 and int(group, 16) >= 0
    assert group_id(MODEL, 7, Mixing(2, 6), truncation_psi=1.0) == group
    others = {
        group_id(MODEL, 8, Mixing(1, 6), truncation_psi=1.0),
        group_id(MODEL, 7, Mixing(1, 7), truncation_psi=1.0),
        group_id(MODEL, 7, Mixing(1, 6), truncation_psi=0.7),
        group_id(replace(MODEL, digest="e" * 64), 7, Mixing(1, 6), truncation_psi=1.0),
    }
    assert len(others | {group}) == 5


def test_a_window_has_a_default_and_a_bound() -> None:
    assert [window_of(window, 64) for window in (0, 1, 64)] == [8, 1, 64]
    assert window_of(0, 4) == 4
    for window in (-1, 65):
        with pytest.raises(InvalidRequest, match=f"window: {window} is out of range; give 1 to 64, or 0"):
            window_of(window, 64)


def test_only_wanted_outputs_are_asked_for_and_the_score_always() -> None:
    keypoints = replace(MODEL, task=KEYPOINTS)
    assert SampleOptions().outputs(MODEL) == ("image", "label", "js_score")
    assert SampleOptions(omit_image=True).outputs(keypoints) == ("keypoints", "confidence", "js_score")
    assert SampleOptions(omit_label=True, include_js_map=True).outputs(keypoints) == ("image", "js_map", "js_score")
    assert SampleOptions(omit_image=True, omit_label=True).outputs(MODEL) == ("js_score",)


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_cover_the_walk_once(shards: int) -> None:
    walks = [list(islice(Walk(100, k, shards).seeds(), 50)) for k in range(shards)]
    for k, seeds in enumerate(walks):
        assert all(seed % shards == k and seed >= 100 for seed in seeds)
    together = sorted(seed for seeds in walks for seed in seeds)
    assert together[:50] == list(range(100, 150))


def test_a_walk_ends_at_the_last_seed() -> None:
    assert list(Walk(SEED_END - 2).seeds()) == [SEED_END - 2, SEED_END - 1]
    assert list(Walk(SEED_END).seeds()) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((SEED_END + 1,), "start_seed: 4294967297 is out of range; seeds are 0 to 4294967295"),
        ((0, 0, 0), "shard_count: 0 is not a number of shards; give at least 1"),
        ((0, 2, 2), "shard_index: 2 is out of range; give 0 to 1"),
        ((0, -1, 2), "shard_index: -1 is out of range; give 0 to 1"),
    ],
)
def test_bad_walks_name_their_field(arguments: tuple[int, ...], problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Walk(*arguments)
    assert str(caught.value) == problem
    assert caught.value.metadata == {"field": problem.partition(":")[0]}


def test_a_label_image_is_asked_only_of_a_model_that_has_one() -> None:
    check_has_label(MODEL, "model", "request the JSON")
    with pytest.raises(InvalidRequest, match="'faces' has task 'keypoints' and no label image; request the") as caught:
        check_has_label(replace(MODEL, task=KEYPOINTS), "model", "request the JSON")
    assert caught.value.metadata == {"field": "model"}


def test_each_class_has_the_gate_that_was_measured_on_it() -> None:
    for index, calibration in ((0, CATS), (1, DOGS)):
        gate = gate_of(CONDITIONAL, SampleOptions(class_index=index))
        assert gate == Gate(calibration.truncation_psi, calibration.threshold, calibration.id)
        tight = gate_of(CONDITIONAL, SampleOptions(class_index=index, max_quantile=0.5))
        assert tight == Gate(calibration.truncation_psi, calibration.score_at(0.5), calibration.id)
    with pytest.raises(Uncalibrated, match=r"truncation_psi: 1 was not calibrated, only 0\.75"):
        gate_of(CONDITIONAL, SampleOptions(class_index=1, truncation_psi=1.0))
    for options in (SampleOptions(class_index=2), SampleOptions(class_index=2, max_quantile=0.5)):
        with pytest.raises(Uncalibrated) as caught:
            gate_of(CONDITIONAL, options)
        assert str(caught.value) == (
            "max_js: class 2 (fox) of model 'kinds' is not calibrated; give max_js or run "
            "`labelmint calibrate kinds --class-index 2 --executor onnxruntime`"
        )
    assert gate_of(CONDITIONAL, SampleOptions(class_index=2, max_js=3.0)) == Gate(1.0, 3.0, "")


@pytest.mark.parametrize("options", [SampleOptions(), SampleOptions(max_js=3.0)])
def test_a_class_is_required_of_a_model_that_has_classes_and_refused_for_others(options: SampleOptions) -> None:
    classes = "model 'kinds' has 3 generator classes, give 0 (cat) to 2 (fox) (see GetModel)"
    for model, class_index, problem in (
        (CONDITIONAL, None, f"missing; {classes}"),
        (CONDITIONAL, 3, f"3 is out of range; {classes}"),
        (CONDITIONAL, -1, f"-1 is out of range; {classes}"),
        (MODEL, 0, "model 'faces' has no generator classes; leave it unset"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            terms_of(model, replace(options, class_index=class_index))
        assert str(caught.value) == f"class_index: {problem}"
        assert caught.value.metadata == {"field": "class_index"}


def test_a_description_may_be_asked_for_without_a_class() -> None:
    for model, class_index in ((MODEL, None), (CONDITIONAL, None), (CONDITIONAL, 0), (CONDITIONAL, 2)):
        check_class(model, class_index, required=False)
    for model, class_index in ((MODEL, 0), (CONDITIONAL, 3)):
        with pytest.raises(InvalidRequest, match="class_index: "):
            check_class(model, class_index, required=False)


def test_the_group_of_a_model_without_classes_is_what_it_was() -> None:
    assert group_id(MODEL, 7, Mixing(1, 6), truncation_psi=1.0) == "d594548e87d66a90"
    groups = {group_id(MODEL, 7, Mixing(1, 6), truncation_psi=1.0, class_index=index) for index in (None, 0, 1)}
    assert len(groups) == 3
    assert group_id(MODEL, 7, Mixing(1, 6), truncation_psi=1.01) not in groups, "1.0 and class 1"
