"""Connects keypoints to a skeleton by the names of their body parts, as COCO does. Pure functions.

Rules of this file:
- A skeleton is only for drawing. So names that tell no part of the body give no connection, and no error.
- A name tells its part by a whole word, and its side by the word left or right: `left_mouth_corner` is a left mouth.
  Parts that have several keypoints on one side are not connected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Those of COCO's persons, and the mouth of faces. Each holds on either side; a part without a side goes with both.
_LIMBS = (
    ("ankle", "knee"),
    ("knee", "hip"),
    ("hip", "shoulder"),
    ("shoulder", "elbow"),
    ("elbow", "wrist"),
    ("shoulder", "ear"),
    ("ear", "eye"),
    ("eye", "nose"),
    ("nose", "mouth"),
)
# These are also connected across the body.
_PAIRS = ("hip", "shoulder", "eye", "mouth")
_PARTS = {part for limb in _LIMBS for part in limb}


def skeleton(names: Sequence[str]) -> list[list[int]]:
    """Return the connected pairs of keypoints, by their numbers from 1, as COCO has them."""
    told = [_part_and_side(name) for name in names]
    places = {part_and_side: number for number, part_and_side in enumerate(told, 1) if told.count(part_and_side) == 1}
    connections = [((part, "left"), (part, "right")) for part in _PAIRS]
    for one, other in _LIMBS:
        connections += [
            ((one, a), (other, b)) for a in ("left", "right", "") for b in ("left", "right", "") if _fit(a, b)
        ]
    return sorted(
        sorted((places[begin], places[end])) for begin, end in connections if begin in places and end in places
    )


def _fit(side: str, other: str) -> bool:
    """Whether parts of these two sides belong to the same side of a body."""
    return side == other or not side or not other


def _part_and_side(name: str) -> tuple[str, str]:
    words = re.findall("[a-z]+", name.lower())
    part = next((word for word in words if word in _PARTS), "")
    return part, next((word for word in words if word in ("left", "right")), "")
