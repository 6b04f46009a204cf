"""Left and right in the names of keypoints: the image's in a model, the person's in COCO. Pure functions.

Rules of this file:
- Whole words only: `left_eye` changes sides, `cleft` does not.
"""

from __future__ import annotations

import re

SIDES = "left and right in the names of keypoints are the person's, as COCO has them; the model's are the image's"
_OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}


def of_the_person(keypoint: str) -> str:
    """The name of a keypoint with the sides of the person, who looks at the camera, in place of the image's."""
    return re.sub("[A-Za-z]+", lambda word: _OTHER_SIDE.get(word[0], word[0]), keypoint)
