"""A directory in which a person annotates: what is drawn on which image, saved at each stroke.

DIRECTORY/annotate.json     the images that are open, in their order, and those that the person skipped
DIRECTORY/strokes/SEED.json the strokes or points of an image, with their revision: what the person drew
DIRECTORY/dataset.json, images/, masks/, classes.json, keypoints.csv, keypoints.json
                            what follows from it, in the form of `labelmint synth` and of the readers of `labelmint fit`

Rules of this file:
- Strokes are written first and what follows from them after, each to a temporary file that is then renamed. When the
  directory is opened, what follows is written again if it is missing or older. So a crash loses at most one stroke.
- dataset.json lists the images on which something is drawn, so that `fit` reads the directory at any moment.
- One process has the directory at a time. Within it, each change names the revision that it is based on: a change of an
  older one, from a second tab, is refused.
- A failed write leaves the memory as it was, so that the same change can be sent again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from labelmint.annotate.strokes import MAX_STROKES, Mask, Stroke, Taken, mask_of, runs_of
from labelmint.core.errors import CannotSave, ChangedElsewhere, InvalidRequest, UnusableFile
from labelmint.core.policy import SEED_END, check_seed
from labelmint.core.task import TaskName, task_of
from labelmint.models.annotations import (
    UNDRAWN,
    AnnotatedDataset,
    Unlabelled,
    image_path,
    mask_path,
    names_path,
    write_keypoints,
    write_masks,
)
from labelmint.models.annotations.directory import read_drawn, read_names, write_names
from labelmint.models.annotations.files import read_json, write_json, write_png
from labelmint.models.annotations.masks import LabelClasses
from labelmint.models.tasks import learning_of

MAX_CLASSES = UNDRAWN  # ids 0 to 254
_NEW_CLASSES: Mapping[TaskName, tuple[tuple[str, tuple[int, int, int]], ...]] = {
    "segmentation": (("background", (0, 0, 0)),),
    "keypoints": (),
}


class Place(BaseModel):
    """A keypoint of an image: x and y in pixels, and COCO's visibility: 0 absent, 1 hidden, 2 visible."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=256)]
    x: float
    y: float
    visible: Annotated[int, Field(ge=0, le=2)]


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    revision: Annotated[int, Field(ge=1)]
    strokes: Annotated[list[Stroke], Field(max_length=MAX_STROKES)] = []
    points: Annotated[list[Place], Field(max_length=MAX_CLASSES)] = []


_Seeds = list[Annotated[int, Field(ge=0, lt=SEED_END)]]


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    generator_sha256: str
    truncation_psi: Annotated[float, Field(ge=0, le=2)]
    task: Literal["segmentation", "keypoints"]
    open: _Seeds
    skipped: _Seeds


class _Synth(BaseModel):
    generator_sha256: str
    truncation_psi: float


_SAVED, _ORDER, _SYNTH = TypeAdapter(_Saved), TypeAdapter(_Order), TypeAdapter(_Synth)


@dataclass(frozen=True)
class Sheet:
    """What is drawn on one image. `mask` is uint8 [R,R] for the task segmentation; revision 0 is an untouched image."""

    seed: int
    image: Mask  # uint8 [R,R,3]
    mask: Mask
    revision: int = 0
    strokes: tuple[Stroke, ...] = ()
    points: tuple[Place, ...] = ()

    @property
    def touched(self) -> bool:
        """Whether something is drawn or placed on it, or a point was said to be absent."""
        return bool(self.points) or bool((self.mask != UNDRAWN).any())


@dataclass(frozen=True)
class Bound:
    """What a directory belongs to: the images of one generator at one truncation, for one task."""

    generator_sha256: str
    truncation_psi: float
    task: TaskName
    resolution: int


