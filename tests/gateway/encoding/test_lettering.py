"""Names in pictures: a font that has the characters draws them, or they are spelt out; no boxes, nothing cut off."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from labelmint.core.policy import SampleOptions, terms_of
from labelmint.gateway.encoding import figure, lettering
from labelmint.gateway.encoding.people import overlay_png
from labelmint.gateway.sampling.sample import Sample
from tests.support.served import MODEL

pytestmark = pytest.mark.unit


# matplotlib ships DejaVu, which has Cyrillic, Arabic and a few emoji, but no Chinese.
DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A function that makes the given folders the only ones searched for fonts."""
    cached = (lettering._runs_of, lettering._font_with, lettering._machine_fonts, lettering._say_what_is_missing)

    def has(*folders: str) -> None:
        monkeypatch.setattr(lettering, "_FOLDERS", folders)
        for function in cached:
            function.cache_clear()

    return has


def overlay(*names: str) -> bytes:
    palette = tuple((number, 0, 0) for number in range(len(names)))
    image = np.zeros((8, 8, 3), np.uint8)
    label = (np.arange(64) % len(names)).reshape(8, 8).astype(np.uint8)
    model = replace(MODEL, label_names=names, palette=palette)
    terms = terms_of(model, SampleOptions(max_js=5.0))
    return overlay_png(Sample(model, 7, None, terms, image, {"label": label}, js_map=None, js_score=3.0))


def drawn_by(text: str) -> list[tuple[str, str]]:
    return [(run.text, run.font.stem if run.font else "") for run in lettering._runs_of(text)]


@pytest.mark.parametrize("folders", [(), (DEJAVU,)], ids=["no fonts", "DejaVu"])
@pytest.mark.parametrize(
    ("one", "other"), [("бровь", "брось"), ("眼睛", "眉毛"), ("😀", "😎"), ("عين", "حاجب"), ("é", "è")]
)
def test_no_name_is_a_row_of_boxes(machine: Machine, folders: tuple[str, ...], one: str, other: str) -> None:
    """A missing glyph's box looks the same for every character, so two names drawn as boxes would be equal."""
    machine(*folders)
    assert overlay("background", one) != overlay("background", other)


def test_each_part_is_drawn_by_a_font_that_has_it(machine: Machine) -> None:
    machine(DEJAVU)
    assert drawn_by("left eye") == [("left eye", "")]
    assert drawn_by("левая бровь") == [("левая бровь", "DejaVuSans")]
    assert drawn_by("eye: глаз 😀") == [("eye: ", ""), ("глаз 😀", "DejaVuSans")]
    assert drawn_by("x 中国 й") == [("x [U+4E2D][U+56FD] ", ""), ("й", "DejaVuSans")]
    assert drawn_by("и\u0306") == [("и\u0306", "DejaVuSans")]  # a combining mark stays with its letter
    assert drawn_by("left\n\teye") == [("left  eye", "")]
    assert drawn_by("คิ") == [("[U+0E04 U+0E34]", "")]


def test_what_is_missing_is_said_once(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine()
    overlay("background", "眼睛", "бровь")
    overlay("background", "眉毛")
    (record,) = caplog.records
    assert record.getMessage() == (
        "no installed font has U+773C, used in a class or keypoint name; pictures show its code point; "
        "install fonts (apt install fonts-dejavu-core fonts-unifont)"
    )


def test_fonts_of_the_machine_change_nothing_of_ascii(machine: Machine) -> None:
    machine()
    without = overlay("background", "left eye ~!", "x" * 40)
    machine(DEJAVU)
    assert overlay("background", "left eye ~!", "x" * 40) == without


def test_a_file_that_is_no_font_is_passed_over(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "A.ttf").write_bytes(b"not a font")
    machine(str(tmp_path), DEJAVU)
    assert drawn_by("бровь") == [("бровь", "DejaVuSans")]


@pytest.mark.parametrize("name", ["я" * 200, "眼" * 40, "w" * 200])
def test_no_name_is_cut(machine: Machine, name: str) -> None:
    machine(DEJAVU)
    picture = np.asarray(Image.open(io.BytesIO(overlay("background", name))))
    assert (picture[440:, -8:] == figure.PAPER).all()
    assert (picture[440:, -30:-12] != figure.PAPER).any()
