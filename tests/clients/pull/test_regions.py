"""Polygons, run lengths, areas and boxes of the same regions say the same, to the pixel."""

import numpy as np
import pytest
from pycocotools import mask as run_lengths
from scipy import ndimage

from labelmint_client.pull.regions import regions
from tests.support.labels import noise

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("side", "grain", "classes"), [(16, 0.5, 3), (64, 0.7, 4), (64, 0.0, 2), (128, 2.0, 6)])
def test_all_forms_agree(side: int, grain: float, classes: int) -> None:
    """On noise: specks, holes in holes, regions that touch at corners only."""
    label = noise(side, grain, classes)
    covered = np.zeros((side, side), int)
    pieces = 0
    for region in regions(label, range(1, classes)):
        mask = run_lengths.decode(region.run_lengths)
        drawn = run_lengths.merge(run_lengths.frPyObjects(region.polygons, side, side))
        assert np.array_equal(run_lengths.decode(drawn), mask)
        assert run_lengths.toBbox(drawn).tolist() == region.box and int(mask.sum()) == region.area
        assert (label[mask == 1] == region.class_id).all()
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1
        covered += mask
        pieces += len(region.polygons)
    assert np.array_equal(covered, (label > 0) & (label < 255)) and pieces > classes


def test_a_ring_is_cut_where_its_hole_begins() -> None:
    label = np.zeros((5, 5), np.uint8)
    label[1:4, 1:4] = 1
    label[2, 2] = 0
    (ring,) = regions(label, range(1, 2))
    assert ring.area == 8 and ring.box == [1, 1, 3, 3]
    left, right = sorted(ring.polygons, key=len)
    assert left == [1, 1, 1, 4, 2, 4, 2, 1] and len(right) == 16


def test_an_image_of_background_has_no_region() -> None:
    assert list(regions(np.zeros((4, 4), np.uint8), range(1, 3))) == []
