"""A calibration says what it measured, refuses what no measurement gives, and has an id of its own."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from labelmint.core.calibration import Calibration, calibrate
from labelmint.v1 import sample_service_pb2 as pb
from tests.support.served import CALIBRATION

pytestmark = pytest.mark.unit


def test_a_calibration_states_what_was_measured() -> None:
    scores = [float(score) for score in range(1000, -1, -1)]
    measured = calibrate(scores, model_digest="e" * 64, score_kind="mean", truncation_psi=0.7, first_seed=5)
    assert measured.quantiles == pytest.approx([10.0 * percent for percent in range(101)])
    assert measured == Calibration(
        model_digest="e" * 64,
        score_kind="mean",
        truncation_psi=0.7,
        threshold=measured.quantiles[90],
        threshold_quantile=0.9,
        quantiles=measured.quantiles,
        first_seed=5,
        seed_count=1001,
    )


def test_scores_in_single_precision_are_interpolated_in_double() -> None:
    scores = np.repeat(np.float32([0.1, 1e6]), 500)
    measured = calibrate(scores, model_digest="", score_kind="sum", truncation_psi=1.0, first_seed=0)  # type: ignore[arg-type]
    assert measured.quantiles[50] == (float(np.float32(0.1)) + 1e6) / 2 and type(measured.quantiles[50]) is float


def test_a_thousand_seeds_are_enough_and_fewer_are_not() -> None:
    enough = calibrate([1.0] * 1000, model_digest="", score_kind="sum", truncation_psi=1.0, first_seed=0)
    assert enough.seed_count == 1000 and enough.threshold == 1.0
    with pytest.raises(ValueError, match="at least 1000 seeds, not 999"):
        calibrate([0.0] * 999, model_digest="", score_kind="sum", truncation_psi=1.0, first_seed=0)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("model_digest", None, "a calibration must name the digest and the score kind of a model"),
        ("score_kind", None, "a calibration must name the digest and the score kind of a model"),
        ("truncation_psi", -0.1, "a calibration's truncation_psi must be within 0 and 2, not -0.1"),
        ("truncation_psi", 2.5, "a calibration's truncation_psi must be within 0 and 2, not 2.5"),
        ("truncation_psi", math.nan, "a calibration's truncation_psi must be within 0 and 2, not nan"),
        ("threshold_quantile", 1.5, "a calibration's threshold_quantile must be within 0 and 1, not 1.5"),
        ("first_seed", -1, "a calibration's first_seed must be an integer >= 0, not -1"),
        ("first_seed", 1.5, "a calibration's first_seed must be an integer >= 0, not 1.5"),
        ("first_seed", True, "a calibration's first_seed must be an integer >= 0, not True"),
        ("first_seed", 2**32 + 1, "a calibration's first_seed must be an integer >= 0, not 4294967297"),
        ("seed_count", 999, "a calibration's seed_count must be an integer >= 1000, not 999"),
        ("seed_count", "2000", "a calibration's seed_count must be an integer >= 1000, not '2000'"),
        ("quantiles", CALIBRATION.quantiles[1:], "a calibration must have 101 quantiles, not 100"),
        ("quantiles", CALIBRATION.quantiles[::-1], "calibration quantiles must be finite and ascending"),
        ("quantiles", (*CALIBRATION.quantiles[1:], math.inf), "calibration quantiles must be finite and ascending"),
        ("threshold", math.inf, "a calibration's threshold must be finite, not inf"),
    ],
)
def test_a_value_that_no_measurement_gives_is_refused(field: str, value: object, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(CALIBRATION, **{field: value})  # type: ignore[arg-type]
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("truncation_psi", 0.0),
        ("truncation_psi", 2.0),
        ("threshold_quantile", 0.0),
        ("threshold_quantile", 1.0),
        ("first_seed", 0),
        ("first_seed", 2**32),
        ("seed_count", 1000),
        ("seed_count", 2**32),
        ("quantiles", (3.0,) * 101),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field: str, value: object) -> None:
    assert getattr(replace(CALIBRATION, **{field: value}), field) == value  # type: ignore[arg-type]


def test_a_score_between_two_quantiles_is_interpolated() -> None:
    squares = replace(CALIBRATION, quantiles=tuple(float(percent**2) for percent in range(101)))
    assert [squares.score_at(quantile) for quantile in (0.0, 0.5, 1.0)] == [0.0, 2500.0, 10000.0]
    assert squares.score_at(0.905) == pytest.approx((90**2 + 91**2) / 2)


def test_a_calibration_survives_json() -> None:
    assert Calibration.from_json(CALIBRATION.to_json()) == CALIBRATION


def test_an_id_names_the_content_and_never_changes() -> None:
    constant = replace(CALIBRATION, quantiles=(1.0,) * 101, threshold=1.0)
    assert constant.id == "d83d35527ee0f97a"
    assert replace(constant, truncation_psi=0.7).id != constant.id
    assert list(json.loads(constant.to_json())) == sorted(json.loads(constant.to_json()))


def test_a_description_has_the_fields_of_the_proto() -> None:
    described = CALIBRATION.described()
    assert set(described) == {field.name for field in pb.Calibration.DESCRIPTOR.fields}
    assert described.pop("id") == CALIBRATION.id
    assert described == {name: getattr(CALIBRATION, name) for name in described}
