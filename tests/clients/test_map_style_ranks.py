"""Two processes under each training library read a map-style dataset as they read any: each epoch divides all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from labelmint_client import Sample, SampleOptions
from tests.conftest import Service
from tests.support.ranks import run

pytestmark = [pytest.mark.triton, pytest.mark.torch]

WANTED = 24  # samples of an epoch: two ranks' batches of three, so that no library pads the last one


@pytest.mark.parametrize("library", ["torchrun", "accelerate", "trainer", "lightning"])
def test_both_ranks_share_each_shuffled_epoch(
    indexed: Service, light_options: SampleOptions, light_accepted: list[Sample], tmp_path: Path, library: str
) -> None:
    wanted = [sample.seed for sample in light_accepted[:WANTED]]
    arguments = [indexed.grpc, str(wanted[-1] + 1), repr(light_options.max_js)]
    script = Path(__file__).with_name("map_style_rank.py")
    first, second = run(library, arguments, tmp_path / "out", script=script)
    assert first and first.keys() == second.keys()
    for case, epochs in first.items():
        assert len(epochs) == 2
        for mine, other in zip(epochs, second[case], strict=True):
            assert len(mine) == len(other) and sorted(mine + other) == wanted, case
            assert mine != sorted(mine), f"{case}: not shuffled"
        assert epochs[0] != epochs[1], f"{case}: each epoch has an order of its own"
