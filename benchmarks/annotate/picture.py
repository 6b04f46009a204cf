"""Makes the picture of docs/annotating.md: the page with a few strokes on two images, and what they teach.

Rules of this file:
- The strokes are the simulated person's (`simulate.py`); the page shows them as it shows anybody's.

Run it as `PYTHONPATH=benchmarks python -m annotate.picture`.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from typing import Any

from demo import faces
from demo.annotate import exact_masks
from PIL import Image
from playwright.sync_api import sync_playwright
from resuming import ROOT

from annotate.quick import GENERATOR
from annotate.simulate import by_hand

OUT = ROOT / "docs" / "images" / "annotate.png"
SEEDS = (4_000_000_005, 4_000_000_007)  # the second one is open


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "labelmint.cli", "annotate", "--generator", str(GENERATOR)]
        with subprocess.Popen([*command, f"{directory}/drawings"], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                found = (re.search(r"annotate at (http://\S+)", line) for line in process.stdout)
                draw(address := next(match[1] for match in found if match))
                picture(address)
            finally:
                process.terminate()


def draw(address: str) -> None:
    classes = [{"name": n, "rgb": rgb} for n, rgb in zip(faces.CLASS_NAMES, faces.PALETTE, strict=True)]
    ask(address, "PUT", "classes", {"classes": classes})
    for seed, exact in exact_masks(SEEDS).items():
        ask(address, "POST", "images", {"seed": seed})
        ask(address, "PUT", f"images/{seed}/strokes", {"revision": 0, "strokes": by_hand(exact, seed).strokes})


def ask(address: str, method: str, path: str, body: Any) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}api/{path}", json.dumps(body).encode(), headers, method=method)
    urllib.request.urlopen(request, timeout=120).close()


def picture(address: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1280, "height": 820}, color_scheme="light")
        page.goto(address)
        page.locator("#others figure").nth(5).wait_for(timeout=120_000)
        page.wait_for_load_state("networkidle")
        shot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    shot.convert("RGB").quantize(256).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