@dataclass
class Workspace:
    """An open directory. `draw` makes the image uint8 [R,R,3] of a seed."""

    directory: Path
    bound: Bound
    draw: Callable[[int], Mask]
    classes: LabelClasses
    sheets: dict[int, Sheet] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)

    @property
    def drawn(self) -> dict[int, Sheet]:
        """The images on which something is drawn, in their order."""
        return {seed: sheet for seed, sheet in self.sheets.items() if sheet.touched}

    def annotated(self) -> AnnotatedDataset:
        """Everything that is drawn, as the readers of `fit` return it, but also without any image or keypoint."""
        keypoints, drawn = not task_of(self.bound.task).has_label_image, self.drawn
        return AnnotatedDataset(
            self.bound.task,
            self.bound.truncation_psi,
            self.classes.names,
            self.classes.palette,
            images={seed: sheet.image for seed, sheet in drawn.items()},
            labels={seed: self._points(sheet) if keypoints else sheet.mask for seed, sheet in drawn.items()},
        )

    def sheet(self, seed: int) -> Sheet:
        if seed not in self.sheets:
            raise InvalidRequest("seed", f"the image of seed {seed} is not open; open it first")
        return self.sheets[seed]

    def add(self, seed: int) -> Sheet:
        """Open the image of a seed; an image that is open already stays as it is."""
        if seed in self.sheets:
            return self.sheets[seed]
        sheet = self._blank(check_seed(seed))
        with self.saving():
            write_png(image_path(self.directory, seed), Image.fromarray(sheet.image))
            self._write_order([*self.sheets, seed], [each for each in self.skipped if each != seed])
        self.sheets[seed] = sheet
        self.skipped = [each for each in self.skipped if each != seed]
        return sheet

    def skip(self, seed: int) -> None:
        """Close an image, or refuse a suggested one, so that it is not suggested again."""
        if seed in self.sheets and self.sheets[seed].touched:
            raise InvalidRequest("seed", f"something is drawn on the image of seed {seed}; undo it before you skip it")
        skipped = [*self.skipped, *([] if seed in self.skipped else [check_seed(seed)])]
        with self.saving():
            self._write_order([each for each in self.sheets if each != seed], skipped)
        self.sheets.pop(seed, None)
        self.skipped = skipped

    def save_strokes(self, seed: int, strokes: Sequence[Stroke], revision: int) -> Sheet:
        """Replace the strokes of an image; raises ChangedElsewhere unless `revision` is the stored one."""
        for stroke in strokes:
            if stroke.tool != "erase" and stroke.class_id >= len(self.classes.names):
                raise InvalidRequest("strokes", f"class {stroke.class_id} is not one of the {len(self.classes.names)}")
        mask = mask_of(strokes, self.bound.resolution)
        return self._save(replace(self.sheet(seed), strokes=tuple(strokes), mask=mask), revision)

    def save_points(self, seed: int, points: Sequence[Place], revision: int) -> Sheet:
        """Replace the keypoints of an image; raises ChangedElsewhere unless `revision` is the stored one."""
        names = [point.name for point in points]
        for point in points:
            if point.name not in self.classes.names:
                raise InvalidRequest("points", f"{point.name!r} is not one of the keypoints")
            if names.count(point.name) > 1:
                raise InvalidRequest("points", f"{point.name!r} is placed twice")
            edge = self.bound.resolution - 0.5
            if point.visible and not (-0.5 <= point.x <= edge and -0.5 <= point.y <= edge):
                raise InvalidRequest("points", f"{point.name!r} is outside of the image")
        return self._save(replace(self.sheet(seed), points=tuple(points)), revision)

    def save_classes(self, classes: LabelClasses) -> None:
        """Rename or add classes. The last ones may be left out if nothing is drawn with them. Ids stay as they are."""
        names = classes.names
        if not len(names) <= MAX_CLASSES:
            raise InvalidRequest("classes", f"{len(names)} are too many; give at most {MAX_CLASSES}")
        for name in names:
            if not name.strip() or not name.isprintable():
                raise InvalidRequest("classes", f"{name!r} is not a printable name")
            if names.count(name) > 1:
                raise InvalidRequest("classes", f"{name!r} is there twice")
        renamed = dict(zip(self.classes.names, names, strict=False))
        for sheet in self.sheets.values():
            used = {stroke.class_id for stroke in sheet.strokes if stroke.tool != "erase"}
            used |= {self.classes.names.index(point.name) for point in sheet.points}
            if lost := sorted(used - set(range(len(names)))):
                raise InvalidRequest("classes", f"{self.classes.names[lost[0]]!r} is drawn on seed {sheet.seed}")
        moved = {
            seed: replace(sheet, points=tuple(p.model_copy(update={"name": renamed[p.name]}) for p in sheet.points))
            for seed, sheet in self.sheets.items()
        }
        with self.saving():
            write_names(self._names_path, names, classes.palette)
            for sheet in moved.values():
                if sheet.points:
                    self._write_saved(sheet)
        self.classes, self.sheets = classes, moved
        with self.saving():
            self._write_derived(self.drawn)

    def _save(self, changed: Sheet, revision: int) -> Sheet:
        stored = self.sheets[changed.seed].revision
        if revision != stored:
            raise ChangedElsewhere(
                f"the image of seed {changed.seed} was changed in another tab or window (revision {stored}, not "
                f"{revision}); load it again"
            )
        changed = replace(changed, revision=stored + 1)
        with self.saving():
            self._write_saved(changed)
        self.sheets[changed.seed] = changed
        with self.saving():
            self._write_derived({changed.seed: changed})
        return changed

    @property
    def _names_path(self) -> Path:
        return names_path(self.directory, self.bound.task)

    def _strokes_path(self, seed: int) -> Path:
        return self.directory / "strokes" / f"{seed:010d}.json"

    def _blank(self, seed: int) -> Sheet:
        size = self.bound.resolution
        return Sheet(seed, self.draw(seed), np.full((size, size), UNDRAWN, np.uint8))

    def _write_saved(self, sheet: Sheet) -> None:
        saved = _Saved(revision=sheet.revision, strokes=list(sheet.strokes), points=list(sheet.points))
        write_json(self._strokes_path(sheet.seed), saved.model_dump(by_alias=True))

    def _write_order(self, opened: Sequence[int], skipped: Sequence[int]) -> None:
        bound = self.bound
        order = _Order(
            generator_sha256=bound.generator_sha256,
            truncation_psi=bound.truncation_psi,
            task=bound.task,
            open=list(opened),
            skipped=list(skipped),
        )
        write_json(self.directory / "annotate.json", order.model_dump())

    def _write_derived(self, changed: Mapping[int, Sheet]) -> None:
        """Write what `fit` reads: the masks of the changed images, or all keypoints, and the list of images."""
        if self.bound.task == "segmentation":
            masks = {seed: sheet.mask for seed, sheet in changed.items() if sheet.touched}
            write_masks(self.directory, self.classes, masks)
        else:
            dataset = self.annotated()
            write_keypoints(self.directory, dataset.names, dataset.palette, keypoints=dataset.labels)
        content = {
            "generator_sha256": self.bound.generator_sha256,
            "truncation_psi": self.bound.truncation_psi,
            "seeds": list(self.drawn),
        }
        write_json(self.directory / "dataset.json", content)
        for seed in changed.keys() - self.drawn.keys():  # `fit` refuses a mask of an image that is not listed
            mask_path(self.directory, seed).unlink(missing_ok=True)

    def _points(self, sheet: Sheet) -> npt.NDArray[np.float32]:
        """The keypoints of an image, float32 [K,3] of x, y, visibility."""
        placed = {point.name: (point.x, point.y, point.visible) for point in sheet.points if point.visible}
        return np.array([placed.get(name, (0, 0, 0)) for name in self.classes.names], np.float32).reshape(-1, 3)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Translate a failure to write; raises CannotSave."""
        try:
            yield
        except OSError as error:
            raise CannotSave(Path(error.filename or self.directory), error) from error


@contextlib.contextmanager
def opened(
    directory: Path,
    bound: Bound,
    draw: Callable[[int], Mask],
    *,
    annotation_format: str | None = None,
    unlabelled: Unlabelled = "background",
) -> Iterator[Workspace]:
    """Open a directory, or make a new one. Raises UnusableFile, also if another process has it open.

    A directory of `labelmint synth` is taken over. With `annotation_format`, so are the annotations in it, which
    another tool made: one of the formats of `labelmint fit`, whose `--unlabelled` the last argument is.
    """
    mine, of_synth = directory / "annotate.json", directory / "dataset.json"
    if not mine.exists() and not of_synth.exists() and directory.exists() and any(directory.iterdir()):
        raise UnusableFile(
            directory, "is neither of `labelmint annotate` nor of `labelmint synth`; name a new directory"
        )
    for each in ("images", "masks", "strokes"):
        (directory / each).mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        entries = _NEW_CLASSES[bound.task]
        classes = LabelClasses(tuple(name for name, _ in entries), tuple(rgb for _, rgb in entries))
        workspace = Workspace(directory, bound, draw, classes)
        if mine.exists():
            _check_bound(mine, _ORDER, bound)
        elif of_synth.exists():
            _check_bound(of_synth, _SYNTH, bound)
            _take_over(workspace, annotation_format, unlabelled)
        else:
            workspace._write_order([], [])
        _read(workspace)
        yield workspace


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / "annotate.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UnusableFile(
            directory, "is open in another `labelmint annotate`; close that one, or use its page"
        ) from None
    finally:
        os.close(descriptor)


def _check_bound(path: Path, kind: TypeAdapter[Any], bound: Bound) -> None:
    """Raises UnusableFile if a directory belongs to another generator, truncation or task."""
    found = read_json(path, kind, "restore it from a copy, or name a new directory")
    if found.generator_sha256 != bound.generator_sha256:
        raise UnusableFile(path.parent, "has images of another generator; name that generator, or a new directory")
    for name in ("truncation_psi", "task"):
        if (value := getattr(found, name, getattr(bound, name))) != getattr(bound, name):
            raise UnusableFile(path.parent, f"has {name} {value}, not {getattr(bound, name)}")


def _take_over(workspace: Workspace, annotation_format: str | None, unlabelled: Unlabelled) -> None:
    """Make a directory of `synth` one of this page, with the annotations that another tool made."""
    directory, bound = workspace.directory, workspace.bound
    seeds = list(read_drawn(directory).images)
    if annotation_format is not None:
        dataset = learning_of(bound.task).read(directory, annotation_format, unlabelled)
        for seed, label in dataset.labels.items():
            sheet = replace(workspace._blank(seed), revision=1)
            if bound.task == "segmentation":
                sheet = replace(sheet, strokes=tuple(taken(label, annotation_format)))
            else:
                points = zip(dataset.names, label.tolist(), strict=True)
                places = (Place(name=name, x=x, y=y, visible=int(seen)) for name, (x, y, seen) in points)
                sheet = replace(sheet, points=tuple(places))
            workspace._write_saved(sheet)
    # Last, because a directory that has it counts as taken over.
    workspace._write_order(seeds, [])


def _read(workspace: Workspace) -> None:
    """Take what the directory holds, and write again what follows from it."""
    directory, bound = workspace.directory, workspace.bound
    order = read_json(directory / "annotate.json", _ORDER, "restore it from a copy, or name a new directory")
    if workspace._names_path.exists():
        workspace.classes = LabelClasses(*read_names(workspace._names_path, "restore it from a copy"))
    elif workspace.classes.names:
        write_names(workspace._names_path, workspace.classes.names, workspace.classes.palette)
    workspace.skipped = list(order.skipped)
    for seed in order.open:
        workspace.sheets[seed] = _read_sheet(workspace, seed)
        if not image_path(directory, seed).exists():
            write_png(image_path(directory, seed), Image.fromarray(workspace.sheets[seed].image))
    workspace._write_derived(workspace.sheets if bound.task == "segmentation" else workspace.drawn)


def _read_sheet(workspace: Workspace, seed: int) -> Sheet:
    sheet, path = workspace._blank(seed), workspace._strokes_path(seed)
    if not path.exists():
        return sheet
    saved = read_json(path, _SAVED, "restore it from a copy, or remove it to draw the image anew")
    return replace(
        sheet,
        revision=saved.revision,
        strokes=tuple(saved.strokes),
        points=tuple(saved.points),
        mask=mask_of(saved.strokes, workspace.bound.resolution),
    )


def taken(mask: Mask, source: str) -> list[Stroke]:
    """The strokes of a mask uint8 [R,R] that was drawn elsewhere, one for each of its classes."""
    return [
        Taken.model_validate({"tool": "mask", "class": int(each), "source": source, "region": runs_of(mask == each)})
        for each in np.unique(mask)
        if each != UNDRAWN
    ]
