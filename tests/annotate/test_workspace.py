"""The directory of the annotation page: what is saved, what follows from it, and what it survives."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from labelmint.annotate import workspace as module
from labelmint.annotate.elsewhere import write_elsewhere
from labelmint.annotate.strokes import STROKES, Stroke
from labelmint.annotate.workspace import Bound, Place, Workspace, opened
from labelmint.core.errors import CannotSave, ChangedElsewhere, InvalidRequest, UnusableFile
from labelmint.models.annotations import (
    UNDRAWN,
    AnnotatedDataset,
    LabelClasses,
    Unlabelled,
    read_keypoints,
    read_masks,
    write_dataset,
    write_masks,
)

pytestmark = pytest.mark.torch

BOUND = Bound("a" * 64, 1.0, "segmentation", 16)
CLASSES = LabelClasses(("background", "eye", "hair"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))


def image_of(seed: int) -> np.ndarray:
    return np.full((16, 16, 3), seed % 256, np.uint8)


def brush(class_id: int, x: float, y: float, radius: float = 2) -> Stroke:
    return STROKES.validate_python([{"tool": "brush", "class": class_id, "radius": radius, "points": [[x, y]]}])[0]


@contextmanager
def desk(
    directory: Path,
    bound: Bound = BOUND,
    annotation_format: str | None = None,
    unlabelled: Unlabelled = "background",
) -> Iterator[Workspace]:
    with opened(directory, bound, image_of, annotation_format=annotation_format, unlabelled=unlabelled) as found:
        yield found


def test_what_is_drawn_is_there_after_a_restart_and_fit_reads_it(tmp_path: Path) -> None:
    directory = tmp_path / "work"
    with desk(directory) as found:
        assert found.classes.names == ("background",)
        found.save_classes(CLASSES)
        for seed in (7, 5, 9):
            found.add(seed)
        first = found.save_strokes(5, [brush(1, 4, 4)], 0)
        second = found.save_strokes(5, [brush(1, 4, 4), brush(2, 10, 10)], first.revision)
        found.save_strokes(7, [brush(0, 8, 8)], 0)
        found.skip(9)
        found.skip(11)
    dataset = read_masks(directory)
    assert list(dataset.labels) == [7, 5] and dataset.names == CLASSES.names
    assert np.array_equal(dataset.labels[5], second.mask) and (dataset.labels[5] == UNDRAWN).any()
    assert np.array_equal(dataset.images[7], image_of(7))
    with desk(directory) as found:
        assert list(found.sheets) == [7, 5] and found.skipped == [9, 11]
        assert found.sheets[5].revision == 2 and np.array_equal(found.sheets[5].mask, second.mask)
        assert found.sheets[5].strokes == second.strokes


def test_a_change_of_an_older_revision_is_refused(tmp_path: Path) -> None:
    with desk(tmp_path / "work") as found:
        found.add(5)
        kept = found.save_strokes(5, [brush(0, 4, 4)], 0)
        with pytest.raises(ChangedElsewhere, match="another tab"):
            found.save_strokes(5, [], 0)
        assert found.sheets[5] == kept


def test_undo_down_to_nothing_takes_the_image_from_what_fit_reads(tmp_path: Path) -> None:
    with desk(tmp_path / "work") as found:
        for seed in (5, 7):
            found.add(seed)
            found.save_strokes(seed, [brush(0, 4, 4)], 0)
        found.save_strokes(5, [], 1)
    assert list(read_masks(tmp_path / "work").labels) == [7]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        desk(tmp_path / "work"),
        pytest.raises(UnusableFile, match="open in another `labelmint annotate`"),
        desk(tmp_path / "work"),
    ):
        pass
    with desk(tmp_path / "work"):
        pass


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (Bound("b" * 64, 1.0, "segmentation", 16), "another generator"),
        (Bound("a" * 64, 0.7, "segmentation", 16), "truncation_psi 1.0, not 0.7"),
        (Bound("a" * 64, 1.0, "keypoints", 16), "task segmentation, not keypoints"),
    ],
)
def test_a_directory_of_something_else_is_refused(tmp_path: Path, bound: Bound, said: str) -> None:
    with desk(tmp_path / "work"):
        pass
    with pytest.raises(UnusableFile, match=said), desk(tmp_path / "work", bound):
        pass


def test_a_directory_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UnusableFile, match="name a new directory"), desk(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    directory = tmp_path / "work"
    with desk(directory) as found:
        found.add(5)
        kept = found.save_strokes(5, [brush(0, 4, 4)], 0)
        with monkeypatch.context() as patched:
            patched.setattr(module, "write_json", full)
            with pytest.raises(CannotSave, match="No space left on device.*not lost"):
                found.save_strokes(5, [brush(0, 4, 4), brush(0, 9, 9)], 1)
        assert found.sheets[5] == kept
        again = found.save_strokes(5, [brush(0, 4, 4), brush(0, 9, 9)], 1)
    with desk(directory) as found:
        assert found.sheets[5].strokes == again.strokes


DIES = """
import os, sys
from pathlib import Path
from labelmint.annotate import workspace
from tests.annotate.test_workspace import BOUND, brush, desk
directory, moment = Path(sys.argv[1]), sys.argv[2]
with desk(directory) as found:
    found.add(5)
    found.save_strokes(5, [brush(0, 4, 4)], 0)
    setattr(workspace, moment, lambda *_, **__: os.kill(os.getpid(), 9))
    found.save_strokes(5, [brush(0, 4, 4), brush(0, 12, 12)], 1)
