"""Reads segmentation masks of the images that `synth` wrote, in the format that the user names.

Rules of this file:
- The format is never guessed. Files of other formats in the same directory are ignored.
- A mask that is missing, left over, of the wrong size or out of range is an error that names the file. No mask is
  skipped.
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
    AnnotatedDataset,
    Drawn,
    Palette,
    Size,
    annotation_files,
    check_size,
    image_name,
    read_drawn,
    read_names,
    write_names,
)
from labelmint.models.annotations.files import Bytes, read_ids, write_png
from labelmint.models.annotations.marks import paint

MaskFormat = Literal["png", "labelme", "coco"]


@dataclass(frozen=True)
class LabelClasses:
    names: tuple[str, ...]
    palette: Palette


def mask_path(directory: Path, seed: int) -> Path:
    return directory / "masks" / image_name(seed)


def write_masks(directory: Path, classes: LabelClasses, masks: Mapping[int, Bytes]) -> None:
    """Write masks as an annotation tool would, in the format `png`."""
    for seed, mask in masks.items():
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette(bytes(value for colour in classes.palette for value in colour))
        write_png(mask_path(directory, seed), picture)
    write_names(directory / "classes.json", classes.names, classes.palette)


def read_masks(directory: Path, mask_format: str = "png") -> AnnotatedDataset:
    """Read all masks. Raises UnusableFile that names the first file that is missing or wrong."""
    drawn = read_drawn(directory)
    mend = 'list the classes as [{"name": "background", "rgb": [0, 0, 0]}, ...]'
    classes = LabelClasses(*read_names(directory / "classes.json", mend))
    if mask_format == "png":
        masks = _read_pngs(directory, drawn, len(classes.names))
    elif mask_format == "labelme":
        masks = paint(labelme.read_shapes(directory, drawn), classes.names, drawn, directory=directory)
    else:
        masks = paint(coco.read_shapes(directory, drawn), classes.names, drawn, directory=directory)
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
    if int(mask.max()) >= num_classes:
        raise UnusableFile(path, f"has class id {int(mask.max())}; classes.json names {num_classes} classes")
    return mask.astype(np.uint8)
