"""The commands of docs/rare-samples.md, run against a gateway with an index of fewer seeds than the document has."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from labelmint.seed_index.layout import Described
from labelmint.triton.server import TritonServer
from tests.conftest import ROOT, Service, start_service
from tests.support.inference import running
from tests.support.seed_index import real_columns, served, write

pytestmark = pytest.mark.triton

TEXT = (ROOT / "docs" / "rare-samples.md").read_text()
SEEDS = 96


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


async def index_of(server: TritonServer, directory: Path) -> None:
    model = await served(server.grpc_url, "faces")
    assert model.calibration is not None
    psi = model.calibration.truncation_psi
    columns = await real_columns(server.grpc_url, model, range(SEEDS), psi)
    write(directory / "faces.parquet", Described.of(model, truncation_psi=psi, class_index=None), columns)


@pytest_asyncio.fixture(scope="module")
async def indexed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    directory = tmp_path_factory.mktemp("rare")
    async with running(ROOT / "model_repository", "faces") as server:
        await index_of(server, directory / "index")
        arguments = ("--triton-url", server.grpc_url, "--index", str(directory / "index"))
        service = await asyncio.to_thread(start_service, directory / "serve.log", *arguments)
        yield service
        assert await asyncio.to_thread(service.stop) == 0, service.log.read_text()


def run(command: list[str], service: Service, directory: Path) -> str:
    http = service.http.removeprefix("http://")
    command = [
        word.replace("localhost:8080", http)
        .replace("localhost:50051", service.grpc)
        .replace("1000000", str(SEEDS))
        .replace("1_000_000", str(SEEDS))
        for word in command
    ]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands(indexed: Service, tmp_path: Path) -> None:
    archive, serving, listing = blocks("sh")
    assert run(["bash", "-ec", archive], indexed, tmp_path) == ""
    assert (tmp_path / "rare.tar").stat().st_size > 10_000
    page = json.loads(run(["bash", "-ec", listing], indexed, tmp_path))
    assert page["seed_count"] == page["next_seed"] == page["end_seed"] == SEEDS
    (script,) = blocks("python")
    count, first = run([sys.executable, "-c", script], indexed, tmp_path).splitlines()
    assert count == f"{page['delivered_count']} of {SEEDS} seeds" and page["delivered_count"] > 0
    assert re.fullmatch(r"\d+ True", first)
    for line in serving.splitlines():
        name, subcommand, *_ = line.split()
        assert name == "labelmint"
        if subcommand == "serve":
            assert "--index" in run([sys.executable, "-m", "labelmint.cli", "serve", "--help"], indexed, tmp_path)
