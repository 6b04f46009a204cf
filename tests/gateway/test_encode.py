"""Encoders, read back with real readers."""

import io

import numpy as np
import pytest
from PIL import Image

from labelmint.gateway import encode
from labelmint.gateway.policy import Gate
from labelmint.gateway.sampling import Sample
from tests.gateway.test_policy import MODEL


@pytest.fixture
def sample() -> Sample:
    rng = np.random.default_rng(0)
    return Sample(
        model=MODEL,
        seed=7,
        gate=Gate(1.0, 5.0, "c"),
        image=rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
        label=rng.integers(0, 2, (8, 8), dtype=np.uint8),
        js_map=rng.random((8, 8), dtype=np.float32),
        js_score=3.0,
    )


def test_image_returns_exactly(sample: Sample) -> None:
    picture = Image.open(io.BytesIO(encode.image_png(sample)))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), sample.image)


def test_label_indices_are_class_ids_and_colours_the_palette(sample: Sample) -> None:
    picture = Image.open(io.BytesIO(encode.label_png(sample)))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), sample.label)
    colours = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(colours, np.asarray(MODEL.palette, np.uint8)[sample.label])


def test_npz_returns_exactly_and_has_no_time_stamp(sample: Sample) -> None:
    data = encode.npz(sample)
    assert data == encode.npz(sample)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["image"], sample.image)
        np.testing.assert_array_equal(arrays["label"], sample.label)
        np.testing.assert_array_equal(arrays["js_map"], sample.js_map)
        assert arrays["js_score"] == 3.0 and arrays["threshold"] == 5.0 and arrays["seed"] == 7


def test_pictures_for_people_are_two_panels_with_a_caption(sample: Sample) -> None:
    for encoder in (encode.overlay_png, encode.uncertainty_png):
        data = encoder(sample)
        assert data == encoder(sample)
        width, height = Image.open(io.BytesIO(data)).size
        assert width > 1.5 * height and height > 400


def test_heat_runs_from_dark_to_bright() -> None:
    colours = encode.heat_colours(np.array([0.0, 0.2, 0.4, encode.MAX_JS, 9.0])).astype(int).sum(axis=1)
    assert list(colours) == sorted(colours)
    assert colours[-1] == colours[-2]
