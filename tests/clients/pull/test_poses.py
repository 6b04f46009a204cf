"""Keypoints that were not found are labelled in no format that has only labelled ones."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from labelmint_client.pull import keypoints
from labelmint_client.pull.formats import Written

pytestmark = pytest.mark.unit

MODEL: Any = SimpleNamespace(name="hand", resolution=16, keypoint_names=("left_tip", "right_tip", "wrist"))


def written() -> Written:
    points = [(0.0, 3.0, 0.5), (8.0, 15.0, keypoints.MIN_CONFIDENCE), (7.0, 7.0, 0.0999)]
    named = [
        {"name": name, "x": x, "y": y, "confidence": confidence}
        for name, (x, y, confidence) in zip(MODEL.keypoint_names, points, strict=True)
    ]
    return Written(0, np.zeros((16, 16, 3), np.uint8), None, {"keypoints": named})


def test_yolo() -> None:
    ((class_id, values),) = keypoints.yolo_lines(written(), MODEL)
    assert class_id == 0 and values[:4] == [0.5, 0.5, 1.0, 1.0]
    assert values[4:] == [0.5 / 16, 3.5 / 16, 2, 8.5 / 16, 15.5 / 16, 2, 0, 0, 0]


def test_labelme() -> None:
    shapes = keypoints.labelme_shapes(written(), MODEL)
    assert shapes == [("left_tip", "point", [(0.5, 3.5)]), ("right_tip", "point", [(8.5, 15.5)])]


def test_mds_keeps_all_of_them() -> None:
    values = np.frombuffer(keypoints.mds_value(written())["keypoints"], np.float32)
    assert values.tolist() == np.array([0, 3, 0.5, 8, 15, 0.1, 7, 7, 0.0999], np.float32).tolist()
