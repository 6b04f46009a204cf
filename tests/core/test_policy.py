"""Tests of the gateway's decisions, which are pure functions."""

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from labelmint.core.calibration import Calibration, calibrate
from labelmint.core.errors import InvalidRequest, Uncalibrated
from labelmint.core.policy import (
    SEED_END,
    Gate,
    Mixing,
    SampleOptions,
    Walk,
    check_batch,
    check_seed,
    gate_of,
    group_id,
    latent_of,
    mixing_of,
    mixings_of,
    window_of,
)
from labelmint.core.task import KEYPOINTS
from tests.support.served import CALIBRATION, MODEL

pytestmark = pytest.mark.unit


def test_latent_is_the_official_one() -> None:
    latent = latent_of(7, 64)
    assert latent.dtype == np.float32 and latent.shape == (1, 64)
    np.testing.assert_array_equal(latent, np.random.RandomState(7).randn(1, 64).astype(np.float32))
    assert latent_of(SEED_END - 1, 4).shape == (1, 4)


@pytest.mark.parametrize("seed", [-1, SEED_END])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(InvalidRequest, match=r"seed: .* is out of range; seeds are 0 to 4294967295"):
        check_seed(seed)


@pytest.mark.parametrize("count", [0, 65])
def test_batch_size_is_bounded(count: int) -> None:
    with pytest.raises(InvalidRequest, match=r"seeds: \d+ given; a batch takes 1 to 64"):
        check_batch(range(count))


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
    assert tight.calibration_id == CALIBRATION.id


def test_max_js_needs_no_calibration() -> None:
    gate = gate_of(replace(MODEL, calibration=None), SampleOptions(truncation_psi=0.7, max_js=3.0))
    assert gate == Gate(0.7, 3.0, "")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (SampleOptions(truncation_psi=math.nan), "truncation_psi"),
        (SampleOptions(truncation_psi=-0.1), "truncation_psi"),
        (SampleOptions(truncation_psi=2.1), "truncation_psi"),
        (SampleOptions(max_js=-1.0), "max_js"),
        (SampleOptions(max_js=math.inf), "max_js"),
        (SampleOptions(max_js=1.0, max_quantile=0.5), "max_js"),
        (SampleOptions(max_quantile=0.0), "max_quantile"),
        (SampleOptions(max_quantile=1.1), "max_quantile"),
        (SampleOptions(max_quantile=math.nan), "max_quantile"),
    ],
)
def test_bad_options_name_their_field(options: SampleOptions, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        gate_of(MODEL, options)
    assert caught.value.metadata == {"field": field}


def test_a_threshold_is_never_applied_where_it_was_not_measured() -> None:
    with pytest.raises(Uncalibrated, match=r"truncation_psi: 0.7 was not calibrated, only 1; give max_js"):
        gate_of(MODEL, SampleOptions(truncation_psi=0.7))
    with pytest.raises(Uncalibrated, match="model 'faces' is not calibrated"):
        gate_of(replace(MODEL, calibration=None), SampleOptions())


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
    ("options", "style_seeds", "field"),
    [
        (SampleOptions(style_seed=1), (), "crossover"),
        (SampleOptions(crossover=7), (), "style_seed"),
        (SampleOptions(style_seed=SEED_END, crossover=7), (), "style_seed"),
        (SampleOptions(style_seed=1, crossover=0), (), "crossover"),
        (SampleOptions(style_seed=1, crossover=-1), (), "crossover"),
        (SampleOptions(style_seed=1, crossover=12), (), "crossover"),
        (SampleOptions(), (1, 2), "crossover"),
        (SampleOptions(crossover=12), (1, 2), "crossover"),
        (SampleOptions(crossover=7), (1,), "style_seeds"),
        (SampleOptions(crossover=7), (1, 2, 3), "style_seeds"),
        (SampleOptions(crossover=7), (1, -2), "style_seeds"),
        (SampleOptions(style_seed=1, crossover=7), (1, 2), "style_seed"),
    ],
)
def test_bad_mixings_name_their_field(options: SampleOptions, style_seeds: tuple[int, ...], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        mixings_of(MODEL, options, style_seeds, count=2)
    assert caught.value.metadata == {"field": field}


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
    ("arguments", "field"),
    [((SEED_END + 1,), "start_seed"), ((0, 0, 0), "shard_count"), ((0, 2, 2), "shard_index")],
)
def test_bad_walks_name_their_field(arguments: tuple[int, ...], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Walk(*arguments)
    assert caught.value.metadata == {"field": field}


def test_calibration_survives_json_and_names_itself() -> None:
    again = Calibration.from_json(CALIBRATION.to_json())
    assert again == CALIBRATION and again.id == CALIBRATION.id
    assert replace(CALIBRATION, truncation_psi=0.7).id != CALIBRATION.id
    assert CALIBRATION.threshold == pytest.approx(0.9 * 199.9)


def test_calibration_refuses_too_few_seeds_and_broken_quantiles() -> None:
    with pytest.raises(ValueError, match="at least 1000 seeds, not 999"):
        calibrate([0.0] * 999, model_digest="", score_kind="sum", truncation_psi=1.0, first_seed=0)
    with pytest.raises(ValueError, match="finite and ascending"):
        replace(CALIBRATION, quantiles=CALIBRATION.quantiles[::-1])