"""


@pytest.mark.parametrize(("moment", "strokes"), [("write_json", 1), ("write_masks", 2)])
def test_a_crash_loses_at_most_one_stroke_and_what_follows_is_mended(tmp_path: Path, moment: str, strokes: int) -> None:
    directory = tmp_path / "work"
    done = subprocess.run([sys.executable, "-c", DIES, str(directory), moment], timeout=120)
    assert done.returncode == -signal.SIGKILL
    with desk(directory) as found:
        assert len(found.sheets[5].strokes) == strokes
        mask = found.sheets[5].mask
    assert np.array_equal(read_masks(directory).labels[5], mask)


def test_classes_are_added_and_renamed_and_ids_stay(tmp_path: Path) -> None:
    with desk(tmp_path / "work") as found:
        found.save_classes(CLASSES)
        found.add(5)
        found.save_strokes(5, [brush(1, 4, 4), brush(0, 9, 9)], 0)
        found.save_classes(LabelClasses(("background", "Auge"), CLASSES.palette[:2]))
        for names, said in (
            (("background",), "'Auge' is drawn on seed 5"),
            (("a", "a"), "twice"),
            (("a", "\x07"), "printable"),
            (tuple(map(str, range(256))), "too many"),
        ):
            with pytest.raises(InvalidRequest, match=said):
                found.save_classes(LabelClasses(names, ((0, 0, 0),) * len(names)))
        with pytest.raises(InvalidRequest, match="class 2"):
            found.save_strokes(5, [brush(2, 4, 4)], 1)
    assert read_masks(tmp_path / "work").names == ("background", "Auge")


def test_keypoints_are_placed_hidden_absent_and_renamed(tmp_path: Path) -> None:
    bound = Bound("a" * 64, 1.0, "keypoints", 16)
    names = LabelClasses(("nose", "eye"), ((1, 2, 3), (4, 5, 6)))
    with desk(tmp_path / "work", bound) as found:
        found.save_classes(names)
        found.add(5)
        nose, eye = Place(name="nose", x=3.25, y=4, visible=1), Place(name="eye", x=0, y=0, visible=0)
        found.save_points(5, [nose, eye], 0)
        found.save_classes(LabelClasses(("snout", "eye"), names.palette))
        for points, said in (
            ([Place(name="nose", x=1, y=1, visible=2)], "not one of the keypoints"),
            ([Place(name="eye", x=1, y=1, visible=2)] * 2, "placed twice"),
            ([Place(name="eye", x=16, y=1, visible=2)], "outside"),
        ):
            with pytest.raises(InvalidRequest, match=said):
                found.save_points(5, points, 1)
        found.save_points(5, [found.sheets[5].points[0], Place(name="eye", x=9, y=2.5, visible=2)], 1)
    dataset = read_keypoints(tmp_path / "work")
    assert dataset.names == ("snout", "eye")
    assert dataset.labels[5].tolist() == [[3.25, 4, 1], [9, 2.5, 2]]


def sketch(directory: Path) -> tuple[dict[int, np.ndarray], AnnotatedDataset]:
    """Draw on two images; returns their masks, and what `fit` reads."""
    with desk(directory) as found:
        found.save_classes(CLASSES)
        for seed, strokes in {5: [brush(1, 4, 4), brush(2, 5, 4, 1)], 7: [brush(0, 8, 8, 20)]}.items():
            found.add(seed)
            found.save_strokes(seed, strokes, 0)
        return {seed: sheet.mask for seed, sheet in found.sheets.items()}, found.annotated()


@pytest.mark.parametrize("unlabelled", ["ignore", "background"])
@pytest.mark.parametrize("file_format", ["labelme", "coco"])
def test_other_tools_open_what_was_drawn_and_it_comes_back(
    tmp_path: Path, file_format: str, unlabelled: Unlabelled
) -> None:
    directory = tmp_path / "work"
    masks, dataset = sketch(directory)
    written = write_elsewhere(directory, dataset, file_format)  # type: ignore[arg-type]
    assert all(path.exists() for path in written)
    # A directory of `synth` in which that tool has drawn:
    shutil.rmtree(directory / "strokes")
    (directory / "annotate.json").unlink()
    ground = UNDRAWN if unlabelled == "ignore" else 0
    with desk(directory, annotation_format=file_format, unlabelled=unlabelled) as found:
        assert list(found.sheets) == [5, 7]
        for seed, mask in masks.items():
            assert np.array_equal(found.sheets[seed].mask, np.where(mask == UNDRAWN, ground, mask))


def test_cvat_opens_the_keypoints_and_they_come_back(tmp_path: Path) -> None:
    directory, bound = tmp_path / "work", Bound("a" * 64, 1.0, "keypoints", 16)
    placed = {
        5: [Place(name="nose", x=3.25, y=4, visible=1), Place(name="eye", x=9, y=2.5, visible=2)],
        7: [Place(name="nose", x=0, y=0, visible=0), Place(name="eye", x=0, y=0, visible=0)],
    }
    with desk(directory, bound) as found:
        found.save_classes(LabelClasses(("nose", "eye"), ((1, 2, 3), (4, 5, 6))))
        for seed, points in placed.items():
            found.add(seed)
            found.save_points(seed, points, 0)
        (written,) = write_elsewhere(directory, found.annotated(), "coco")
        with pytest.raises(InvalidRequest, match="labelme is for masks only"):
            write_elsewhere(directory, found.annotated(), "labelme")
    theirs = COCO(str(written))
    (category,) = theirs.loadCats(theirs.getCatIds())
    assert category["keypoints"] == ["nose", "eye"]
    assert {each["file_name"]: theirs.imgToAnns[each["id"]][0]["num_keypoints"] for each in theirs.imgs.values()} == {
        "0000000005.png": 2,
        "0000000007.png": 0,
    }
    for name in ("annotate.json", "keypoints.csv"):
        (directory / name).unlink()
    shutil.rmtree(directory / "strokes")
    with desk(directory, bound, annotation_format="coco") as found:
        assert {seed: list(sheet.points) for seed, sheet in found.sheets.items()} == placed


def test_a_file_of_another_tool_is_not_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "work"
    _, dataset = sketch(directory)
    written, _ = write_elsewhere(directory, dataset, "labelme")
    write_elsewhere(directory, dataset, "labelme")  # ours is
    content = json.loads(written.read_text())
    del content["written_by"]  # labelme keeps no key that it does not know
    written.write_text(json.dumps(content))
    with pytest.raises(UnusableFile, match="saved by another tool"):
        write_elsewhere(directory, dataset, "labelme")
    assert json.loads(written.read_text()) == content


def test_a_directory_of_synth_is_taken_over_with_its_masks(tmp_path: Path) -> None:
    directory = tmp_path / "synth"
    write_dataset(directory, "a" * 64, 1.0, images={seed: image_of(seed) for seed in (3, 4)})
    masks = {seed: np.random.default_rng(seed).integers(0, 3, (16, 16)).astype(np.uint8) for seed in (3, 4)}
    write_masks(directory, CLASSES, masks)
    with desk(directory, annotation_format="png") as found:
        for seed in (3, 4):
            assert np.array_equal(found.sheets[seed].mask, masks[seed])
        found.save_strokes(3, [*found.sheets[3].strokes, brush(2, 4, 4)], 1)
    assert read_masks(directory).labels[3][4, 4] == 2
