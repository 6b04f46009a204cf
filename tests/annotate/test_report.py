"""The report: one file for itself, with what was drawn, predicted and wrong, readable for everyone."""

import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.async_playwright import Axe
from PIL import Image
from playwright.async_api import async_playwright

from labelmint.annotate.report import page, write_report
from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import UNDRAWN, mask_path
from tests.annotate.conftest import CLASSES, Truth, rows_only

pytestmark = pytest.mark.torch


def pictures(text: str) -> dict[str, np.ndarray]:
    """The pictures of a page by what is said about them."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', text)
    return {said: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, said in found}


@pytest.mark.parametrize(("task", "form", "said"), [("segmentation", "png", "IoU"), ("keypoints", "csv", "keypoints")])
def test_fit_writes_it_for_each_task(directory: Path, task: str, form: str, said: str) -> None:
    command = [sys.executable, "-m", "labelmint.cli", "fit", "--generator", "generator.safetensors", "--task", task]
    command += ["--annotations", "parts", "--report", "out/report.html", "--steps", "2", "fitted.safetensors"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = (directory / "out" / "report.html").read_text()
    assert re.search(rf"report.html: Estimated .*{said}", done.stdout) and "<svg" in text
    assert len(pictures(text)) == 6 * 4 and (directory / "fitted.safetensors").exists()


def test_needs_nothing_else(truth: Truth) -> None:
    dataset = truth.dataset(range(4))
    text = page(dataset, truth.estimate(dataset), "4 <images>")
    assert not re.search(r"<script|<link|@import|url\(|https?:", text)
    assert "<bright>" not in text and "&lt;bright&gt;" in text and "4 &lt;images&gt;" in text


def test_the_pictures_show_what_was_drawn_and_what_is_wrong(truth: Truth) -> None:
    dataset = truth.dataset(range(4), rows_only)
    found = truth.estimate(dataset)
    shown = pictures(page(dataset, found, ""))
    for seed, label in dataset.labels.items():
        by_name = {said.removeprefix(f"Seed {seed}: "): x for said, x in shown.items() if f"Seed {seed}:" in said}
        _, drawn, predicted, difference = by_name.values()
        assert "drawn, 25% of the pixels" in by_name
        for k, colour in enumerate(CLASSES.palette):
            assert (drawn[label == k] == colour).all() and (predicted[found.predictions[seed] == k] == colour).all()
        wrong = (label != UNDRAWN) & (found.predictions[seed] != label)
        (mark,) = np.unique(difference[wrong], axis=0)
        assert ((difference == mark).all(axis=-1) == wrong).all()
        assert f"difference, {wrong.sum() / (label != UNDRAWN).sum():.1%} of the drawn pixels" in by_name


def test_one_image_is_shown_and_nothing_is_claimed(truth: Truth) -> None:
    dataset = truth.dataset(range(1))
    text = page(dataset, truth.estimate(dataset), "one")
    assert "Nothing can be estimated yet" in text and "nan" not in text.lower() and len(pictures(text)) == 2


def test_bad_annotations_are_named_and_no_report_is_written(directory: Path) -> None:
    mask_path(directory / "parts", 3).unlink()
    with pytest.raises(UnusableFile, match=r"0000000003.png does not exist"):
        write_report(
            directory / "generator.safetensors",
            directory / "parts",
            directory / "report.html",
            layout="paper",
            task="segmentation",
            annotation_format="png",
            unlabelled="background",
        )
    assert not (directory / "report.html").exists()


@pytest.mark.browser
@pytest.mark.parametrize("task", ["segmentation", "keypoints"])
async def test_accessibility_audit(truth: Truth, tmp_path: Path, task: str) -> None:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    dataset = truth.dataset(range(4)) if task == "segmentation" else truth.points(range(4))
    (tmp_path / "report.html").write_text(page(dataset, truth.estimate(dataset), "four"))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program)
        shown = await browser.new_page(viewport={"width": 1024, "height": 768})
        await shown.goto((tmp_path / "report.html").as_uri())
        found = await Axe().run(shown)
        assert found.violations_count == 0, found.generate_report()
        assert await shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        await browser.close()
