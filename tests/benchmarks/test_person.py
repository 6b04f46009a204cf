"""The simulated person draws inside the parts, a little beside them, and where the prediction is wrong."""

import numpy as np
import pytest
from annotate import person
from annotate.person import Drawing, depth

from labelmint.models.annotations import UNDRAWN

pytestmark = pytest.mark.torch


def scene() -> np.ndarray:
    """A disc (1) with a thin ring (2) around it, on a background (0), uint8 [128,128]."""
    y, x = np.mgrid[:128, :128]
    radius = np.hypot(y - 60, x - 68)
    return np.select([radius < 28, radius < 30], [1, 2], 0).astype(np.uint8)


def drawn(look: object = None, seed: int = 0) -> Drawing:
    drawing = Drawing(scene(), seed)
    drawing.draw(look or (lambda mask: scene()))  # type: ignore[arg-type]
    return drawing


def test_one_stroke_in_each_part_where_nothing_is_wrong() -> None:
    drawing = drawn()
    assert [stroke["class"] for stroke in drawing.strokes] == [0, 1, 2]
    marked = drawing.mask != UNDRAWN
    assert 0 < (drawing.mask != scene())[marked].mean() < 0.1 or (drawing.mask == scene())[marked].all()
    assert drawing.seconds >= 3 * person.SECONDS + person.ZOOM_SECONDS  # in the ring, the person zooms in


def test_draws_where_the_prediction_is_wrong_until_it_is_right() -> None:
    wrong = scene()
    wrong[:8] = 1  # the upper edge of the background

    def look(mask: np.ndarray) -> np.ndarray:
        return scene() if (mask[:8] == 0).sum() > 40 else wrong

    drawing = drawn(look)
    later = drawing.strokes[3:]
    assert later and all(stroke["class"] == 0 for stroke in later)
    assert all(y < 11 for stroke in later for _, y in stroke["points"])


def test_stops_at_the_bounds() -> None:
    drawing = drawn(lambda mask: np.full_like(mask, 3))
    assert 0.05 < (drawing.mask != UNDRAWN).mean() <= person.SHARE
    assert len(drawing.strokes) < person.STROKES + person.AT_ONCE


def test_an_unsteady_hand_undoes_and_needs_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = drawn()
    monkeypatch.setattr(person, "HAND", 6.0)
    unsteady = drawn()
    assert len(unsteady.strokes) <= len(steady.strokes) and unsteady.seconds > steady.seconds


def test_the_same_seed_draws_the_same() -> None:
    assert drawn(seed=3).strokes == drawn(seed=3).strokes != drawn(seed=4).strokes


def test_depth() -> None:
    area = np.zeros((9, 9), bool)
    area[2:7, 2:7] = True
    assert depth(area)[4].tolist() == [0, 0, 1, 2, 3, 2, 1, 0, 0]
