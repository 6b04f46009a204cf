"""Pictures for people: things are drawn in the right place, and one sample always yields the same picture."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from labelmint.core.heat import MAX_JS, heat_colours
from labelmint.gateway.encoding.people import overlay_png, uncertainty_png
from labelmint.gateway.sampling.sample import Sample
from tests.support.samples import marked, segmented

pytestmark = pytest.mark.unit


@pytest.fixture
def sample() -> Sample:
    return segmented()


def test_keypoints_are_drawn_where_they_are(sample: Sample) -> None:
    picture = np.asarray(Image.open(io.BytesIO(overlay_png(marked(sample, "crown")))))
    # The second of two panels of 384 pixels. Each of the 8x8 pixels is 48 wide; margins are 12, the title is 40.
    panel = picture[40 : 40 + 384, 12 + 384 + 12 :][:, :384]
    assert tuple(panel[int(2.5 * 48), int(1.5 * 48)]) == (255, 0, 0)
    assert tuple(panel[int(7.5 * 48), int(6.5 * 48)]) == (0, 0, 255)


def test_long_names_have_wider_columns(sample: Sample) -> None:
    """Six long names would overlap in six columns, so they take more lines."""
    heights = []
    for name in ("a", "a name that is much longer than a sixth of the picture"):
        point = marked(sample, name)
        labels = {output: np.repeat(array, 3, 0) for output, array in point.labels.items()}
        model = replace(point.model, label_names=(name,) * 6, palette=((9, 9, 9),) * 6)
        picture = overlay_png(replace(point, model=model, labels=labels))
        heights.append(Image.open(io.BytesIO(picture)).size[1])
    assert heights[0] < heights[1]


def test_pictures_for_people_are_two_panels_with_a_caption(sample: Sample) -> None:
    for encoder in (overlay_png, uncertainty_png):
        data = encoder(sample)
        assert data == encoder(sample)
        width, height = Image.open(io.BytesIO(data)).size
        assert width > 1.5 * height and height > 400


def test_heat_runs_from_dark_to_bright() -> None:
    colours = heat_colours(np.array([0.0, 0.2, 0.4, MAX_JS, 9.0])).astype(int).sum(axis=1)
    assert list(colours) == sorted(colours)
    assert colours[-1] == colours[-2]
