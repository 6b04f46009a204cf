"""COCO instances: the masks are pycocotools' own, and no file, however hostile, reaches it unchecked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import UNDRAWN, read_masks
from labelmint.models.annotations.coco import instances_path
from tests.models.annotations.conftest import edit

pytestmark = pytest.mark.torch


def test_masks_are_those_of_pycocotools(annotated: Path) -> None:
    ours = read_masks(annotated, "coco")
    theirs = COCO(instances_path(annotated))
    for image in theirs.imgs.values():
        mask = np.zeros((24, 40), np.uint8)
        for annotation in theirs.imgToAnns[image["id"]]:
            name = theirs.cats[annotation["category_id"]]["name"]
            mask[theirs.annToMask(annotation) > 0] = ours.names.index(name)
        assert set(np.unique(mask)) == {0, 1, 2}
        np.testing.assert_array_equal(ours.labels[int(Path(image["file_name"]).stem)], mask)


def test_what_no_instance_covers_may_be_not_drawn(annotated: Path) -> None:
    """The file has a shape of the background in each image. Its pixels are drawn, and those that nothing covers not."""
    drawn, sparse, filled = (
        read_masks(annotated, "coco", unlabelled=each).labels for each in ("ignore", "extend", "background")
    )
    for seed in (3, 12):
        np.testing.assert_array_equal(sparse[seed], drawn[seed])
        assert set(np.unique(drawn[seed])) == {0, 1, 2, UNDRAWN} and UNDRAWN not in filled[seed]
        np.testing.assert_array_equal(np.where(drawn[seed] == UNDRAWN, 0, drawn[seed]), filled[seed])

    def without_background(file: Any) -> None:
        file["annotations"] = [entry for entry in file["annotations"] if entry["category_id"] != 1]

    edit(instances_path(annotated), without_background)
    with pytest.raises(UnusableFile, match="classes.json names 'background', which is drawn in no image"):
        read_masks(annotated, "coco", unlabelled="ignore")


def test_ids_come_from_the_names_and_folders_do_not_matter(annotated: Path) -> None:
    want = read_masks(annotated, "coco").labels

    def renumbered(file: Any) -> None:
        for entry in file["categories"]:
            entry["id"] = 70 - entry["id"]
        for entry in file["annotations"]:
            entry["category_id"] = 70 - entry["category_id"]
        for entry in file["images"]:
            entry["file_name"] = "upload/" + entry["file_name"]
        file["categories"].append({"id": 7, "name": "never used"})

    edit(instances_path(annotated), renumbered)
    for seed, mask in read_masks(annotated, "coco").labels.items():
        np.testing.assert_array_equal(mask, want[seed])


def test_compressed_run_lengths(annotated: Path) -> None:
    rng = np.random.default_rng(0)
    for density in (0.001, 0.05, 0.5, 0.999):
        area = rng.random((24, 40)) < density
        area[5, 7] = True
        area[:, 20:30] = density > 0.5  # long runs
        encoded = pycocotools.mask.encode(np.asfortranarray(area))
        _replace(annotated, {"size": [24, 40], "counts": encoded["counts"].decode()})
        np.testing.assert_array_equal(read_masks(annotated, "coco").labels[12] == 2, area)


def _replace(directory: Path, segmentation: object) -> None:
    """One annotation per image: an eye with this segmentation in the first, a square in the second."""

    def change(file: Any) -> None:
        square = [[1, 1, 9, 1, 9, 9, 1, 9]]
        file["images"].sort(key=lambda image: image["file_name"], reverse=True)
        file["annotations"] = [
            {"id": number, "image_id": image["id"], "category_id": 3, "segmentation": area}
            for number, (image, area) in enumerate(zip(file["images"], (segmentation, square), strict=True))
        ]

    edit(instances_path(directory), change)


# 24x40 pixels: 960 in sum.
@pytest.mark.parametrize(
    "counts",
    [
        [],
        [100, 800],  # too few: pycocotools would hand out memory that it never wrote
        [100, 861],  # too many
        [100, 2**40],
        [100, 860 + 2**32],  # right again in 32 bits
        "",
        "1",
        "T3",  # 100 pixels
        "o" * 5,  # a number that never ends: pycocotools would read on
        "P" * 1_000_000 + "0",  # a number without end
        "0" * 1_000_000,  # a million empty runs
        "ooooooO" * 3,  # negative
        "1é2",
        "1\x002",
        "\x7f\x7f",
    ],
)
def test_run_lengths_that_do_not_add_up(annotated: Path, counts: object) -> None:
    _replace(annotated, {"size": [24, 40], "counts": counts})
    with pytest.raises(UnusableFile, match=r"annotation 0 \('eye'\) has run lengths that do not add up to its image"):
        read_masks(annotated, "coco")


def test_every_spoiled_string_is_refused_or_adds_up(annotated: Path) -> None:
    """Bytes changed at random in a true string: pycocotools sees only what adds up."""
    rng = np.random.default_rng(0)
    area = np.asfortranarray(rng.random((24, 40)) < 0.2)
    true = np.frombuffer(pycocotools.mask.encode(area)["counts"], np.uint8)
    refused = 0
    for _ in range(200):
        spoiled = true.copy()
        spoiled[rng.integers(len(true))] = rng.integers(32, 127)
        _replace(annotated, {"size": [24, 40], "counts": spoiled.tobytes().decode()})
        try:
            assert read_masks(annotated, "coco").labels[12].shape == (24, 40)
        except UnusableFile:
            refused += 1
    assert 150 < refused <= 200


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        ({"size": [40, 24], "counts": [960]}, "has run lengths for 24x40 pixels, but its image has 40x24"),
        ({"size": [2**40, 2**40], "counts": [960]}, "has run lengths for .* pixels, but its image has 40x24"),
        ({"size": [24, 40], "counts": [960]}, "covers no pixel"),
        ({"size": [24, 40], "counts": [-1, 961]}, r"counts.uncompressed.0: Input should be greater"),
        ({"size": [24, 40], "counts": 960}, r"counts.uncompressed: Input should be a valid array"),
        ({"counts": [960]}, "rle.size: Field required"),
        ([], "has a box and no area"),
        ([[]], "has a polygon of 0 numbers; it needs three points"),
        ([[1, 2, 3, 4]], "has a polygon of 4 numbers; it needs three points"),  # pycocotools would take it for a box
        ([[1, 2, 3, 4, 5, 6, 7]], "has a polygon of 7 numbers"),
        ([[1, 1, 9, 1, 9, 9], [1, 1, 9, 1, 9, 1e30]], "has a point at .* far outside of 40x24 pixels"),
        ([[1, 1, 9, 1, 9, float("inf")]], r"polygons.0.5: Input should be a finite number"),
        ([[60, 1, 70, 1, 70, 9]], "covers no pixel"),
        ([[1, 1, 39, 23] * 100_000], "has an outline longer than those of all pixels together"),
        ("1", r"polygons: Input should be a valid array"),
    ],
)
def test_faults_of_areas_are_named(annotated: Path, segmentation: object, problem: str) -> None:
    _replace(annotated, segmentation)
    with pytest.raises(UnusableFile, match=f"instances_default.json .*annotations?.0.*{problem}"):
        read_masks(annotated, "coco")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.pop("images"), "images: Field required; export .COCO 1.0. and unpack it"),
        (lambda file: file["images"].pop(), "does not list the image 00000000(03|12).png of dataset.json"),
        (
            lambda file: file["images"][0].update(file_name="cat.png"),
            "lists the image 'cat.png'; dataset.json has no image",
        ),
        (lambda file: file["images"].append(file["images"][0]), "lists .* and .*, both of seed"),
        (lambda file: file["images"][0].update(width=24), r"says that 00000000(03|12).png is 24x24 pixels, but its"),
        (lambda file: file["categories"][1].update(name="hide"), r"\('hide'\) has an unknown name; known names"),
        (lambda file: file["annotations"][0].update(image_id=9), "annotation 1 has the image id 9, which the file"),
        (lambda file: file["annotations"][0].update(category_id=9), "annotation 1 has the category id 9"),
    ],
)
def test_faults_of_the_file_are_named(annotated: Path, change: Callable[[Any], object], problem: str) -> None:
    edit(instances_path(annotated), change)
    with pytest.raises(UnusableFile, match=f"instances_default.json .*{problem}"):
        read_masks(annotated, "coco")


def test_an_image_without_an_annotation_is_named(annotated: Path) -> None:
    def change(file: Any) -> None:
        skipped = next(image["id"] for image in file["images"] if image["file_name"] == "0000000003.png")
        file["annotations"] = [entry for entry in file["annotations"] if entry["image_id"] != skipped]

    edit(instances_path(annotated), change)
    with pytest.raises(UnusableFile, match=r"0000000003.png has no shape"):
        read_masks(annotated, "coco")


def test_a_missing_file_says_how_to_get_it(annotated: Path) -> None:
    instances_path(annotated).unlink()
    with pytest.raises(UnusableFile, match=r"instances_default.json does not exist; export .COCO 1.0. and unpack it"):
        read_masks(annotated, "coco")


@pytest.mark.parametrize("renamed", ["images/cb0618f6-{}.png", "{}_png.rf.0f12ab9913e0d4c65a7b.jpg"])
def test_images_that_a_tool_renamed_are_matched_by_their_seed(annotated: Path, renamed: str) -> None:
    want = read_masks(annotated, "coco").labels

    def rename(file: Any) -> None:
        for image in file["images"]:
            image["file_name"] = renamed.format(Path(image["file_name"]).stem)

    edit(instances_path(annotated), rename)
    got = read_masks(annotated, "coco").labels
    assert all(np.array_equal(got[seed], want[seed]) for seed in want)


def test_a_byte_order_mark_is_no_content(annotated: Path) -> None:
    path = instances_path(annotated)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_masks(annotated, "coco").labels[3].any()
