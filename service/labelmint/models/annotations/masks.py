"""Reads segmentation masks of the images that `synth` wrote, in the format that the user names.

Rules of this file:
- The format is never guessed. Files of other formats in the same directory are ignored.
- A mask that is missing, left over, of the wrong size or out of range is an error that names the file. No mask is
  skipped.
- A pixel with the value UNDRAWN was not drawn. An image without a drawn pixel is an error. So is a class that no image
  has, unless every pixel of every image is drawn: then the annotator saw that no image has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import coco, labelme
from labelmint.models.annotations.directory import (
    UNDRAWN,
    AnnotatedDataset,
    Drawn,
    Palette,
    Size,
    annotation_files,
    check_size,
    image_name,
    names_path,
    read_drawn,
    read_names,
    write_names,
)
from labelmint.models.annotations.files import Bytes, read_ids, write_png
from labelmint.models.annotations.marks import Unlabelled, paint

MaskFormat = Literal["png", "labelme", "coco"]


@dataclass(frozen=True)
class LabelClasses:
    names: tuple[str, ...]
    palette: Palette


def mask_path(directory: Path, seed: int) -> Path:
    return directory / "masks" / image_name(seed)


def write_masks(directory: Path, classes: LabelClasses, masks: Mapping[int, Bytes]) -> None:
    """Write masks as an annotation tool would, in the format `png`."""
    colours = bytes(value for colour in classes.palette for value in colour)
    for seed, mask in masks.items():
        picture = Image.fromarray(mask, mode="P")
        # Pillow stores as many bits per pixel as the palette needs, so the palette must reach the largest value.
        picture.putpalette(colours.ljust(3 * (UNDRAWN + 1), b"\0") if (mask == UNDRAWN).any() else colours)
        write_png(mask_path(directory, seed), picture)
    write_names(names_path(directory, "segmentation"), classes.names, classes.palette)


def read_masks(directory: Path, mask_format: str = "png", *, unlabelled: Unlabelled = "background") -> AnnotatedDataset:
    """Read all masks. Raises UnusableFile that names the first file that is missing or wrong.

    `unlabelled` says what the pixels are that no shape covers. Masks in PNG say so themselves, with UNDRAWN.
    """
    drawn = read_drawn(directory)
    mend = 'list the classes as [{"name": "background", "rgb": [0, 0, 0]}, ...]'
    classes = LabelClasses(*read_names(names_path(directory, "segmentation"), mend))
    if mask_format == "png":
        masks = _read_pngs(directory, drawn, len(classes.names))
    else:
        shapes = (labelme if mask_format == "labelme" else coco).read_shapes(directory, drawn)
        masks = paint(shapes, classes.names, drawn, directory=directory, unlabelled=unlabelled)
    _check_every_class(masks, classes.names, names_path(directory, "segmentation"))
    return AnnotatedDataset(
        "segmentation",
        drawn.truncation_psi,
        classes.names,
        classes.palette,
        drawn.images,
        masks,
        drawn.class_indices,
    )


def _read_pngs(directory: Path, drawn: Drawn, num_classes: int) -> dict[int, Bytes]:
    paths = annotation_files(directory / "masks", ".png", drawn)
    return {seed: _read_png(path, drawn.size(seed), num_classes) for seed, path in paths.items()}


def _read_png(path: Path, size: Size, num_classes: int) -> Bytes:
    mask = read_ids(path, "every image of dataset.json needs a mask")
    check_size((mask.shape[0], mask.shape[1]), size, path, what="is")
    drawn = mask[mask != UNDRAWN]
    if not drawn.size:
        raise UnusableFile(path, f"has no drawn pixel, only {UNDRAWN}; draw a part of its image")
    if int(drawn.max()) >= num_classes:
        raise UnusableFile(path, f"has class id {int(drawn.max())}; classes.json names {num_classes} classes")
    return mask.astype(np.uint8)


def _check_every_class(masks: Mapping[int, Bytes], names: tuple[str, ...], path: Path) -> None:
    drawn = set[int]().union(*(np.unique(mask).tolist() for mask in masks.values()))
    missing = [name for number, name in enumerate(names) if number not in drawn]
    if UNDRAWN in drawn and missing:
        raise UnusableFile(path, f"names {missing[0]!r}, which is drawn in no image; draw it in one, or remove it")
