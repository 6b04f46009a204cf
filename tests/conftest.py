"""Shared fixtures: a running `labelmint serve` on the committed model repository.

Rules of this file:
- The service is the installed program in a separate process, with a real Triton, reached over real sockets.
- It takes free ports, because a developer may have a service running at the same time.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio

from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from playwright.async_api import Browser

# A shell starts background jobs with SIGINT ignored, and their child processes inherit that. Restore the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
REPOSITORY = ROOT / "model_repository"
READY = re.compile(r"ready after .* REST (https?://\S+) .*gRPC (\S+?)\. ", re.DOTALL)
START_SECONDS = 120


@dataclass
class Service:
    """A running `labelmint serve`."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m unit`, collect only marked files, because importing the others takes seconds and needs torch."""
    if config.option.markexpr != "unit":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return not any("pytest.mark.unit" in path.read_text() for path in files) or None


def need_program(name: str, package: str) -> str:
    """Return the program's path. If it is missing, skips the test; in CI, fails it."""
    beside = Path(sys.executable).parent
    found = shutil.which(name, path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        message = f"{name} is not installed (package {package})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def start_service(
    log: Path,
    *arguments: str,
    repository: Path = REPOSITORY,
    under: Sequence[str] = (),
    python: str = sys.executable,
) -> Service:
    """Start the program in `python`'s environment and wait until it logs that it is ready.

    `under` is a command that runs the program by exec, so that the process is the same.
    """
    command = [*under, python, "-m", "labelmint.cli", "serve", "--model-repository", str(repository)]
    command += ["--http-port", "0", "--grpc-port", "0", "--triton-log", str(log.with_suffix(".triton")), *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LABELMINT_", "OTEL_"))}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if (match := READY.search(log.read_text())) is not None:
            return Service(process, match[1], match[2], log)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"labelmint serve did not become ready:\n{log.read_text()}")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service as `make serve` starts it: the fused pipeline."""
    running = start_service(tmp_path_factory.mktemp("service") / "serve.log")
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="session")
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.http, timeout=60.0) as client:
        yield client


@pytest_asyncio.fixture(scope="session")
async def stub(service: Service) -> AsyncIterator[pb_grpc.SampleServiceStub]:
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        yield pb_grpc.SampleServiceStub(channel)


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with version 1 of `tiny`. Copy it before changing it."""
    # Imported here because most tests do not need torch.
    from labelmint.export.repository import export_repository
    from tests.support.models import tiny_weights

    repository = tmp_path_factory.mktemp("tiny") / "repository"
    export_repository(repository, "tiny", tiny_weights())
    return repository


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Path:
    """A repository with the versions 1 and 2 of `tiny`, and another model. Copy it before changing it."""
    from labelmint.export.repository import export_repository  # here: most tests need no torch
    from tests.support.models import tiny_weights

    repository = tmp_path_factory.mktemp("second") / "repository"
    shutil.copytree(tiny_repository, repository)
    export_repository(repository, "tiny", tiny_weights(2), version=2)
    export_repository(repository, "other", tiny_weights(3))
    return repository


@pytest.fixture(scope="session")
def light_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with `light`, which has 64x64 pixels. Copy it before changing it."""
    from tests.support.models import export_small

    repository = tmp_path_factory.mktemp("light") / "repository"
    export_small(repository, "light")
    return repository


@pytest_asyncio.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    from playwright.async_api import async_playwright  # here: most tests need no browser

    program = need_program("chromium", "chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program)
        yield browser
        await browser.close()
