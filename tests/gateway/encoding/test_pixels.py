"""The machine-readable image encodings, read back with Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from labelmint.gateway.encoding.pixels import image_jpeg, image_png, label_png
from labelmint.gateway.sampling.sample import Sample
from tests.support.samples import segmented
from tests.support.served import MODEL

pytestmark = pytest.mark.unit


@pytest.fixture
def sample() -> Sample:
    return segmented()


def test_image_returns_exactly(sample: Sample) -> None:
    picture = Image.open(io.BytesIO(image_png(sample)))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), sample.image)


def test_jpeg_keeps_full_chroma_and_has_the_same_bytes_again(sample: Sample) -> None:
    data = image_jpeg(sample)
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "JPEG" and picture.size == (8, 8)
    assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
    assert image_jpeg(sample) == data


def test_label_indices_are_class_ids_and_colours_the_palette(sample: Sample) -> None:
    picture = Image.open(io.BytesIO(label_png(sample)))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), sample.label)
    colours = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(colours, np.asarray(MODEL.palette, np.uint8)[sample.label])
