"""Label files of labelme: the masks are labelme's own, and every fault is named."""

import base64
import json
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import UNDRAWN, read_masks
from tests.models.annotations.conftest import edit, label_path

pytestmark = pytest.mark.torch


def test_masks_are_those_of_labelmes_converter(annotated: Path) -> None:
    ours, theirs = read_masks(annotated, "labelme"), read_masks(annotated, "png")
    assert ours.names == ("background", "skin", "eye")
    for seed in (3, 12):
        assert set(np.unique(ours.labels[seed])) == {0, 1, 2}
        np.testing.assert_array_equal(ours.labels[seed], theirs.labels[seed])


def test_later_shapes_paint_over_earlier_ones(annotated: Path) -> None:
    before = read_masks(annotated, "labelme").labels[3]
    edit(label_path(annotated, 3), lambda file: file["shapes"].reverse())
    after = read_masks(annotated, "labelme").labels[3]
    assert (before == 2).sum() > 50 and not (after == 2).any()  # the skin now lies over the eyes


def test_what_no_shape_covers_may_be_not_drawn(annotated: Path) -> None:
    """One file has a shape of the background. Its pixels are drawn, and those that no shape covers are not."""
    drawn, sparse, filled = (
        read_masks(annotated, "labelme", unlabelled=each).labels for each in ("ignore", "extend", "background")
    )
    for seed in (3, 12):
        np.testing.assert_array_equal(sparse[seed], drawn[seed])
        assert set(np.unique(drawn[seed])) == {1, 2, UNDRAWN} | ({0} if seed == 3 else set())
        assert UNDRAWN not in filled[seed]
        np.testing.assert_array_equal(np.where(drawn[seed] == UNDRAWN, 0, drawn[seed]), filled[seed])

    def without_background(file: Any) -> None:
        file["shapes"] = [shape for shape in file["shapes"] if shape["label"] != "background"]

    edit(label_path(annotated, 3), without_background)
    with pytest.raises(UnusableFile, match="classes.json names 'background', which is drawn in no image"):
        read_masks(annotated, "labelme", unlabelled="ignore")


def test_an_image_that_windows_saved_is_the_image_beside_it(annotated: Path) -> None:
    edit(label_path(annotated, 3), lambda file: file.update(imagePath="..\\images\\0000000003.png"))
    assert read_masks(annotated, "labelme").labels[3].any()


def shape(**changes: object) -> Callable[[Any], object]:
    return lambda file: file["shapes"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.pop("shapes"), "cannot be read: shapes: Field required; annotate its image with labelme"),
        (lambda file: file.update(imageWidth=24), "was saved for an image of 24x24 pixels, but its image has 40x24"),
        (lambda file: file.update(imagePath="0000000012.png"), "was saved for the image '0000000012.png'"),
        (shape(label="hare"), r"shapes.0 \('hare'\) has an unknown name; known names are background, skin, eye"),
        (shape(shape_type="point"), "is a point; only polygon, .*, mask have an area"),
        (shape(points=[[1, 2], [3, 4]]), "is a polygon of 2 points"),
        (shape(points=[[1, 2], [3, 4], [5, float("nan")]]), "shapes.0.points.2.1: Input should be a finite number"),
        (shape(points=[[1, 2], [3, 4], [5, 10**400]]), "shapes.0.points.2.1: Input should be a finite number"),
        (shape(points=[[1, 2], [3, 4], [5, "6"]]), "shapes.0.points.2.1: Input should be a valid number"),
        (shape(points=[[1, 2], [3, 4], [5, 1000]]), r"has a point at \(5, 1000\), far outside of 40x24 pixels"),
        (shape(points=[[50, 2], [60, 2], [60, 9]]), r"shapes.0 \('skin'\) covers no pixel"),
    ],
)
def test_faults_are_named(annotated: Path, change: Callable[[Any], object], problem: str) -> None:
    edit(label_path(annotated, 3), change)
    with pytest.raises(UnusableFile, match=f"images/0000000003.json .*{problem}"):
        read_masks(annotated, "labelme")


