"""The annotated images on disk: what `synth` writes, a person completes, and `fit` reads.

Rules of this file:
- DIRECTORY/dataset.json     seeds, truncation and the digest of the generator that drew the images
- DIRECTORY/images/SEED.png  the images; fit draws them again and compares, so that mask and features belong together
- DIRECTORY/masks/SEED.png   by the annotator: one channel or palette, pixel values are class ids
- DIRECTORY/classes.json     by the annotator: [{"name": ..., "rgb": [r, g, b]}, ...], the index is the class id
- What is missing, of the wrong size or out of range is named; nothing is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from labelmint.errors import UnusableFile

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LabelClasses:
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class AnnotatedDataset:
    """Seeds with their images uint8 [R,R,3] and masks uint8 [R,R]."""

    truncation_psi: float
    classes: LabelClasses
    images: Mapping[int, Bytes]
    masks: Mapping[int, Bytes]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def image_path(directory: Path, seed: int) -> Path:
    return directory / "images" / f"{seed:010d}.png"


def mask_path(directory: Path, seed: int) -> Path:
    return directory / "masks" / f"{seed:010d}.png"


def write_dataset(directory: Path, generator_sha256: str, truncation_psi: float, images: Mapping[int, Bytes]) -> None:
    """What `synth` writes; dataset.json comes last, so a directory that has it is whole."""
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


def write_masks(directory: Path, classes: LabelClasses, masks: Mapping[int, Bytes]) -> None:
    """What an annotation tool would write."""
    for seed, mask in masks.items():
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette(bytes(value for colour in classes.palette for value in colour))
        write_png(mask_path(directory, seed), picture)
    entries = [{"name": name, "rgb": list(rgb)} for name, rgb in zip(classes.names, classes.palette, strict=True)]
    write_json(directory / "classes.json", entries)


def read_dataset(directory: Path) -> AnnotatedDataset:
    """Raises UnusableFile naming the first file that is missing or not what it should be."""
    data = _read_json(directory / "dataset.json", "write one with `labelmint synth`")
    classes = _read_classes(directory / "classes.json")
    images, masks = {}, {}
    for seed in _seeds(directory / "dataset.json", data):
        images[seed] = np.asarray(_open(image_path(directory, seed)).convert("RGB"))
        masks[seed] = _read_mask(mask_path(directory, seed), images[seed].shape[:2], len(classes.names))
    return AnnotatedDataset(float(data.get("truncation_psi", 1.0)), classes, images, masks)


def write_json(path: Path, content: object) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def write_png(path: Path, picture: Image.Image) -> None:
    aside = path.with_name(path.name + ".part")
    picture.save(aside, "PNG")
    os.replace(aside, path)


def _seeds(path: Path, data: Any) -> Iterable[int]:
    seeds = data.get("seeds") if isinstance(data, dict) else None
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UnusableFile(path, "has no list of seeds; write it again with `labelmint synth`")
    return seeds


def _read_classes(path: Path) -> LabelClasses:
    entries = _read_json(path, 'list the classes as [{"name": "background", "rgb": [0, 0, 0]}, ...]')
    try:
        names = tuple(str(entry["name"]) for entry in entries)
        palette = tuple((int(r), int(g), int(b)) for r, g, b in (entry["rgb"] for entry in entries))
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableFile(path, f"is not a list of name and rgb: {error!r}") from error
    return LabelClasses(names, palette)


def _read_mask(path: Path, size: tuple[int, ...], num_classes: int) -> Bytes:
    picture = _open(path)
    if picture.mode not in ("L", "P", "1"):
        raise UnusableFile(path, f"is a {picture.mode} image; a mask has one channel (or a palette) of class ids")
    mask = np.asarray(picture, dtype=np.uint8)
    if mask.shape != size:
        raise UnusableFile(path, f"is {mask.shape[1]}x{mask.shape[0]} pixels, its image {size[1]}x{size[0]}")
    if int(mask.max()) >= num_classes:
        raise UnusableFile(path, f"has class id {int(mask.max())}; classes.json names {num_classes} classes")
    return mask


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise UnusableFile(path, "does not exist; every image of dataset.json needs its image and its mask")
    try:
        picture = Image.open(path)
        picture.load()
    except (UnidentifiedImageError, OSError) as error:
        raise UnusableFile(path, f"is not a whole image: {error}") from error
    return picture


def _read_json(path: Path, mend: str) -> Any:
    if not path.is_file():
        raise UnusableFile(path, f"does not exist; {mend}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableFile(path, f"is not JSON: {error}") from error
