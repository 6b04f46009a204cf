"""Outlines describe exactly the pixels of a label, for every way of drawing a polygon."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as run_lengths
from scipy import ndimage

from labelmint_client.pull.outlines import outlines
from tests.support.labels import noise

pytestmark = pytest.mark.unit

Line = list[tuple[float, float]]


def pillow(line: Line, side: int) -> np.ndarray:
    """As labelme and `labelmint fit` draw it: with its border."""
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).polygon(line, fill=1, outline=1)
    return np.asarray(picture)


def pycocotools(line: Line, side: int) -> np.ndarray:
    """The pixels whose centres are inside."""
    return run_lengths.decode(run_lengths.frPyObjects([np.ravel(line).tolist()], side, side))[..., 0]


@pytest.mark.parametrize("draw", [pillow, pycocotools])
@pytest.mark.parametrize(("side", "grain", "classes"), [(16, 0.5, 3), (64, 0.7, 4), (64, 0.0, 2), (128, 2.0, 6)])
def test_a_label_is_drawn_again_to_the_pixel(draw, side: int, grain: float, classes: int) -> None:  # type: ignore[no-untyped-def]
    """On noise: specks, holes in holes, parts that touch at corners only. One part is never two lines."""
    label = noise(side, grain, classes)
    found = list(outlines(label, range(1, classes)))
    assert len(found) == sum(ndimage.label(label == class_id)[1] for class_id in range(1, classes))
    covered = np.zeros((side, side), int)
    for class_id, line in found:
        drawn = draw(line, side)
        assert ndimage.label(drawn)[1] == 1 and (label[drawn == 1] == class_id).all()
        covered += drawn
    assert np.array_equal(covered, (label > 0) & (label < 255))


def test_the_box_of_an_outline_is_that_of_its_pixels() -> None:
    """YOLO takes its boxes from the polygons."""
    label = noise(64, 0.7, 3)
    for class_id, line in outlines(label, range(1, 3)):
        rows, columns = np.nonzero(pillow(line, 64))
        assert (label[rows, columns] == class_id).all()
        low, high = np.min(line, 0), np.max(line, 0)
        assert np.allclose(low, (columns.min(), rows.min()), atol=0.011)
        assert np.allclose(high, (columns.max() + 1, rows.max() + 1), atol=0.011)


def test_a_pixel_and_a_ring() -> None:
    label = np.zeros((5, 5), np.uint8)
    label[4, 0] = 2
    label[1:4, 1:4] = 1
    label[2, 2] = 0
    (one, ring), (two, pixel) = outlines(label, range(1, 3))
    assert (one, two) == (1, 2)
    assert sorted(pixel) == [(0.01, 4.01), (0.01, 4.99), (0.99, 4.01), (0.99, 4.99)]
    # Around the ring, to the hole and back in the row above it.
    assert (
        ring[0] == (1.01, 1.01) and ring.count((1.01, 1.99)) == 2 and ring.count((1.99, 1.99)) == 2 and len(ring) == 11
    )


def test_holes_are_visited_on_the_way() -> None:
    """The line goes up on the left side of a part. It leaves it for the lower hole first, and never goes back."""
    label = np.ones((9, 3), np.uint8)
    label[[2, 6], 1] = 0
    ((_, line),) = outlines(label, range(1, 2))
    left = [y for x, y in line if x == 0.01]
    assert left == [0.01, 8.99, 5.99, 5.99, 1.99, 1.99]


def test_a_row_of_many_holes() -> None:
    """Each is reached from the one before."""
    label = np.ones((3, 8001), np.uint8)
    label[1, 1::2] = 255
    ((_, line),) = outlines(label, range(1, 2))
    assert len(line) == 4 + 4000 * 7


def test_background_has_no_outline() -> None:
    assert list(outlines(np.zeros((4, 4), np.uint8), range(1, 3))) == []
