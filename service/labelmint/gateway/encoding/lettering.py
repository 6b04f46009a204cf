"""Text in pictures for people: in Pillow's own font, and in fonts of this machine where that one lacks a glyph.

Rules of this file:
- No text is ever drawn as the box of a missing glyph: what no font has is written as code points, like U+4E2D.
- What Pillow's own font has looks the same on every machine, to the byte. The rest looks as the machine's fonts do.
- Fonts are looked for once, when a text needs them first.
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

# Where Linux keeps fonts: for all users, and for one.
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
# Debian's packages that together have the scripts and symbols of Unicode, in 17 MB.
_PACKAGES = "fonts-dejavu-core fonts-unifont"
# A plain face is taken before those whose file is named for another one.
_SPECIAL = ("bold", "black", "light", "thin", "medium", "italic", "oblique", "condensed", "mono", "serif", "math")
# Unicode promises that this is no character, so that every font draws its missing glyph for it.
_NOT_A_CHARACTER = "\uffff"
# Not assigned to any character. A font that has it (Last Resort) stands in for all others and has nothing to read.
_UNASSIGNED = "\u0378"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Run:
    """A part of a text that one font draws; None is Pillow's own."""

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
    """The width in pixels that `draw_text` takes."""
    return sum(run.at(size).getlength(run.text) for run in _runs_of(text))


@cache
def own_font(size: int) -> Font:
    """Pillow's own font."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _runs_of(text: str) -> tuple[_Run, ...]:
    runs: list[_Run] = []
    for part, own in _parts_of(re.sub(r"\s", " ", text)):  # one line, whatever the name
        drawn = [_Run(part, None)] if own else _in_other_fonts(part)
        if runs and runs[-1].font is None is drawn[0].font:
            drawn[0] = _Run(runs.pop().text + drawn[0].text, None)
        runs += drawn
    return tuple(runs)


def _parts_of(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of the text that Pillow's own font has (True) or lacks, as long as they can be.

    A mark stays with the character that it stands on, and a space between two words that are lacking with them.
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
    """The characters of a text, each with the marks that stand on it."""
    letters: list[str] = []
    for character in text:
        if letters and (unicodedata.category(character)[0] == "M" or _is_format(character)):
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _in_other_fonts(part: str) -> list[_Run]:
    """One font that has all of the part, else one for each letter, else its code points."""
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
    if _say_what_is_missing.cache_info().currsize == 0:  # the first is enough
        logger.warning(
            "no font here has %s, of a class or keypoint: pictures spell it out; install fonts (apt install %s)",
            point,
            _PACKAGES,
        )


@lru_cache(maxsize=4096)
def _font_with(characters: frozenset[str]) -> Path | None:
    return next((path for path in _machine_fonts() if all(_has(path, each) for each in characters)), None)


@cache
def _machine_fonts() -> tuple[Path, ...]:
    """The fonts of this machine, the plainest first."""
    found = []
    for folder in _FOLDERS:
        for root, _, names in os.walk(Path(folder).expanduser()):
            found += [Path(root, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def special(path: Path) -> tuple[int, str, str]:
        return sum(word in path.stem.lower() for word in _SPECIAL), path.name, str(path)

    return tuple(sorted(found, key=special))


@lru_cache(maxsize=65536)
def _has(path: Path | None, character: str) -> bool:
    """Whether a font draws the character as something else than what it draws for none."""
    if character.isspace() or _is_format(character):
        return True
    try:
        font = own_font(24) if path is None else _truetype(path, 24)
        missing = _drawn(font, _NOT_A_CHARACTER)
        return _drawn(font, character) != missing and (path is None or _drawn(font, _UNASSIGNED) == missing)
    except (OSError, ValueError):  # no font, or one of pictures in other sizes
        return False


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@cache
def _truetype(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _is_format(character: str) -> bool:
    """Whether a character is a sign to the layout (joiner, variation selector) and has no glyph of its own."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
