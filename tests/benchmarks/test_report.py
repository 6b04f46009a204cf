"""Tests that the generated pages are up to date with the results."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.unit


def printed(code: str) -> str:
    """Return what code prints that uses benchmarks/, from a separate process."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks'); {code}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_page_is_what_the_results_make_of_it() -> None:
    made = printed("import report; print(report.page(), end='')")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == made, "run `python benchmarks/report.py`"
    for name in ("gate",):
        figures = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert f"{100 * figures['area_under_risk_coverage']['sum']:.3f}" in made


def test_the_page_of_gpus_is_what_the_results_make_of_it() -> None:
    made = printed("from gpu import page; print(page.page(*page.stored()), end='')")
    assert (ROOT / "docs" / "gpu.md").read_text() == made, "run `python benchmarks/report.py`"
    measured = (ROOT / "benchmarks" / "results" / "gpu.json").exists()
    assert ("Nothing on this page was measured on a GPU" in made) != measured


def test_the_plan_for_gpus_is_what_is_computed() -> None:
    made = json.loads(printed("import gpu_plan, json; print(json.dumps(gpu_plan.plan()))"))
    stored = json.loads((ROOT / "benchmarks" / "results" / "gpu_plan.json").read_text())
    assert stored == made, "run `python benchmarks/gpu_plan.py`, then `python benchmarks/report.py`"
