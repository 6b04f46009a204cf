"""Reads JSON and PNG files completely or refuses them, and writes them to a temporary file that is then renamed.

Rules of this file:
- A file that is missing, damaged or has unexpected content raises one UnusableFile. It says where in the file the
  problem is and what to do.
- JSON is validated strictly against a type: no numbers in quotes, no NaN. Keys that the type does not have are ignored,
  because tools write many more keys.
- A byte order mark at the start is skipped, because editors and spreadsheet programs write one.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from labelmint.core.errors import UnusableFile
from labelmint.files import replacing

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")

# Pillow's exceptions for a file that is not a picture, is cut off or damaged, or declares an unreasonable size.
BROKEN_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Enough for twice the side of 1024x1024 generators. Without a limit, a PNG of a kilobyte could declare more pixels than
# fit in memory.
MAX_PIXELS = 2048 * 2048
# Pillow scales gray values of 2 and 4 bits to 0..255. These are the factors, by Pillow's names for the formats.
_SPREAD = {"L;2": 85, "L;4": 17}


class Strict(BaseModel):
    """An object in a tool's JSON file: the keys that are read, with their exact types."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path, expected: TypeAdapter[T], mend: str) -> T:
    """Read a JSON file. Raises UnusableFile with one place that is wrong, and with `mend`: how to get such a file."""
    if not path.is_file():
        raise UnusableFile(path, f"does not exist; {mend}")
    try:
        return expected.validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), strict=True)
    except ValidationError as error:
        # Report the deepest error: among alternatives, the best match fails at the deepest place.
        worst = max(error.errors(include_input=False), key=lambda entry: len(entry["loc"]))
        place = ".".join(map(str, worst["loc"]))
        raise UnusableFile(path, f"cannot be read: {place + ': ' if place else ''}{worst['msg']}; {mend}") from error


def open_picture(path: Path, mend: str) -> Image.Image:
    """Open a PNG. Pillow's other formats are disabled, because it starts other programs for some of them."""
    return _opened(path, mend)[0]


def read_ids(path: Path, mend: str) -> npt.NDArray[np.uint16]:
    """Read the values [H,W] of a PNG with one channel or a palette and 1 to 16 bits per value."""
    picture, stored_as = _opened(path, mend)
    if picture.mode not in ("1", "L", "P", "I;16"):
        raise UnusableFile(path, f"is a {picture.mode} image; a mask has one channel (or a palette) of class ids")
    return np.asarray(picture).astype(np.uint16) // np.uint16(_SPREAD.get(stored_as, 1))


def fault_of(error: Exception) -> str:
    """Describe what is wrong with a PNG, without the object name in Pillow's message."""
    return "it is not a PNG" if isinstance(error, UnidentifiedImageError) else str(error)


def _opened(path: Path, mend: str) -> tuple[Image.Image, str]:
    """Return the picture, and Pillow's name for the format of its stored pixels."""
    if not path.is_file():
        raise UnusableFile(path, f"does not exist; {mend}")
    try:
        picture = Image.open(path, formats=["PNG"])
        if picture.width * picture.height > MAX_PIXELS:
            raise UnusableFile(path, f"declares {picture.width}x{picture.height} pixels, more than labelmint reads")
        stored_as = str(picture.tile[0].args) if picture.tile else ""
        picture.load()
    except BROKEN_PICTURE as error:
        raise UnusableFile(path, f"is not a whole image: {fault_of(error)}") from error
    return picture, stored_as


def json_text(content: object) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: object) -> None:
    write_text(path, json_text(content))


def write_text(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def write_png(path: Path, picture: Image.Image) -> None:
    with replacing(path) as aside:
        picture.save(aside, "PNG")
