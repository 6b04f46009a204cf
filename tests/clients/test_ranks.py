"""Two processes under each training library, with the real one: every accepted seed comes once over both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labelmint_client import SampleOptions
from labelmint_client.torch import LabeledSampleDataset
from tests.conftest import ROOT, Service

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SCRIPT = Path(__file__).with_name("rank.py")
STEPS = 4
LIBRARIES = ["torchrun", "accelerate", "accelerate_with_workers", "trainer", "lightning"]
REFUSALS = ("Accelerate divides this loader", "loses samples where the last batches")
WANTED = 2 * 3 * STEPS  # accepted samples of a pass: two ranks' batches of three, so that no library pads the last one


def run(library: str, arguments: list[str], out: Path, ranks: int = 2, script: Path = SCRIPT) -> list[dict[str, Any]]:
    """What the first `ranks` of two processes got; torchrun's variables, but Lightning starts its own processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LABELMINT_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    inherited |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "STEPS": str(STEPS), "OMP_NUM_THREADS": "1"}
    inherited |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), library, *arguments, str(out)]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    processes = [
        subprocess.Popen(command, env=inherited | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for place in ([{}] if library == "lightning" else places)
    ]
    try:
        for process in processes[:ranks]:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]


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
