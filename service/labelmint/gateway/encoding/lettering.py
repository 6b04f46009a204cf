"""Text in pictures for people: in Pillow's built-in font, or in a font of this machine if that one lacks a glyph.

Rules of this file:
- No text is ever drawn as the box of a missing glyph. A character that no font has is written as its code point, like
  U+4E2D.
- Text in Pillow's built-in font has the same bytes on every machine. Other text depends on the machine's fonts.
- The machine is searched for fonts once, when a text first needs one.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

# Where Linux keeps fonts: for all users, and for the current user.
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
# Debian packages that together cover the scripts and symbols of Unicode, in 17 MB.
_PACKAGES = "fonts-dejavu-core fonts-unifont"
# A regular face is preferred to a face whose file name contains one of these words.
_SPECIAL = ("bold", "black", "light", "thin", "medium", "italic", "oblique", "condensed", "mono", "serif", "math")
# Unicode guarantees that this is not a character. Every font therefore draws its missing glyph for it.
_NOT_A_CHARACTER = "\uffff"
# Not assigned to any character. A font that draws it (Last Resort) only has placeholder glyphs, which nobody can read.
_UNASSIGNED = "\u0378"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Run:
    """A part of a text that one font draws. The font None is Pillow's built-in font."""

    text: str
    font: Path | None

    def at(self, size: int) -> Font:
        return own_font(size) if self.font is None else _truetype(self.font, size)


def draw_text(
    draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, *, fill: tuple[int, ...], size: int
) -> None:
    """Draw `text` with the upper left corner of its line at `xy`."""
    runs = _runs_of(text)
    if [run.font for run in runs] == [None]:
        draw.text(xy, runs[0].text, fill, own_font(size))
        return
    x, y = xy
    own = own_font(size)
    assert isinstance(own, ImageFont.FreeTypeFont)
    baseline = y + own.getmetrics()[0]
    for run in runs:
        draw.text((x, baseline), run.text, fill, run.at(size), anchor="ls")
        x += run.at(size).getlength(run.text)


def length_of(text: str, size: int) -> float:
    """Return the width in pixels that `draw_text` needs."""
    return sum(run.at(size).getlength(run.text) for run in _runs_of(text))


@cache
def own_font(size: int) -> Font:
    """Return Pillow's built-in font."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _runs_of(text: str) -> tuple[_Run, ...]:
    runs: list[_Run] = []
    for part, own in _parts_of(re.sub(r"\s", " ", text)):  # names may contain line breaks; draw one line
        drawn = [_Run(part, None)] if own else _in_other_fonts(part)
        if runs and runs[-1].font is None is drawn[0].font:
            drawn[0] = _Run(runs.pop().text + drawn[0].text, None)
        runs += drawn
    return tuple(runs)


def _parts_of(text: str) -> Iterator[tuple[str, bool]]:
    """Split the text into the longest parts that Pillow's built-in font has (True) or lacks (False).

    A combining mark stays with its base character. A space between two characters that the font lacks stays with them.
    """
    letters = _letters_of(text)
    own = [all(_has(None, character) for character in letter) for letter in letters]
    for index in range(1, len(letters) - 1):
        if letters[index].isspace() and not own[index - 1] and not own[index + 1]:
            own[index] = False
    start = 0
    for index in range(1, len(letters) + 1):
        if index == len(letters) or own[index] != own[start]:
            yield "".join(letters[start:index]), own[start]
            start = index


def _letters_of(text: str) -> list[str]:
    """Split a text into characters, each with its combining marks and format characters."""
    letters: list[str] = []
    for character in text:
        if letters and (unicodedata.category(character)[0] == "M" or _is_format(character)):
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _in_other_fonts(part: str) -> list[_Run]:
    """Draw the part in one font that has all of it, else in one font per letter, else as code points."""
    if (font := _font_with(frozenset(part))) is not None:
        return [_Run(part, font)]
    letters = _letters_of(part)
    if len(letters) == 1:
        return [_Run(_spelt(part), None)]
    runs: list[_Run] = []
    for letter in letters:
        (run,) = [_Run(" ", None)] if letter.isspace() else _in_other_fonts(letter)
        if runs and runs[-1].font == run.font:
            run = _Run(runs.pop().text + run.text, run.font)
        runs.append(run)
    return runs


def _spelt(letter: str) -> str:
    points = [f"U+{ord(character):04X}" for character in letter if not _is_format(character)]
    _say_what_is_missing(points[0])
    return f"[{' '.join(points)}]"


@cache
def _say_what_is_missing(point: str) -> None:
    if _say_what_is_missing.cache_info().currsize == 0:  # one warning is enough
        logger.warning(
            "no installed font has %s, used in a class or keypoint name; pictures show its code point; "
            "install fonts (apt install %s)",
            point,
            _PACKAGES,
        )


@lru_cache(maxsize=4096)
def _font_with(characters: frozenset[str]) -> Path | None:
    return next((path for path in _machine_fonts() if all(_has(path, each) for each in characters)), None)


@cache
def _machine_fonts() -> tuple[Path, ...]:
    """Return the fonts of this machine, regular faces first."""
    found = []
    for folder in _FOLDERS:
        for root, _, names in os.walk(Path(folder).expanduser()):
            found += [Path(root, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def special(path: Path) -> tuple[int, str, str]:
        return sum(word in path.stem.lower() for word in _SPECIAL), path.name, str(path)

    return tuple(sorted(found, key=special))


@lru_cache(maxsize=65536)
def _has(path: Path | None, character: str) -> bool:
    """Whether a font draws the character as something other than its missing glyph."""
    if character.isspace() or _is_format(character):
        return True
    try:
        font = own_font(24) if path is None else _truetype(path, 24)
        missing = _drawn(font, _NOT_A_CHARACTER)
        return _drawn(font, character) != missing and (path is None or _drawn(font, _UNASSIGNED) == missing)
    except (OSError, ValueError):  # not a font, or a bitmap font without this size
        return False


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@cache
def _truetype(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _is_format(character: str) -> bool:
    """Whether a character only controls layout (joiner, variation selector) and has no glyph of its own."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
