"""Tests of the gate benchmark's arithmetic, on samples with known results."""

import importlib.util

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.torch


pytest.importorskip("matplotlib")
spec = importlib.util.spec_from_file_location("gate", ROOT / "benchmarks" / "gate.py")
assert spec is not None and spec.loader is not None
gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate)


def test_risk_is_the_mean_error_of_what_is_kept() -> None:
    risk = gate.risk_coverage(np.array([2, 0, 1]), np.array([0.2, 0.6, 0.1]))
    assert np.allclose(risk, [0.1, 0.15, 0.3])


def test_the_oracle_gains_all_and_noise_nothing() -> None:
    rng = np.random.default_rng(0)
    error = rng.random(2000)
    columns = {"sum": error, "top10_mean": -error, "mean_entropy": rng.random(2000), "mixture_entropy": error**3}
    curves, figures = gate.evaluate(columns | {"error": error})
    gain = figures["share_of_oracle_gain"]
    assert gain["sum"] == pytest.approx(1.0) and gain["mixture_entropy"] == pytest.approx(1.0)
    assert gain["top10_mean"] < -0.9 and abs(gain["mean_entropy"]) < 0.1
    assert all(curve[-1] == pytest.approx(error.mean()) for curve in curves.values())
    assert figures["spearman_with_error"]["sum"] == pytest.approx(1.0)
