"""The training example: what it does to a pair, and that it trains on a live service from the command line."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, Service

sys.path.append(str(ROOT / "clients" / "pytorch"))
import train_segmenter

pytestmark = [pytest.mark.triton, pytest.mark.torch]


def test_it_pulls_trains_and_judges(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    evaluation = tmp_path / "exact.npz"
    image = rng.integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    np.savez(evaluation, image=image, label=rng.integers(0, 16, (3, 128, 128), dtype=np.uint8))
    weights = [tmp_path / "first.pt", tmp_path / "second.pt"]
    for out in weights:
        command = ["train_segmenter.py", str(out), "--endpoint", service.grpc, "--samples", "24", "--steps", "3"]
        monkeypatch.setattr(sys, "argv", [*command, "--evaluation", str(evaluation)])
        train_segmenter.main()
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:17]][:3] == ["background", "hair", "neck"] and len(table) == 34
    assert all(0.0 <= float(line.split()[1]) <= 1.0 for line in table)
    first, second = (torch.load(out) for out in weights)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_labels_move_with_their_pixels() -> None:
    torch.manual_seed(0)
    label = torch.zeros(8, 64, 64, dtype=torch.int64)
    label[:, 20:40, 10:30] = 7
    image = torch.where(label == 7, 1.0, -1.0)[:, None].expand(-1, 3, -1, -1)
    moved, ids = train_segmenter.augment(image, label)
    assert set(ids.unique().tolist()) == {0, 7, train_segmenter.IGNORE}
    bright = moved.mean(dim=1)
    for one in range(8):
        # The square went where its label went; edges are blurred, and its brightness was changed.
        assert bright[one][ids[one] == 7].mean() > bright[one][ids[one] == 0].mean() + 1.0


def test_ignored_pixels_are_not_judged() -> None:
    network = train_segmenter.Segmenter(3).eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        label = network(image.float() / 127.5 - 1.0).argmax(dim=1)
    found = train_segmenter.evaluate(network, image, label)
    assert all(value > 0.99 or np.isnan(value) for value in found)
    assert not np.isnan(found).all()
    spoiled = label.clone()
    spoiled[:, :16] = train_segmenter.IGNORE
    found = train_segmenter.evaluate(network, image, spoiled)
    assert all(value > 0.99 or np.isnan(value) for value in found) and not np.isnan(found).all()
