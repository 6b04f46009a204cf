"""Tests that the benchmarks' reference interpreter and labelmint's compute the same function."""

import numpy as np
import pytest
import torch
from reference import ReferenceInterpreter

from labelmint.core.calibration import SCORE_KINDS
from tests.support.interpreters import features, interpreter

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("score_kind", SCORE_KINDS)
@torch.no_grad()
def test_the_naive_interpreter_says_what_ours_says(score_kind: str) -> None:
    ours = interpreter(score_kind)
    label, js_map, js_score = ReferenceInterpreter(ours)(features(3))
    want_label, want_js_map, want_js_score = ours(features(3))
    assert label.dtype == torch.uint8 and label.shape == want_label.shape and label.unique().numel() > 1
    assert (label == want_label).float().mean() >= 0.9999
    np.testing.assert_allclose(js_map.numpy(), want_js_map.numpy(), atol=1e-6)
    np.testing.assert_allclose(js_score.numpy(), want_js_score.numpy(), rtol=1e-5)
