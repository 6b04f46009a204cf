"""Gateways before real Tritons with one small model each, for the clients.

Rules of this file:
- `tiny` has 16x16 pixels and is not calibrated: `options` has a gate that half of its samples pass.
- `light` has 64x64 pixels of the classes a and b, whose areas vary. `indexed` has an index of its first 256 seeds.
- A gateway that is to come back is started on the port that it had.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio

from labelmint.seed_index.layout import Described
from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from labelmint_client import Client, Sample, SampleOptions
from tests.conftest import Service, start_service
from tests.support.inference import running
from tests.support.seed_index import real_columns, served, write

StartGateway = Callable[..., Service]


@pytest_asyncio.fixture(scope="session")
async def tiny_triton(tiny_repository: Path) -> AsyncIterator[TritonServer]:
    async with running(tiny_repository, "tiny") as server:
        yield server


@pytest.fixture(scope="session")
def start_gateway(tiny_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Start a gateway before the Triton of tiny models."""
    with gateways_before(tiny_triton, tmp_path_factory) as start:
        yield start


@contextmanager
def gateways_before(triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Start gateways before a Triton; what still runs at the end is stopped."""
    started: list[Service] = []

    def start(*arguments: str) -> Service:
        directory = tmp_path_factory.mktemp("gateway")
        arguments = ("--triton-url", triton.grpc_url, *arguments)
        started.append(start_service(directory / "serve.log", *arguments, repository=directory))
        return started[-1]

    yield start
    running = [service for service in started if service.process.poll() is None]
    for service in running:
        service.process.terminate()
    for service in running:
        assert service.process.wait(60) == 0, service.log.read_text()


@pytest.fixture(scope="session")
def gateway(start_gateway: StartGateway) -> Service:
    """One that stays up."""
    return start_gateway()


INDEXED = range(256)


@pytest_asyncio.fixture(scope="session")
async def light_triton(light_repository: Path) -> AsyncIterator[TritonServer]:
    async with running(light_repository, "light") as server:
        yield server


@pytest_asyncio.fixture(scope="session")
async def light_index(light_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of seeds, written from what the Triton gives for each."""
    model = await served(light_triton.grpc_url, "light")
    columns = await real_columns(light_triton.grpc_url, model, INDEXED, 1.0)
    directory = tmp_path_factory.mktemp("index")
    write(directory / "seeds.parquet", Described.of(model, truncation_psi=1.0, class_index=None), columns)
    return directory


@pytest.fixture(scope="session")
def start_light(light_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Start a gateway before the Triton of `light`."""
    with gateways_before(light_triton, tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def indexed(start_light: StartGateway, light_index: Path) -> Service:
    """A gateway of `light` with an index, which stays up."""
    return start_light("--index", str(light_index))


@pytest.fixture(scope="session")
def light_samples(indexed: Service) -> list[Sample]:
    """The samples of the indexed seeds, without a gate."""
    with Client(indexed.grpc) as client:
        batches = [range(first, first + 64) for first in range(0, len(INDEXED), 64)]
        outcomes = [client.batch_get_samples("light", batch, SampleOptions(max_js=1e9)) for batch in batches]
    return [outcome for batch in outcomes for outcome in batch if isinstance(outcome, Sample)]


@pytest.fixture(scope="session")
def light_options(light_samples: list[Sample]) -> SampleOptions:
    """A gate at the median of the scores."""
    return SampleOptions(max_js=float(np.median([sample.js_score for sample in light_samples])))


@pytest.fixture(scope="session")
def light_accepted(light_samples: list[Sample], light_options: SampleOptions) -> list[Sample]:
    """The samples that this gate accepts, in the order of their seeds."""
    assert light_options.max_js is not None
    return [sample for sample in light_samples if sample.js_score <= light_options.max_js]


@pytest.fixture
def client(gateway: Service) -> Iterator[Client]:
    with Client(gateway.grpc) as connected:
        yield connected


@pytest.fixture(scope="session")
def options(gateway: Service) -> SampleOptions:
    """A gate at the median of the scores."""
    with Client(gateway.grpc) as client:
        samples = client.batch_get_samples("tiny", range(64), SampleOptions(max_js=1e9))
    return SampleOptions(max_js=float(np.median([sample.js_score for sample in samples])))


@pytest.fixture(scope="session")
def accepted(gateway: Service, options: SampleOptions) -> list[int]:
    """The accepted seeds of `tiny` below 256."""
    with Client(gateway.grpc) as client:
        outcomes = [client.batch_get_samples("tiny", range(first, first + 64), options) for first in (0, 64, 128, 192)]
    return [outcome.seed for batch in outcomes for outcome in batch if isinstance(outcome, Sample)]


Undisturbed = Callable[[int], list[pb.Sample]]


@pytest.fixture(scope="session")
def undisturbed(gateway: Service, options: SampleOptions) -> Iterator[Undisturbed]:
    """The first accepted samples of `tiny`, as the service's own generated code receives them in one walk."""
    raw = pb.ENCODING_RAW
    message = pb.SampleOptions(max_js=options.max_js, image_encoding=raw, label_encoding=raw)

    def walk(count: int) -> list[pb.Sample]:
        request = pb.StreamSamplesRequest(model="tiny", count=count, options=message, window=64)
        answers = pb_grpc.SampleServiceStub(channel).StreamSamples(request)
        return [answer.sample for answer in answers if answer.HasField("sample")]

    with grpc.insecure_channel(gateway.grpc) as channel:
        yield walk


def same(sample: Sample, message: pb.Sample) -> bool:
    """Whether a client's sample is what was sent, to the bit."""
    return (
        (sample.seed, sample.js_score, sample.threshold, sample.model_digest)
        == (message.seed, message.js_score, message.threshold, message.model_digest)
        and sample.image is not None
        and sample.image.tobytes() == message.image.data
        and sample.label is not None
        and sample.label.tobytes() == message.label.data
    )
