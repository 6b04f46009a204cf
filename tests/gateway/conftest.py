"""One real Triton with small models of known temper, and gateways of any limits before it.

Rules of this file:
- `light` is fast and has 64x64 pixels. `patient` holds what waits for its first step until a batch of 16 is full or
  HOLD_SECONDS are over: a queue in Triton as long as a test needs it, on any machine.
- `held` holds what waits for its first step until a batch of 16 is full, for ever if need be: `release` fills it.
- `first` and `second` have room for one sample in the queue of that step, and hold it in the same way.
- `tiny`, in a repository of its own for gateways that start their Triton, has 16x16 pixels and no calibration.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import httpx
import pytest
import pytest_asyncio

from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import REPOSITORY, start_service
from tests.support.gateways import Gateway, StartGateway
from tests.support.inference import running
from tests.support.names import Names
from tests.support.repositories import copy_model, hold

MODELS = ("light", "patient", "held", "first", "second")


@pytest_asyncio.fixture
async def names() -> AsyncIterator[Names]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Names, local_addr=("127.0.0.1", 0))
    yield protocol
    transport.close()


@pytest_asyncio.fixture(scope="session")
async def small_triton(tmp_path_factory: pytest.TempPathFactory, light_repository: Path) -> AsyncIterator[TritonServer]:
    repository = Path(shutil.copytree(light_repository, tmp_path_factory.mktemp("small") / "repository"))
    for name in MODELS[1:]:
        copy_model(repository, "light", name)
    hold(repository, "patient_generator")
    hold(repository, "held_generator", seconds=600.0)
    hold(repository, "first_generator", 1)
    hold(repository, "second_style_interpreter", 1)
    async with running(repository, *MODELS) as server:
        yield server


@pytest.fixture(scope="session")
def start_gateway(small_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> StartGateway:
    @asynccontextmanager
    async def start(*arguments: str) -> AsyncIterator[Gateway]:
        directory = tmp_path_factory.mktemp("gateway")
        arguments = ("--triton-url", small_triton.grpc_url, *arguments)
        service = await asyncio.to_thread(start_service, directory / "serve.log", *arguments, repository=directory)
        try:
            async with (
                grpc.aio.insecure_channel(service.grpc) as channel,
                httpx.AsyncClient(base_url=service.http, timeout=60.0) as http,
            ):
                yield Gateway(service, pb_grpc.SampleServiceStub(channel), http)
        finally:
            assert await asyncio.to_thread(service.stop) == 0, service.log.read_text()

    return start


@pytest_asyncio.fixture(scope="session")
async def gateway(start_gateway: StartGateway) -> AsyncIterator[Gateway]:
    """With the limits that `labelmint serve` has by itself."""
    async with start_gateway() as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def narrow_gateway(start_gateway: StartGateway) -> AsyncIterator[Gateway]:
    """Four slots: what is beyond them waits in the gateway."""
    async with start_gateway("--triton-slots", "4") as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def faces_triton() -> AsyncIterator[TritonServer]:
    """The committed repository, for tests that start gateways of their own before it."""
    async with running(REPOSITORY, "faces") as server:
        yield server
