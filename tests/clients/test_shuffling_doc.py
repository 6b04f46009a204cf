"""The programs of docs/shuffling.md, run as they stand but for the address and the number of seeds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from labelmint.seed_index.layout import Described
from labelmint.triton.server import TritonServer
from labelmint_client import Client, SampleOptions
from tests.clients.conftest import gateways_before
from tests.conftest import REPOSITORY, ROOT, Service
from tests.support.inference import running
from tests.support.seed_index import real_columns, served, write

pytestmark = [pytest.mark.triton, pytest.mark.torch]

SEEDS = range(40)


@pytest_asyncio.fixture(scope="module")
async def faces_triton() -> AsyncIterator[TritonServer]:
    async with running(REPOSITORY, "faces") as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def faces(faces_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    model = await served(faces_triton.grpc_url, "faces")
    assert model.calibration is not None
    psi = model.calibration.truncation_psi
    columns = await real_columns(faces_triton.grpc_url, model, SEEDS, psi)
    directory = tmp_path_factory.mktemp("index")
    write(directory / "seeds.parquet", Described.of(model, truncation_psi=psi, class_index=None), columns)
    with gateways_before(faces_triton, tmp_path_factory) as start:
        yield start("--index", str(directory), "--cache-bytes", "50000000")  # the programs read the same seeds


def test_the_programs_run(faces: Service, tmp_path: Path) -> None:
    shuffle, split, balance, *_ = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "shuffling.md").read_text(), re.DOTALL)
        if "LabeledSamples(" in block
    ]
    with Client(faces.grpc) as client:
        listed = [client.list_seeds("faces", options=SampleOptions(where=where)) for where in ((), ("hair:0.1..",))]
        classes = len(client.get_model("faces").class_names)
    count, with_hair = map(len, listed)
    evens = [int(seed) for seed in listed[0].seeds if seed % 2 == 0]
    assert f"Conv2d(3, {classes}," in shuffle

    first, *epochs = printed(shuffle, faces, tmp_path)
    assert first == f"{count} samples, the first of seed {listed[0].seeds[0]}"
    losses = [float(line.split()[1]) for line in epochs]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)

    assert printed(split, faces, tmp_path) == [
        f"16 {count - 16} torch.Size([3, 128, 128])",
        str([count - count // 5, count // 5]) if count % 5 == 0 else str([int(count * 0.8) + 1, int(count * 0.2)]),
        f"{len(evens)} even seeds, the last one {evens[-1]}",
        f"{with_hair} with hair",
    ]
    assert 16 < with_hair <= count

    batches = printed(balance, faces, tmp_path)
    assert len(batches) == -(-count // 8) and batches[0].startswith("torch.Size([8, 3, 128, 128]) [")


def printed(script: str, faces: Service, tmp_path: Path) -> list[str]:
    """The lines that a program prints."""
    for before, after in (
        ("localhost:50051", faces.grpc),
        ("start_seed=1000, end_seed=101_000", f"end_seed={SEEDS.stop}"),
    ):
        assert before in script
        script = script.replace(before, after)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning", done.stderr, re.IGNORECASE), done.stderr
    return done.stdout.splitlines()
