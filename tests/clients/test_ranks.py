"""Two processes under each training library, with the real one: every accepted seed comes once over both."""

from __future__ import annotations

from pathlib import Path

import pytest

from labelmint_client import SampleOptions
from labelmint_client.torch import LabeledSampleDataset
from tests.conftest import Service
from tests.support.ranks import STEPS, run

pytestmark = [pytest.mark.triton, pytest.mark.torch]


LIBRARIES = ["torchrun", "accelerate", "accelerate_with_workers", "trainer", "lightning"]
REFUSALS = ("Accelerate divides this loader", "loses samples where the last batches")
WANTED = 2 * 3 * STEPS  # accepted samples of a pass: two ranks' batches of three, so that no library pads the last one


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_seed_comes_once_over_both_ranks(
    gateway: Service, options: SampleOptions, accepted: list[int], tmp_path: Path, library: str
) -> None:
    wanted = accepted[:WANTED]
    first, second = run(library, [gateway.grpc, str(wanted[-1] + 1), repr(options.max_js)], tmp_path / "out")
    wrong = {}
    for case, got in first.items():
        if case.startswith("refused"):
            fits = any(words in str(got) for words in REFUSALS)
        elif case == "trained":  # DistributedDataParallel counts steps: its ranks' shards differ in length
            fits = [got, second[case]] == [[seed for seed in wanted if seed % 2 == rank][:6] for rank in range(2)]
        else:
            fits = isinstance(got, list) and isinstance(second[case], list) and sorted(got + second[case]) == wanted
        if not fits:
            wrong[case] = (got, second[case])
    assert first and not wrong, (wrong, wanted)


def test_a_state_of_batches_that_are_fetched_ahead_is_refused(
    gateway: Service, options: SampleOptions, accepted: list[int], tmp_path: Path
) -> None:
    """By the process that reads; the other one waits for it until the job ends."""
    arguments = [gateway.grpc, str(accepted[WANTED - 1] + 1), repr(options.max_js)]
    (first,) = run("accelerate_stateful", arguments, tmp_path / "out", ranks=1)
    assert "would lose samples: give DataLoaderConfiguration(dispatch_batches=False)" in str(first)


def test_a_world_without_a_rank_is_refused(gateway: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's children are told their rank after the dataset is made."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    dataset = LabeledSampleDataset(gateway.grpc, "tiny", end_seed=8, options=SampleOptions(max_js=1e9))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 and RANK is not set"):
        iter(dataset)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="there is no such rank"):
        iter(dataset)
