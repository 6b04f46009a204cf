"""Encoders, read back with real readers."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from labelmint.core.policy import Gate, Mixing
from labelmint.gateway.encoding import encoders as encode
from labelmint.gateway.sampling.sample import Keypoints, Sample
from tests.gateway.test_policy import MODEL


@pytest.fixture
def sample() -> Sample:
    rng = np.random.default_rng(0)
    return Sample(
        model=MODEL,
        seed=7,
        mixing=None,
        gate=Gate(1.0, 5.0, "c"),
        image=rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
        label=rng.integers(0, 2, (8, 8), dtype=np.uint8),
        keypoints=None,
        js_map=rng.random((8, 8), dtype=np.float32),
        js_score=3.0,
    )


def test_image_returns_exactly(sample: Sample) -> None:
    picture = Image.open(io.BytesIO(encode.image_png(sample)))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), sample.image)


def test_jpeg_keeps_full_chroma_and_has_the_same_bytes_again(sample: Sample) -> None:
    data = encode.image_jpeg(sample)
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "JPEG" and picture.size == (8, 8)
    assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
    assert encode.image_jpeg(sample) == data


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


def marked(sample: Sample, name: str) -> Sample:
    """The sample of a model with two keypoints, the first of that name."""
    model = replace(MODEL, task="keypoints", label_names=(name, "chin"), palette=((255, 0, 0), (0, 0, 255)))
    keypoints = Keypoints(np.array([[1.0, 2.0], [6.0, 7.0]], np.float32), np.array([0.9, 0.4], np.float32))
    return replace(sample, model=model, label=None, keypoints=keypoints)


def test_keypoints_are_drawn_where_they_are(sample: Sample) -> None:
    picture = np.asarray(Image.open(io.BytesIO(encode.overlay_png(marked(sample, "crown")))))
    # The second of two panels of 384 pixels, each pixel of 8x8 being 48: margins 12, title 40.
    panel = picture[40 : 40 + 384, 12 + 384 + 12 :][:, :384]
    assert tuple(panel[int(2.5 * 48), int(1.5 * 48)]) == (255, 0, 0)
    assert tuple(panel[int(7.5 * 48), int(6.5 * 48)]) == (0, 0, 255)


def test_long_names_have_wider_columns(sample: Sample) -> None:
    """Six names that would run into each other in six columns take more lines."""
    heights = []
    for name in ("a", "a name that is much longer than a sixth of the picture"):
        point = marked(sample, name)
        assert point.keypoints is not None
        keypoints = Keypoints(np.repeat(point.keypoints.positions, 3, 0), np.repeat(point.keypoints.confidence, 3))
        model = replace(point.model, label_names=(name,) * 6, palette=((9, 9, 9),) * 6)
        picture = encode.overlay_png(replace(point, model=model, keypoints=keypoints))
        heights.append(Image.open(io.BytesIO(picture)).size[1])
    assert heights[0] < heights[1]


def test_npz_of_keypoints(sample: Sample) -> None:
    with np.load(io.BytesIO(encode.npz(marked(sample, "crown"))), allow_pickle=False) as arrays:
        assert arrays["keypoints"].tolist() == [[1.0, 2.0], [6.0, 7.0]]
        assert arrays["confidence"].tolist() == pytest.approx([0.9, 0.4])
        assert arrays["keypoint_names"].tolist() == ["crown", "chin"]
        assert "label" not in arrays


def test_npz_of_a_mixed_sample_says_so(sample: Sample) -> None:
    mixed = replace(sample, mixing=Mixing(3, 6))
    with np.load(io.BytesIO(encode.npz(mixed)), allow_pickle=False) as arrays:
        assert (arrays["seed"], arrays["style_seed"], arrays["crossover"]) == (7, 3, 6)
        assert str(arrays["group_id"]) == mixed.group_id != ""
    with np.load(io.BytesIO(encode.npz(sample)), allow_pickle=False) as arrays:
        assert not {"style_seed", "crossover", "group_id"}.intersection(arrays)


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
