"""Swaps left and right in keypoint names: a model names the image's sides, COCO the person's. Pure functions.

Rules of this file:
- Only whole words are swapped: `left_eye` becomes `right_eye`, but `cleft` stays.
"""

from __future__ import annotations

import re

SIDES = "left and right in keypoint names are the person's, as COCO defines them; the model's own names use the image's"
_OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}


def of_the_person(keypoint: str) -> str:
    """Return a keypoint's name with the sides of the person, who faces the camera, instead of those of the image."""
    return re.sub("[A-Za-z]+", lambda word: _OTHER_SIDE.get(word[0], word[0]), keypoint)
