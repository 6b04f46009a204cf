"""One real Triton with small models of known temper, and gateways of any limits before it.

Rules of this file:
- `light` is fast and has 64x64 pixels. `patient` holds what waits for its first step until a batch of 16 is full or
  HOLD_SECONDS are over: a queue in Triton as long as a test needs it, on any machine.
- `first` and `second` have room for one sample in the queue of that step, and hold it in the same way.
- `tiny`, in a repository of its own for gateways that start their Triton, has 16x16 pixels and no calibration.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import httpx
import pytest
import pytest_asyncio
import torch
import tritonclient.grpc.aio as triton

from labelmint.export.repository import export_repository
from labelmint.models.generator import Generator
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint.triton.model_config import read_config, write_config
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import REPOSITORY, Service, start_service
from tests.export.test_repository import small

HOLD_SECONDS = 2.0
MODELS = ("light", "patient", "first", "second")


class Names(asyncio.DatagramProtocol):
    """A name server: every name has the IPv4 `addresses`, and does not exist while there are none."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.lookups = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, sender: object) -> None:
        question = data[12 : data.index(b"\0", 12) + 5]
        wanted = self.addresses if question[-4:-2] == b"\0\x01" else []  # A, not AAAA
        self.lookups += question[-4:-2] == b"\0\x01"
        flags = 0x8580 | (0 if self.addresses else 3)  # NXDOMAIN
        answer = data[:2] + struct.pack(">5H", flags, 1, len(wanted), 0, 0) + question
        for address in wanted:
            answer += b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
        self.transport.sendto(answer, sender)  # type: ignore[attr-defined]

    def url(self, port: int) -> str:
        return f"dns://127.0.0.1:{self.transport.get_extra_info('sockname')[1]}/triton.test:{port}"


@pytest_asyncio.fixture
async def names() -> AsyncIterator[Names]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Names, local_addr=("127.0.0.1", 0))
    yield protocol
    transport.close()


@dataclass
class Gateway:
    """A gateway before the Triton of small models, and its own channel and client."""

    service: Service
    stub: pb_grpc.SampleServiceStub
    http: httpx.AsyncClient

    async def metric(self, name: str) -> float:
        """The value of one line of /metrics; 0 where there is none."""
        for line in (await self.http.get("/metrics")).text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    async def until(self, name: str, holds: Callable[[float], bool]) -> float:
        """Wait until a metric is as it should be; returns it."""
        for _ in range(300):
            if holds(value := await self.metric(name)):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"{name} stayed {value}")


StartGateway = Callable[..., AbstractAsyncContextManager[Gateway]]


@torch.no_grad()
def export_small(repository: Path, model: str) -> None:
    torch.manual_seed(0)
    levels = (4, 8, 16, 32, 64)
    spec = StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=64, channels=dict.fromkeys(levels, 4))
    taps = {level: 4 if level == 4 else 8 for level in levels}
    interpreter = StyleInterpreter(InterpreterSpec("paper", 64, taps, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1))))
    for parameter in interpreter.parameters():
        parameter.normal_()
    export_repository(repository, model, Generator(spec).eval(), interpreter)


def copy_model(repository: Path, model: str, name: str, target: Path | None = None) -> None:
    """The fused pipeline of a model under another name, in the same repository or in `target`."""
    for suffix in ("", "_generator", "_style_interpreter"):
        copied = Path(shutil.copytree(repository / f"{model}{suffix}", (target or repository) / f"{name}{suffix}"))
        config = copied / "config.pbtxt"
        config.write_text(config.read_text().replace(f'"{model}', f'"{name}'))


def hold(repository: Path, step: str, max_queue_size: int | None = None) -> None:
    path = repository / step / "config.pbtxt"
    config = read_config(path)
    config.dynamic_batching.max_queue_delay_microseconds = int(HOLD_SECONDS * 1e6)
    if max_queue_size is not None:
        config.dynamic_batching.default_queue_policy.max_queue_size = max_queue_size
    write_config(path, config)


@torch.no_grad()
def tiny_weights(version: int = 1) -> tuple[Generator, StyleInterpreter]:
    """Versions differ by the first of the interpreter's parameters."""
    generator, interpreter = small()
    next(iter(interpreter.parameters())).add_(0.25 * (version - 1))
    return generator, interpreter


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Path:
    """A repository with the versions 1 and 2 of `tiny`, and another model."""
    repository = tmp_path_factory.mktemp("second") / "repository"
    shutil.copytree(tiny_repository, repository)
    export_repository(repository, "tiny", *tiny_weights(2), version=2)
    export_repository(repository, "other", *tiny_weights(3))
    return repository


@pytest_asyncio.fixture(scope="session")
async def small_triton(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TritonServer]:
    repository = tmp_path_factory.mktemp("small")
    export_small(repository, "light")
    for name in MODELS[1:]:
        copy_model(repository, "light", name)
    hold(repository, "patient_generator")
    hold(repository, "first_generator", 1)
    hold(repository, "second_style_interpreter", 1)
    server = TritonServer(repository, MODELS)
    await server.start()
    try:
        await wait_until_ready(server)
        yield server
    finally:
        await server.stop()


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


async def inferences(server: TritonServer, model: str) -> tuple[int, int]:
    """(samples, executions) of a Triton model so far."""
    connection = triton.InferenceServerClient(server.grpc_url)
    try:
        (entry,) = (await connection.get_inference_statistics(model)).model_stats
        return entry.inference_count, entry.execution_count
    finally:
        await connection.close()


@pytest_asyncio.fixture(scope="session")
async def faces_triton() -> AsyncIterator[TritonServer]:
    """The committed repository, for tests that start gateways of their own before it."""
    server = TritonServer(REPOSITORY, ["faces"])
    await server.start()
    try:
        await wait_until_ready(server)
        yield server
    finally:
        await server.stop()


async def minted(server: TritonServer) -> int:
    """How many samples the Triton of `faces` has generated so far."""
    return (await inferences(server, "faces_generator"))[0]
