"""Tests that the generated pages are up to date with the results."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.unit


def page_of(script: str) -> str:
    """Return the page that a script of benchmarks/ would write, from a separate process."""
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import {script}; print({script}.page(), end='')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_page_is_what_the_results_make_of_it() -> None:
    made = page_of("report")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == made, "run `python benchmarks/report.py`"
    for name in ("gate",):
        figures = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert f"{100 * figures['area_under_risk_coverage']['sum']:.3f}" in made


def test_the_page_of_gpus_is_what_is_computed() -> None:
    assert (ROOT / "docs" / "gpu.md").read_text() == page_of("gpu_plan"), "run `python benchmarks/gpu_plan.py`"
