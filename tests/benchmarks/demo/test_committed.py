"""The committed weights: rounded, and written with the same bytes each time."""

import shutil
from pathlib import Path

import pytest
import torch
from demo import committed

from labelmint.models.store import load_interpreter, read_notes

pytestmark = pytest.mark.torch


def test_the_committed_weights_have_the_precision_of_bfloat16(tmp_path: Path) -> None:
    for path in sorted(committed.WEIGHTS.glob("*.safetensors")):
        again = shutil.copy(path, tmp_path)
        committed.round_weights(tmp_path / path.name)
        assert Path(again).read_bytes() == path.read_bytes(), path.name


def test_rounding_keeps_the_notes_and_nearly_the_values(tmp_path: Path) -> None:
    path = Path(shutil.copy(committed.INTERPRETER, tmp_path / "other.safetensors"))
    before = load_interpreter(path)
    with torch.no_grad():
        for value in before.state_dict().values():
            value.mul_(1.0 + 1e-4)
    committed.save_interpreter(path, before, read_notes(path) | {"seeds": [7]})
    committed.round_weights(path)
    assert read_notes(path)["seeds"] == [7]
    for name, value in load_interpreter(path).state_dict().items():
        assert torch.equal(value, value.bfloat16().float()), name
        torch.testing.assert_close(value, before.state_dict()[name], rtol=2**-8, atol=0.0)
