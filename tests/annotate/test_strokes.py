"""Strokes and the masks that they give."""

import numpy as np
import pytest
from pydantic import ValidationError

from labelmint.annotate.strokes import STROKES, area_of, mask_of, region_at, runs_of
from labelmint.core.errors import InvalidRequest
from labelmint.models.annotations import UNDRAWN

pytestmark = pytest.mark.torch


def drawn(*strokes: dict[str, object], resolution: int = 16) -> np.ndarray:
    return mask_of(STROKES.validate_python(list(strokes)), resolution)


def test_a_brush_covers_the_pixels_within_its_radius_of_its_line() -> None:
    mask = drawn({"tool": "brush", "class": 3, "radius": 2, "points": [[3, 5], [10, 5]]})
    y, x = np.mgrid[:16, :16]
    nearest = np.clip(x, 3, 10)
    assert np.array_equal(mask == 3, np.hypot(x - nearest, y - 5) <= 2)
    assert set(np.unique(mask)) == {3, UNDRAWN}


def test_a_line_is_whole_however_few_points_it_has() -> None:
    few = drawn({"tool": "brush", "class": 1, "radius": 1, "points": [[2, 2], [13, 9]]})
    many = [[2 + 11 * share, 2 + 7 * share] for share in np.linspace(0, 1, 200)]
    assert np.array_equal(few, drawn({"tool": "brush", "class": 1, "radius": 1, "points": many}))


def test_a_click_is_a_disc_and_the_image_bounds_it() -> None:
    assert (drawn({"tool": "brush", "class": 0, "radius": 0.5, "points": [[4, 4]]}) == 0).sum() == 1
    assert (drawn({"tool": "brush", "class": 0, "radius": 2.3, "points": [[-1, -1]]}) == 0).sum() == 3
    assert (drawn({"tool": "brush", "class": 0, "radius": 2, "points": [[40, 40]]}) == 0).sum() == 0


def test_later_strokes_cover_earlier_ones_and_the_eraser_undraws() -> None:
    first = {"tool": "brush", "class": 1, "radius": 3, "points": [[8, 8]]}
    second = {"tool": "brush", "class": 2, "radius": 1, "points": [[8, 8]]}
    mask = drawn(first, second)
    assert mask[8, 8] == 2 and mask[8, 10] == 1
    mask = drawn(first, {"tool": "erase", "radius": 1, "points": [[8, 8]]})
    assert mask[8, 8] == UNDRAWN and mask[8, 10] == 1


def test_a_polygon_has_its_outline() -> None:
    mask = drawn({"tool": "polygon", "class": 1, "points": [[2, 2], [6, 2], [6, 5], [2, 5]]})
    assert (mask == 1).sum() == 20 and (mask[2:6, 2:7] == 1).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_runs_keep_every_region(share: float) -> None:
    area = np.random.default_rng(0).random((9, 9)) < share
    runs = runs_of(area)
    assert np.array_equal(area_of(runs, 9), area) and sum(runs) == 81
    mask = drawn({"tool": "mask", "class": 4, "source": "png", "region": runs}, resolution=9)
    assert np.array_equal(mask == 4, area)


def test_runs_that_are_not_of_the_image_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="add up to 80 pixels, not to 81"):
        area_of([40, 40], 9)


def test_a_region_is_connected_by_sides() -> None:
    label = np.zeros((5, 5), np.uint8)
    label[0, 0] = label[1, 1] = label[1, 2] = label[2, 2] = 1
    assert region_at(label, 1.4, 1.4).sum() == 3
    assert region_at(label, 0, 0).sum() == 1
    assert not region_at(label, 4, 4)[0, 0]
    with pytest.raises(InvalidRequest, match="outside"):
        region_at(label, 5, 0)


@pytest.mark.parametrize(
    "stroke",
    [
        {"tool": "brush", "class": 255, "radius": 1, "points": [[0, 0]]},
        {"tool": "brush", "class": 1, "radius": 0, "points": [[0, 0]]},
        {"tool": "brush", "class": 1, "radius": 1, "points": []},
        {"tool": "brush", "class": 1, "radius": 1, "points": [[0, float("nan")]]},
        {"tool": "brush", "class": 1, "radius": 1, "points": [[0, 1e9]]},
        {"tool": "polygon", "class": 1, "points": [[0, 0], [1, 1]]},
        {"tool": "mask", "class": 1, "source": "png", "region": [-1, 2]},
        {"tool": "stamp", "class": 1},
    ],
)
def test_what_is_not_a_stroke_is_refused(stroke: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        drawn(stroke)
