"""JSON and PNG files, read whole or refused, written aside and renamed.

Rules of this file:
- A file that is missing, broken or of another content is one UnusableFile that says where in the file and what to do.
- JSON is checked against a type, strictly: no number in quotes, no NaN, and what is not asked for is not looked at.
- Editors and spreadsheet programs put a byte order mark first; it is no content.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from labelmint.core.errors import UnusableFile

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")

# What Pillow raises for a picture that is none, broken off, spoiled, or declares a size beyond reason.
BROKEN_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Twice the side of the largest generators. A kilobyte of PNG can declare more pixels than there is memory.
MAX_PIXELS = 2048 * 2048
# Pillow spreads gray values of 2 and 4 bits over 0 to 255, by the name that it has for such bytes.
_SPREAD = {"L;2": 85, "L;4": 17}


class Strict(BaseModel):
    """An object in a JSON file of a tool: the keys that are read, in their exact types."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path, expected: TypeAdapter[T], mend: str) -> T:
    """`mend` says how to get such a file. Raises UnusableFile with the first place that is not as expected."""
    if not path.is_file():
        raise UnusableFile(path, f"does not exist; {mend}")
    try:
        return expected.validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), strict=True)
    except ValidationError as error:
        # Where alternatives exist, the one that fits best fails deepest.
        worst = max(error.errors(include_input=False), key=lambda entry: len(entry["loc"]))
        place = ".".join(map(str, worst["loc"]))
        raise UnusableFile(path, f"cannot be read: {place + ': ' if place else ''}{worst['msg']}; {mend}") from error


def open_picture(path: Path, mend: str) -> Image.Image:
    """A PNG, and nothing else that Pillow could read: for some formats it starts other programs."""
    return _opened(path, mend)[0]


def read_ids(path: Path, mend: str) -> npt.NDArray[np.uint16]:
    """The values [H,W] that a PNG with one channel or a palette stores, in 1 to 16 bits each."""
    picture, stored_as = _opened(path, mend)
    if picture.mode not in ("1", "L", "P", "I;16"):
        raise UnusableFile(path, f"is a {picture.mode} image; a mask has one channel (or a palette) of class ids")
    return np.asarray(picture).astype(np.uint16) // np.uint16(_SPREAD.get(stored_as, 1))


def fault_of(error: Exception) -> str:
    """What is wrong with a picture, without Pillow's name for the object that it read."""
    return "its bytes are of another kind" if isinstance(error, UnidentifiedImageError) else str(error)


def _opened(path: Path, mend: str) -> tuple[Image.Image, str]:
    """The picture and Pillow's name for the way that its pixels are stored."""
    if not path.is_file():
        raise UnusableFile(path, f"does not exist; {mend}")
    try:
        picture = Image.open(path, formats=["PNG"])
        if picture.width * picture.height > MAX_PIXELS:
            raise UnusableFile(path, f"declares {picture.width}x{picture.height} pixels, more than generators draw")
        stored_as = str(picture.tile[0].args) if picture.tile else ""
        picture.load()
    except BROKEN_PICTURE as error:
        raise UnusableFile(path, f"is not a whole image: {fault_of(error)}") from error
    return picture, stored_as


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8", newline="")
    os.replace(aside, path)


def write_png(path: Path, picture: Image.Image) -> None:
    aside = path.with_name(path.name + ".part")
    picture.save(aside, "PNG")
    os.replace(aside, path)
