"""Makes the pictures of the README (seeds with labels and verdicts) and of docs/rest.md (the gallery).

Rules of this file:
- The pictures show what a caller gets, so they are made from the answers of a service of the demo's models.

Run it as `PYTHONPATH=benchmarks python -m demo.pictures`.
"""

from __future__ import annotations

import io
import json
import shutil
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright
from serving import gateway

from labelmint.triton.client import Array

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "docs" / "images"
FIRST_SEED = 39  # glasses and beards, and one sample that the gate rejects
GALLERY = "?model=faces&seed=0&count=24&view=overlay&max_quantile=0.9&where=glasses:0.01.."
COLUMNS, SIZE, MARGIN, CAPTION = 6, 176, 8, 24


def arrays(base: str, seed: int) -> dict[str, Array]:
    url = f"{base}/v1/models/faces/samples/{seed}.npz?include_rejected=true"
    with urllib.request.urlopen(url) as answer, np.load(io.BytesIO(answer.read())) as file:
        return dict(file)


def overlay(sample: dict[str, Array], palette: Array) -> Array:
    return (sample["image"] * 0.35 + palette[sample["label"]] * 0.65).astype(np.uint8)


def main() -> None:
    with gateway("--model-repository", str(ROOT / "model_repository")) as served:
        pairs(served.http)
        gallery(served.http)


def pairs(base: str) -> None:
    """Write six seeds, each with its label, its JS score and the gate's verdict."""
    with urllib.request.urlopen(f"{base}/v1/models/faces") as answer:
        classes = json.load(answer)["classes"]
    palette = np.array([[int(entry["rgb"][i : i + 2], 16) for i in (1, 3, 5)] for entry in classes])
    samples = [arrays(base, FIRST_SEED + column) for column in range(COLUMNS)]
    cell = SIZE + MARGIN
    sheet = Image.new("RGB", (COLUMNS * cell + MARGIN, 2 * cell + CAPTION + MARGIN + 28), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    for column, sample in enumerate(samples):
        left = MARGIN + column * cell
        verdict = "accepted" if sample["js_score"] <= sample["threshold"] else "rejected"
        colour = (0, 110, 84) if verdict == "accepted" else (178, 34, 34)
        text = f"seed {int(sample['seed'])} · JS {float(sample['js_score']):.0f} · {verdict}"
        draw.text((left, 6), text, colour, ImageFont.load_default(13))
        for row, picture in enumerate((sample["image"], overlay(sample, palette))):
            enlarged = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            sheet.paste(enlarged, (left, CAPTION + row * cell))
    font = ImageFont.load_default(13)
    widths = [22 + draw.textlength(entry["name"], font) for entry in classes]
    gap = (sheet.width - 2 * MARGIN - sum(widths)) / (len(classes) - 1)
    x, y = float(MARGIN), CAPTION + 2 * cell + 4
    for entry, width, colour in zip(classes, widths, palette.tolist(), strict=True):
        draw.rectangle((x, y, x + 13, y + 13), tuple(colour), (110, 114, 122))
        draw.text((x + 18, y - 2), entry["name"], (28, 30, 36), font)
        x += width + gap
    sheet.save(OUT / "pairs.png", optimize=True)


def gallery(base: str) -> None:
    """Write the gallery as a browser shows it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1280, "height": 820})
        page.goto(f"{base}/{GALLERY}")
        page.locator(".pair[data-verdict]").nth(8).wait_for()
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(1000)
        shot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    shot.convert("RGB").save(OUT / "gallery.png", optimize=True)


if __name__ == "__main__":
    main()
