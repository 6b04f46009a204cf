"""Reads and writes the directory of `synth`: seeds, images, and the annotator's names of classes or keypoints.

Rules of this file:
- All tasks share one type of annotated images, which the readers of all formats return. So `fit` needs no case for each
  format. A label is an array; the task defines its meaning.
- dataset.json is written last, so a directory that has it is complete.
- Every image of dataset.json must exist; no image is skipped.
- Annotation tools rename files (Label Studio to cb0618f6-SEED.png, Roboflow to SEED_png.rf.HASH.jpg). So a file belongs
  to the one seed of dataset.json whose ten digits its name contains as a separate word. Two files for one seed are
  refused.
- Unicode can spell one name in several ways (é, or e and an accent). All spellings are normalised to NFC, so they
  count as one name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import AfterValidator, Field, TypeAdapter

from labelmint.core.errors import UnusableFile
from labelmint.core.task import TaskName, task_of
from labelmint.models.annotations.files import Bytes, Strict, open_picture, read_json, write_json, write_png

Palette = tuple[tuple[int, int, int], ...]
Size = tuple[int, int]  # height, width in pixels

# The value of a mask's pixel that nobody drew. It is never a class id.
UNDRAWN = 255


@dataclass(frozen=True)
class Drawn:
    """The content of a `synth` directory: seeds with their images uint8 [R,R,3].

    `class_indices` has the class that a conditional generator drew for each seed; it is empty for any other generator.
    """

    truncation_psi: float
    images: Mapping[int, Bytes]
    class_indices: Mapping[int, int] = field(default_factory=dict)

    def size(self, seed: int) -> Size:
        height, width, _ = self.images[seed].shape
        return height, width


@dataclass(frozen=True)
class AnnotatedDataset:
    """Images uint8 [R,R,3] by seed, and the label of each image.

    A label is a mask uint8 [R,R] of class ids, with UNDRAWN where nobody drew (segmentation), or float32 [K,3]
    (keypoints): x and y in pixels, and COCO's visibility, 0 absent, 1 hidden, 2 visible. `class_indices` are those of
    `Drawn`.
    """

    task: TaskName
    truncation_psi: float
    names: tuple[str, ...]
    palette: Palette
    images: Mapping[int, Bytes]
    labels: Mapping[int, npt.NDArray[Any]]
    class_indices: Mapping[int, int] = field(default_factory=dict)


class _Dataset(Strict):
    truncation_psi: Annotated[float, Field(ge=0, le=2)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    class_indices: tuple[Annotated[int, Field(ge=0)], ...] = ()


_Channel = Annotated[int, Field(ge=0, le=255)]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


class _Entry(Strict):
    name: Annotated[str, Field(min_length=1), AfterValidator(_composed)]
    rgb: tuple[_Channel, _Channel, _Channel]


_DATASET = TypeAdapter(_Dataset)
# Class ids and keypoint numbers are stored in one byte, of which UNDRAWN takes one value.
_ENTRIES = TypeAdapter(Annotated[list[_Entry], Field(min_length=1, max_length=UNDRAWN)])


def image_name(seed: int) -> str:
    return f"{seed:010d}.png"


def image_path(directory: Path, seed: int) -> Path:
    return directory / "images" / image_name(seed)


def write_dataset(
    directory: Path,
    generator_sha256: str,
    truncation_psi: float,
    *,
    images: Mapping[int, Bytes],
    class_indices: Mapping[int, int] | None = None,
) -> None:
    """Write what `read_drawn` reads; `class_indices` by seed, for a conditional generator."""
    check_new(directory)
    (directory / "images").mkdir(parents=True)
    (directory / "masks").mkdir()
    for seed, image in images.items():
        write_png(image_path(directory, seed), Image.fromarray(image))
    content: dict[str, Any] = {
        "generator_sha256": generator_sha256,
        "truncation_psi": truncation_psi,
        "seeds": list(images),
    }
    if class_indices:
        content["class_indices"] = [class_indices[seed] for seed in images]
    write_json(directory / "dataset.json", content)


def check_new(directory: Path) -> None:
    """Refuse a directory with files: training would otherwise combine old masks with new images unnoticed."""
    if directory.exists() and any(directory.iterdir()):
        raise UnusableFile(directory, "exists and is not empty; name a new directory")


def read_drawn(directory: Path) -> Drawn:
    """Read the seeds and images. Raises UnusableFile that names dataset.json or the first missing or damaged image."""
    path = directory / "dataset.json"
    dataset = read_json(path, _DATASET, "write the directory with `labelmint synth`")
    if dataset.class_indices and len(dataset.class_indices) != len(dataset.seeds):
        raise UnusableFile(
            path, f"has {len(dataset.seeds)} seeds but {len(dataset.class_indices)} class_indices; each seed has one"
        )
    images = {}
    for seed in dataset.seeds:
        picture = open_picture(image_path(directory, seed), "dataset.json lists it; write it with `labelmint synth`")
        images[seed] = np.asarray(picture.convert("RGB"))
    classes = zip(dataset.seeds, dataset.class_indices, strict=True) if dataset.class_indices else ()
    return Drawn(dataset.truncation_psi, images, dict(classes))


def names_path(directory: Path, task: TaskName) -> Path:
    """Return the file of the annotator's names: classes.json, or keypoints.json."""
    return directory / ("classes.json" if task_of(task).has_label_image else "keypoints.json")


def read_names(path: Path, mend: str) -> tuple[tuple[str, ...], Palette]:
    """Read names and colours in the order of their ids (classes.json, keypoints.json)."""
    entries = read_json(path, _ENTRIES, mend)
    names = tuple(entry.name for entry in entries)
    for name in names:
        if names.count(name) > 1:
            raise UnusableFile(path, f"names {name!r} twice; each name may have only one id")
    return names, tuple(entry.rgb for entry in entries)


def write_names(path: Path, names: Iterable[str], palette: Palette) -> None:
    write_json(path, [{"name": name, "rgb": list(rgb)} for name, rgb in zip(names, palette, strict=True)])


def id_of(name: str, names: tuple[str, ...], path: Path, *, where: str) -> int:
    """Return the id of a name that an annotator used at the place `where` of a file."""
    if _composed(name) not in names:
        raise UnusableFile(path, f"{where} has an unknown name; known names are {', '.join(names)}")
    return names.index(_composed(name))


def check_size(found: Size, size: Size, path: Path, *, what: str) -> None:
    if found != size:
        raise UnusableFile(path, f"{what} {found[1]}x{found[0]} pixels, but its image has {size[1]}x{size[0]}")


def seed_in(name: str, drawn: Drawn) -> int | None:
    """Return the seed of dataset.json that a file name contains, or None if it contains none or several."""
    words = {int(digits) for digits in re.findall(r"(?<![^\W_])\d{10}(?![^\W_])", name, re.ASCII)}
    seeds = words & drawn.images.keys()
    return seeds.pop() if len(seeds) == 1 else None


def annotation_files(folder: Path, suffix: str, drawn: Drawn) -> dict[int, Path]:
    """Return each seed's file, or its default path if it has none. Refuses a file that belongs to no image."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        seed = seed_in(path.name, drawn)
        if seed is None:
            raise UnusableFile(path, f"belongs to no image of dataset.json; remove it, or name it SEED{suffix}")
        if seed in found:
            raise UnusableFile(path, f"and {found[seed].name} are both of seed {seed}; remove one")
        found[seed] = path
    return {seed: found.get(seed, folder / f"{seed:010d}{suffix}") for seed in drawn.images}