def png_that_claims(width: int, height: int) -> str:
    """A PNG that is a header and nothing else."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mask": None}, "bitmap that is not a whole PNG"),
        ({"mask": "x"}, "bitmap that is not a whole PNG"),
        ({"mask": "é"}, "bitmap that is not a whole PNG"),
        ({"mask": "iVBORw0KGgo="}, "bitmap that is not a whole PNG: it is not a PNG$"),
        ({"mask": png_that_claims(60_000, 60_000)}, "bitmap that is not a whole PNG"),
        ({"mask": png_that_claims(4, 3)}, "bitmap that is not a whole PNG"),
        ({"points": [[20, 15], [24, 17]]}, "bitmap whose size or mode"),
        ({"points": [[38, 15], [41, 17]]}, r"bitmap from \(38, 15\) to \(41, 17\), outside its image"),
        ({"points": [[23, 17], [20, 15]]}, r"bitmap from \(23, 17\) to \(20, 15\)"),
    ],
)
def test_faults_of_bitmaps_are_named(annotated: Path, changes: dict[str, object], problem: str) -> None:
    edit(label_path(annotated, 3), lambda file: file["shapes"][3].update(changes))
    with pytest.raises(UnusableFile, match=rf"0000000003.json shapes.3 \('background'\) has a {problem}"):
        read_masks(annotated, "labelme")


def test_every_image_needs_its_label_file_and_a_shape(annotated: Path) -> None:
    edit(label_path(annotated, 12), lambda file: file["shapes"].clear())
    with pytest.raises(UnusableFile, match=r"0000000012.png has no shape; draw one, of 'background' if the"):
        read_masks(annotated, "labelme")
    label_path(annotated, 12).unlink()
    with pytest.raises(UnusableFile, match=r"0000000012.json does not exist; annotate its image with labelme"):
        read_masks(annotated, "labelme")


def test_a_label_file_without_an_image_is_named(annotated: Path) -> None:
    label_path(annotated, 4).write_bytes(label_path(annotated, 3).read_bytes())
    with pytest.raises(UnusableFile, match=r"images/0000000004.json belongs to no image of dataset.json"):
        read_masks(annotated, "labelme")


def rectangle(*points: tuple[float, float], kind: str = "rectangle") -> Callable[[Any], object]:
    entry = {"label": "eye", "points": points, "shape_type": kind}
    return lambda file: file.update(shapes=[entry])


def test_a_rectangle_may_have_four_corners(annotated: Path) -> None:
    """X-AnyLabeling saves all of them; four that stand askew are what they outline."""
    path = label_path(annotated, 3)
    edit(path, rectangle((3, 4), (9, 12)))
    want = read_masks(annotated, "labelme").labels[3]
    assert want.any()
    edit(path, rectangle((3, 4), (9, 4), (9, 12), (3, 12)))
    np.testing.assert_array_equal(read_masks(annotated, "labelme").labels[3], want)
    askew = (6, 2), (10, 8), (6, 14), (2, 8)
    edit(path, rectangle(*askew, kind="polygon"))
    diamond = read_masks(annotated, "labelme").labels[3]
    for kind in ("rectangle", "rotation"):
        edit(path, rectangle(*askew, kind=kind))
        np.testing.assert_array_equal(read_masks(annotated, "labelme").labels[3], diamond)
    edit(path, rectangle((3, 4), (9, 4), (9, 12)))
    with pytest.raises(UnusableFile, match="is a rectangle of 3 points; draw it again"):
        read_masks(annotated, "labelme")


def test_files_that_a_tool_renamed_are_matched_by_their_seed(annotated: Path) -> None:
    want = read_masks(annotated, "labelme").labels[3]
    path = label_path(annotated, 3)
    edit(path, lambda file: file.update(imagePath="cb0618f6-0000000003.png"))
    path.rename(path.with_name("cb0618f6-0000000003.json"))
    np.testing.assert_array_equal(read_masks(annotated, "labelme").labels[3], want)


def test_a_byte_order_mark_is_no_content(annotated: Path) -> None:
    path = label_path(annotated, 3)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_masks(annotated, "labelme").labels[3].any()


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_one_name_has_one_spelling(annotated: Path, listed: str) -> None:
    """macOS hands out é as two characters, most others as one."""
    name = "sourcil gauche relevé"
    classes = annotated / "classes.json"
    used = "NFD" if listed == "NFC" else "NFC"
    edit(classes, lambda entries: entries[2].update(name=unicodedata.normalize(listed, name)))
    for seed in (3, 12):
        text = label_path(annotated, seed).read_text().replace('"eye"', json.dumps(unicodedata.normalize(used, name)))
        label_path(annotated, seed).write_text(text)
    dataset = read_masks(annotated, "labelme")
    assert dataset.names[2] == name and (dataset.labels[3] == 2).any()
    both = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    edit(classes, lambda entries: [entries[number].update(name=both[number]) for number in (0, 1)])
    with pytest.raises(UnusableFile, match="twice; each name may have only one id"):
        read_masks(annotated, "labelme")
