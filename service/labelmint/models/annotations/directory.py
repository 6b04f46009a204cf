"""The directory that `synth` writes: seeds, images, and the names that an annotator gives.

Rules of this file:
- dataset.json is written last, so a directory that has it is whole.
- Every image of dataset.json must be there; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field, TypeAdapter

from labelmint.errors import UnusableFile
from labelmint.models.annotations.files import Bytes, Strict, open_picture, read_json, write_json, write_png

Palette = tuple[tuple[int, int, int], ...]
Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Drawn:
    """What `synth` wrote: seeds with their images uint8 [R,R,3]."""

    truncation_psi: float
    images: Mapping[int, Bytes]

    def size(self, seed: int) -> Size:
        height, width, _ = self.images[seed].shape
        return height, width


class _Dataset(Strict):
    truncation_psi: Annotated[float, Field(ge=0, le=2)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]


_Channel = Annotated[int, Field(ge=0, le=255)]


class _Entry(Strict):
    name: Annotated[str, Field(min_length=1)]
    rgb: tuple[_Channel, _Channel, _Channel]


_DATASET = TypeAdapter(_Dataset)
# Class ids and keypoint numbers are bytes.
_ENTRIES = TypeAdapter(Annotated[list[_Entry], Field(min_length=1, max_length=256)])


def image_name(seed: int) -> str:
    return f"{seed:010d}.png"


def image_path(directory: Path, seed: int) -> Path:
    return directory / "images" / image_name(seed)


def write_dataset(directory: Path, generator_sha256: str, truncation_psi: float, images: Mapping[int, Bytes]) -> None:
    """What `synth` writes."""
    check_new(directory)
    (directory / "images").mkdir(parents=True)
    (directory / "masks").mkdir()
    for seed, image in images.items():
        write_png(image_path(directory, seed), Image.fromarray(image))
    content = {"generator_sha256": generator_sha256, "truncation_psi": truncation_psi, "seeds": list(images)}
    write_json(directory / "dataset.json", content)


def check_new(directory: Path) -> None:
    """Old masks beside new images would be trained on without a word."""
    if directory.exists() and any(directory.iterdir()):
        raise UnusableFile(directory, "exists and is not empty; name a new directory")


def read_drawn(directory: Path) -> Drawn:
    """Raises UnusableFile naming dataset.json or the first image that is missing or broken."""
    dataset = read_json(directory / "dataset.json", _DATASET, "write the directory with `labelmint synth`")
    images = {}
    for seed in dataset.seeds:
        picture = open_picture(image_path(directory, seed), "dataset.json lists it; write it with `labelmint synth`")
        images[seed] = np.asarray(picture.convert("RGB"))
    return Drawn(dataset.truncation_psi, images)


def read_names(path: Path, mend: str) -> tuple[tuple[str, ...], Palette]:
    """Names and colours, in the order of their ids (classes.json, keypoints.json)."""
    entries = read_json(path, _ENTRIES, mend)
    names = tuple(entry.name for entry in entries)
    for name in names:
        if names.count(name) > 1:
            raise UnusableFile(path, f"names {name!r} twice; a name stands for one id")
    return names, tuple(entry.rgb for entry in entries)


def write_names(path: Path, names: Iterable[str], palette: Palette) -> None:
    write_json(path, [{"name": name, "rgb": list(rgb)} for name, rgb in zip(names, palette, strict=True)])


def id_of(name: str, names: tuple[str, ...], path: Path, where: str) -> int:
    """The id of a name that an annotator used at a place in a file."""
    if name not in names:
        raise UnusableFile(path, f"{where} has an unknown name; known are {', '.join(names)}")
    return names.index(name)


def check_size(found: Size, size: Size, path: Path, what: str) -> None:
    if found != size:
        raise UnusableFile(path, f"{what} {found[1]}x{found[0]} pixels, its image {size[1]}x{size[0]}")


def check_no_strays(paths: Iterable[Path], pattern: str) -> None:
    """Refuses an annotation of an image that dataset.json does not list. `paths`: the expected ones, of one folder."""
    expected = set(paths)
    for path in sorted({path.parent for path in expected}.pop().glob(pattern)):
        if path not in expected:
            raise UnusableFile(path, "belongs to no image of dataset.json; remove it")
