"""Keypoints as CSV and COCO: what is written comes back, what is wrong is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import read_keypoints, write_keypoints
from labelmint.models.annotations.coco import keypoints_path
from labelmint.models.annotations.keypoints import csv_path
from tests.models.annotations.conftest import edit

pytestmark = pytest.mark.torch


NAMES, PALETTE = ("left_eye", "right_eye", "nose"), ((255, 0, 0), (0, 255, 0), (0, 0, 255))
CSV = "seed,name,x,y\n3,nose,1.5,2\n3,left_eye,-0.5,23.5\n12,right_eye,39.5,0\n12,nose,0,0\n"


def test_what_is_written_comes_back_to_the_bit(annotated: Path) -> None:
    rng = np.random.default_rng(0)
    points = {seed: rng.uniform(0, 23, (3, 3)).astype(np.float32) for seed in (3, 12)}
    for values in points.values():
        values[:, 2] = 2
    points[3][0, 2] = 1  # hidden
    points[3][1] = 0
    write_keypoints(annotated, NAMES, PALETTE, keypoints=points)
    dataset = read_keypoints(annotated, "csv")
    assert dataset.names == NAMES and dataset.palette == PALETTE and dataset.truncation_psi == 1.0
    assert list(dataset.labels) == [3, 12] and dataset.images[3].shape == (24, 40, 3)
    for seed, values in points.items():
        assert dataset.labels[seed].dtype == np.float32
        np.testing.assert_array_equal(dataset.labels[seed], values)


def test_an_image_may_show_none_of_them(annotated: Path) -> None:
    points = {3: np.zeros((3, 3), np.float32), 12: np.ones((3, 3), np.float32)}
    write_keypoints(annotated, NAMES, PALETTE, keypoints=points)
    assert read_keypoints(annotated, "csv").labels[3].tolist() == np.zeros((3, 3)).tolist()


def test_a_csv_by_hand(annotated: Path) -> None:
    csv_path(annotated).write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode() + b"\r\n")
    points = read_keypoints(annotated, "csv").labels
    assert points[3].tolist() == [[-0.5, 23.5, 2], [0, 0, 0], [1.5, 2, 2]]
    assert points[12].tolist() == [[0, 0, 0], [39.5, 0, 2], [0, 0, 2]]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("seed,name", "name,seed", "has the header 'name,seed,x,y'; it must be seed,name,x,y"),
        (CSV, "", "has the header ''"),
        ("3,nose", "3,nase", r"line 2 \('nase'\) has an unknown name; known names are left_eye, right_eye, nose"),
        ("3,nose", "4,nose", r"line 2 \('nose'\) has seed 4, which dataset.json does not list"),
        ("3,nose", "three,nose", r"line 2 \('nose'\) has a value that is not a number: .*'three'"),
        ("3,left_eye", "3,nose", r"line 3 \('nose'\) is a duplicate for seed 3"),
        ("1.5,2", "1.5,", r"line 2 \('nose'\) has a value that is not a number"),
        ("1.5,2", "nan,2", r"line 2 \('nose'\) is at \(nan, 2\), outside of 40x24 pixels"),
        ("1.5,2", "1e999,2", r"is at \(inf, 2\), outside"),
        ("1.5,2", "39.51,2", r"is at \(39.51, 2\), outside of 40x24 pixels"),
        ("1.5,2", "1.5,-0.51", r"is at \(1.5, -0.51\), outside of 40x24 pixels"),
        ("1.5,2", "1.5,2,2", "line 2 has 5 columns, but the header has 4"),
        ("1.5,2", '1.5,"2', "is not CSV"),
        (
            "seed,name,x,y\n3,nose,1.5,2",
            "seed,name,x,y,visible\n3,nose,1.5,2,3",
            "has visibility 3; it must be 0, 1 or 2",
        ),
    ],
)
def test_faults_of_a_csv_are_named(annotated: Path, old: str, new: str, problem: str) -> None:
    csv_path(annotated).write_text(CSV.replace(old, new))
    with pytest.raises(UnusableFile, match=f"keypoints.csv .*{problem}"):
        read_keypoints(annotated, "csv")


def test_bytes_that_are_no_text_are_named(annotated: Path) -> None:
    csv_path(annotated).write_bytes(CSV.encode("utf-16"))
    with pytest.raises(UnusableFile, match=r"keypoints.csv is not CSV"):
        read_keypoints(annotated, "csv")
    csv_path(annotated).unlink()
    with pytest.raises(UnusableFile, match=r"keypoints.csv does not exist; write it with the header seed,name,x,y"):
        read_keypoints(annotated, "csv")


def test_nothing_is_forgotten(annotated: Path) -> None:
    csv_path(annotated).write_text("seed,name,x,y\n3,nose,1.5,2\n3,left_eye,1,1\n3,right_eye,1,1\n")
    with pytest.raises(UnusableFile, match=r"images/0000000012.png has no keypoint"):
        read_keypoints(annotated, "csv")
    csv_path(annotated).write_text("seed,name,x,y\n3,nose,1.5,2\n3,left_eye,1,1\n12,nose,1,1\n")
    with pytest.raises(UnusableFile, match=r"keypoints.json names 'right_eye', which no image shows"):
        read_keypoints(annotated, "csv")


def test_coco_is_matched_by_name(annotated: Path) -> None:
    """The file of datumaro: 1 is hidden and yet labelled, 0 is not labelled."""
    keypoints = read_keypoints(annotated, "coco").labels
    content = json.loads(keypoints_path(annotated).read_text())
    stems = {image["id"]: int(Path(image["file_name"]).stem) for image in content["images"]}
    theirs = {stems[entry["image_id"]]: np.reshape(entry["keypoints"], (3, 3)) for entry in content["annotations"]}
    assert {seed: values[:, 2].tolist() for seed, values in theirs.items()} == {3: [2, 1, 2], 12: [2, 2, 0]}
    np.testing.assert_allclose(keypoints[3], theirs[3], rtol=1e-6)
    np.testing.assert_allclose(keypoints[12][:2], theirs[12][:2], rtol=1e-6)
    assert keypoints[12][2].tolist() == [0, 0, 0]
    # The order is that of keypoints.json, whatever the tool's.
    edit(annotated / "keypoints.json", lambda entries: entries.reverse())
    np.testing.assert_array_equal(read_keypoints(annotated, "coco").labels[3], keypoints[3][::-1])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file["categories"][0].update(keypoints=[]), "has 0 categories with keypoints; exactly one is"),
        (
            lambda file: file["categories"].append({"id": 2, "name": "body", "keypoints": ["hip"]}),
            "has 2 categories with keypoints",
        ),
        (lambda file: file["categories"][0]["keypoints"].append("ear"), "has 9 numbers for 4 keypoints"),
        (
            lambda file: file["categories"][0].update(keypoints=["left_eye", "right_eye", "ear"]),
            r"annotation 1 \('ear'\) has an unknown name",
        ),
        (
            lambda file: file["categories"][0].update(keypoints=["nose", "right_eye", "nose"]),
            r"annotation 1 \('nose'\) is a duplicate for seed",
        ),
        (lambda file: file["annotations"].append(file["annotations"][0]), r"is a duplicate for seed"),
        (lambda file: file["annotations"][0]["keypoints"].__setitem__(2, 7), "has visibility 7"),
        (lambda file: file["annotations"][0]["keypoints"].__setitem__(0, 40), r"is at \(40, .*outside of 40x24"),
        (
            lambda file: file["annotations"][0]["keypoints"].__setitem__(0, None),
            r"keypoints.0: Input should be a valid",
        ),
        (lambda file: file["annotations"][0].update(category_id=3), "has the keypoint category id 3"),
        (lambda file: file["images"].pop(), "does not list the image"),
    ],
)
def test_faults_of_a_coco_file_are_named(annotated: Path, change: Callable[[Any], object], problem: str) -> None:
    edit(keypoints_path(annotated), change)
    with pytest.raises(UnusableFile, match=f"person_keypoints_default.json .*{problem}"):
        read_keypoints(annotated, "coco")
