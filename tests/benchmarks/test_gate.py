"""Tests of the gate benchmark's arithmetic, on samples with known results."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from labelmint.core.calibration import SCORE_KINDS
from labelmint.models.draw import draw
from labelmint.models.store import load_generator, load_interpreter
from tests.conftest import ROOT

pytestmark = pytest.mark.torch


pytest.importorskip("matplotlib")
spec = importlib.util.spec_from_file_location("gate", ROOT / "benchmarks" / "gate.py")
assert spec is not None and spec.loader is not None
gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate)


def test_it_compares_the_scores_that_an_export_can_have(tmp_path: Path) -> None:
    """Every kind's score is what the interpreter of that kind says of the same seed."""
    columns = gate.measure(2, tmp_path / "kept.npz")
    assert set(columns) == {*SCORE_KINDS, "error", *gate.faces.CLASS_NAMES}
    assert columns["skin"].tolist() == [1.0, 1.0]
    generator = load_generator(gate.GENERATOR)
    for score_kind in SCORE_KINDS:
        interpreter = load_interpreter(gate.INTERPRETER, score_kind)
        _, features = draw(generator, gate.FIRST_SEED + 1, 1.0, layout=interpreter.spec.layout)
        assert columns[score_kind][1] == pytest.approx(interpreter(features)[2].item(), rel=1e-5), score_kind


def test_risk_is_the_mean_error_of_what_is_kept() -> None:
    risk = gate.risk_coverage(np.array([2, 0, 1]), np.array([0.2, 0.6, 0.1]))
    assert np.allclose(risk, [0.1, 0.15, 0.3])


def test_the_oracle_gains_all_and_noise_nothing() -> None:
    rng = np.random.default_rng(0)
    error = rng.random(2000)
    columns = {"sum": error, "top10_mean": -error, "mean_entropy": rng.random(2000), "mixture_entropy": error**3}
    classes = {name: np.ones(2000) for name in gate.faces.CLASS_NAMES}
    curves, figures = gate.evaluate(columns | classes | {"error": error})
    gain = figures["share_of_oracle_gain"]
    assert gain["sum"] == pytest.approx(1.0) and gain["mixture_entropy"] == pytest.approx(1.0)
    assert gain["top10_mean"] < -0.9 and abs(gain["mean_entropy"]) < 0.1
    assert all(curve[-1] == pytest.approx(error.mean()) for curve in curves.values())
    assert figures["spearman_with_error"]["sum"] == pytest.approx(1.0)


def test_a_rare_class_is_kept_as_far_as_its_scores_allow() -> None:
    scores = np.arange(1000.0)
    columns = {"sum": scores, "glasses": np.ones(1000), "hat": (scores < 100).astype(float)}
    columns["beard"] = (scores >= 850).astype(float)  # 50 of these 150 are among the 900 lowest scores
    columns["earring"] = (scores >= 950).astype(float)
    wanted = {"glasses": 0.9, "beard": pytest.approx(1 / 3), "hat": 1.0, "earring": 0.0}
    assert gate.kept_of_rare_classes(columns, "sum") == wanted
