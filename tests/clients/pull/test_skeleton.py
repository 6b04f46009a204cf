"""A skeleton connects what belongs together, whatever else a model's keypoints are called."""

import pytest

from labelmint_client.pull.skeleton import skeleton

pytestmark = pytest.mark.unit

# COCO's keypoints and skeleton of a person, from annotations/person_keypoints_val2017.json.
PAIRED = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
PERSON = ["nose", *(f"{side}_{part}" for part in PAIRED for side in ("left", "right"))]
LIMBS = [[16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10], [9, 11]]
LIMBS += [[2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]


def test_a_person_has_the_skeleton_of_coco() -> None:
    assert skeleton(PERSON) == sorted(sorted(limb) for limb in LIMBS)


def test_names_of_other_forms() -> None:
    names = ("Nose Tip", "eye-LEFT", "right eye", "left_eye_inner_corner", "MOUTH", "leftover", "nosebleed", "wheel 1")
    # Two left eyes: neither is connected. The mouth has no side, and there is one.
    assert skeleton(names) == [[1, 3], [1, 5]]


def test_keypoints_of_no_body_have_none() -> None:
    assert skeleton(["front wheel", "rear wheel", "1", ""]) == []
