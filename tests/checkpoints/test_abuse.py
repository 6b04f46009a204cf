"""The attacks of tests/torture on files, briefly; `make torture` runs them at full length."""

from pathlib import Path

import pytest
import torch

from labelmint.models.store import save_interpreter
from tests.support.models import tiny_weights
from tests.torture import files, pickle_fuzz

pytestmark = pytest.mark.torch


def test_crafted_weights_and_annotations_are_refused(tmp_path: Path) -> None:
    outcome = files.crafted(tmp_path, checkpoints=False)
    assert outcome.tries > 60 and not outcome.findings, outcome


def test_weights_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "interpreter.safetensors"
    save_interpreter(path, tiny_weights()[1], {})
    outcome = files.cut({"interpreter": ("interpreter", path.read_bytes())}, tmp_path)
    assert outcome.tries and not outcome.findings, outcome


def test_a_short_guided_fuzz_of_checkpoints_finds_nothing(tmp_path: Path) -> None:
    outcome = pickle_fuzz.fuzz(tmp_path, 2_000, 20)
    assert outcome.tries >= 100 and not outcome.findings, outcome
