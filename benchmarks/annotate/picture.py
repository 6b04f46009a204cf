"""Makes the picture of docs/annotating.md: the page with a few strokes on two images, and what they teach.

Rules of this file:
- The strokes are those of the simulated person (`person.py`) before the first look; the page shows them as anybody's.

Run it as `PYTHONPATH=benchmarks python -m annotate.picture`.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from demo.annotate import exact_masks
from PIL import Image
from playwright.sync_api import sync_playwright
from resuming import ROOT

from annotate.latency import ask, open_image, page
from annotate.person import Drawing
from annotate.quick import GENERATOR

OUT = ROOT / "docs" / "images" / "annotate.png"
SEEDS = (4_000_000_005, 4_000_000_007)  # the second one is open


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, page(GENERATOR, Path(directory) / "drawings") as address:
        for seed, exact in exact_masks(SEEDS).items():
            drawing = Drawing(exact, seed)
            drawing.draw(lambda mask, exact=exact: exact)  # type: ignore[misc]  # nothing is wrong: no corrections
            open_image(address, seed)
            ask(address, "PUT", f"images/{seed}/strokes", {"revision": 0, "strokes": drawing.strokes})
        picture(address)


def picture(address: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        view = browser.new_page(viewport={"width": 1280, "height": 820}, color_scheme="light")
        view.goto(address)
        view.locator("#others figure").nth(5).wait_for(timeout=120_000)
        view.wait_for_load_state("networkidle")
        shot = Image.open(io.BytesIO(view.screenshot()))
        browser.close()
    shot.convert("RGB").quantize(256).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
