"""The NumPy archive of a sample, read back with NumPy."""

import io
from dataclasses import replace

import numpy as np
import pytest

from labelmint.core.policy import Mixing
from labelmint.gateway.encoding.archives import npz
from labelmint.gateway.sampling.sample import Sample
from tests.support.samples import marked, segmented

pytestmark = pytest.mark.unit


@pytest.fixture
def sample() -> Sample:
    return segmented()


def test_npz_returns_exactly_and_has_no_time_stamp(sample: Sample) -> None:
    data = npz(sample)
    assert data == npz(sample)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["image"], sample.image)
        np.testing.assert_array_equal(arrays["label"], sample.label)
        np.testing.assert_array_equal(arrays["js_map"], sample.js_map)
        assert arrays["js_score"] == 3.0 and arrays["threshold"] == 5.0 and arrays["seed"] == 7


def test_npz_of_keypoints(sample: Sample) -> None:
    with np.load(io.BytesIO(npz(marked(sample, "crown"))), allow_pickle=False) as arrays:
        assert arrays["keypoints"].tolist() == [[1.0, 2.0], [6.0, 7.0]]
        assert arrays["confidence"].tolist() == pytest.approx([0.9, 0.4])
        assert arrays["keypoint_names"].tolist() == ["crown", "chin"]
        assert "label" not in arrays


def test_npz_of_a_mixed_sample_says_so(sample: Sample) -> None:
    mixed = replace(sample, mixing=Mixing(3, 6))
    with np.load(io.BytesIO(npz(mixed)), allow_pickle=False) as arrays:
        assert (arrays["seed"], arrays["style_seed"], arrays["crossover"]) == (7, 3, 6)
        assert str(arrays["group_id"]) == mixed.group_id != ""
    with np.load(io.BytesIO(npz(sample)), allow_pickle=False) as arrays:
        assert not {"style_seed", "crossover", "group_id"}.intersection(arrays)
