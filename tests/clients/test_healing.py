"""Streams and calls go on by themselves over whatever ends a gateway; what comes is what an undisturbed walk gives.

A stream's buffers hold what was sent before the end: each test reads on until the client has said that it healed.
"""

import asyncio
import logging
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from labelmint_client import AsyncClient, Client, ModelVersionGone, Sample, SampleOptions, Unavailable
from labelmint_client.v1 import sample_service_pb2 as pb
from labelmint_client.v1 import sample_service_pb2_grpc as pb_grpc
from tests.clients.conftest import StartGateway, Undisturbed, same
from tests.conftest import Service, start_service
from tests.support.processes import triton_pid
from tests.support.repositories import exchange

pytestmark = [pytest.mark.triton, pytest.mark.torch]


def port_of(service: Service) -> str:
    return service.grpc.rpartition(":")[2]


class Reader:
    """Collects samples until the client has said so many times that a stream was healed, and 20 more."""

    def __init__(self, caplog: pytest.LogCaptureFixture, times: int = 1) -> None:
        self._caplog = caplog
        self._times = times
        self._more = 20
        self.samples: list[Sample] = []

    def enough(self, sample: Sample) -> bool:
        self.samples.append(sample)
        healed = sum("resumes at seed" in record.message for record in self._caplog.records)
        self._more -= healed >= self._times
        return self._more == 0

    def check(self, undisturbed: Undisturbed) -> None:
        wanted = undisturbed(len(self.samples))
        assert all(same(sample, message) for sample, message in zip(self.samples, wanted, strict=True))


@pytest.fixture
def reader(caplog: pytest.LogCaptureFixture) -> Callable[..., Reader]:
    return lambda times=1: Reader(caplog, times)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stream_survives_a_restart(
    start_gateway: StartGateway,
    options: SampleOptions,
    undisturbed: Undisturbed,
    reader: Callable[..., Reader],
    number: int,
) -> None:
    service = start_gateway("--grace-seconds", "1")
    read = reader()
    with Client(service.grpc) as client, client.stream_samples("tiny", options=options) as stream:
        read.enough(next(stream))
        service.stop(number)
        start_gateway("--grpc-port", port_of(service))
        assert any(read.enough(sample) for sample in stream)
        assert stream.next_seed == read.samples[-1].seed + 1
        assert stream.rejected_count == stream.next_seed - len(read.samples)
    read.check(undisturbed)


async def test_an_asyncio_stream_survives_a_restart(
    start_gateway: StartGateway, options: SampleOptions, undisturbed: Undisturbed, reader: Callable[..., Reader]
) -> None:
    service = await asyncio.to_thread(start_gateway)
    read = reader()
    async with (
        AsyncClient(service.grpc) as client,
        await client.stream_samples("tiny", options=options) as stream,
    ):
        read.enough(await anext(stream))
        await asyncio.to_thread(service.stop, signal.SIGKILL)
        await asyncio.to_thread(start_gateway, "--grpc-port", port_of(service))
        async for sample in stream:
            if read.enough(sample):
                break
        assert stream.rejected_count == stream.next_seed - len(read.samples)
    await asyncio.to_thread(read.check, undisturbed)


def test_an_expired_stream_goes_on_at_once(
    start_gateway: StartGateway, options: SampleOptions, undisturbed: Undisturbed, reader: Callable[..., Reader]
) -> None:
    service = start_gateway("--max-connection-age-seconds", "1")
    read = reader(3)
    with Client(service.grpc) as client, client.stream_samples("tiny", options=options) as stream:
        assert any(read.enough(sample) for sample in stream)
    read.check(undisturbed)


class Away(pb_grpc.SampleServiceServicer):
    """Answers the fourth call of each client."""

    calls = 0

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        self.calls += 1
        if self.calls % 4:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return pb.ListModelsResponse()


def test_a_call_says_once_that_it_is_tried_again_and_once_that_it_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "labelmint_client")
    server = grpc.server(ThreadPoolExecutor())
    pb_grpc.add_SampleServiceServicer_to_server(Away(), server)  # type: ignore[no-untyped-call]
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    async def call() -> None:
        async with AsyncClient(endpoint) as client:
            await client.list_models()

    with Client(endpoint) as client:
        client.list_models()
    asyncio.run(call())
    server.stop(None)
    said = [record.message for record in caplog.records if record.name.startswith("labelmint_client")]
    cut = f"retrying ListModels: {endpoint}: UNAVAILABLE: away"
    assert said[::2] == [cut, cut]
    assert len(said) == 4 and all(line.startswith("ListModels succeeded after") for line in said[1::2])


def test_patience_ends(start_gateway: StartGateway, options: SampleOptions) -> None:
    service = start_gateway()
    with Client(service.grpc, patience_seconds=1.0) as client:
        stream = client.stream_samples("tiny", options=options)
        next(stream)
        service.stop(signal.SIGKILL)
        with pytest.raises(Unavailable, match=service.grpc):
            for _ in stream:
                pass


def test_triton_may_restart_and_weights_may_not_change(
    tmp_path: Path,
    tiny_repository: Path,
    second: Path,
    options: SampleOptions,
    undisturbed: Undisturbed,
    reader: Callable[..., Reader],
) -> None:
    like_undisturbed = ("--executor", "onnxruntime")  # the Triton of `undisturbed` follows the repository
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    service = start_service(tmp_path / "first.log", *like_undisturbed, repository=repository)
    read = reader()
    with Client(service.grpc) as client, client.stream_samples("tiny", options=options) as stream:
        read.enough(next(stream))
        os.kill(triton_pid(service), signal.SIGKILL)
        assert any(read.enough(sample) for sample in stream)
        assert service.stop() == 0
        exchange(second, repository)
        service = start_service(
            tmp_path / "second.log", *like_undisturbed, "--grpc-port", port_of(service), repository=repository
        )
        with pytest.raises(ModelVersionGone, match="other weights give other samples"):
            for sample in stream:
                read.samples.append(sample)
    assert service.stop() == 0
    read.check(undisturbed)


def test_clients_do_not_disturb_each_other(gateway: Service, options: SampleOptions, undisturbed: Undisturbed) -> None:
    """One reads slowly, one is closed from another thread while it waits, one goes on."""
    wanted = undisturbed(40)
    with Client(gateway.grpc) as slow, Client(gateway.grpc) as closed, Client(gateway.grpc) as quick:
        waiting = closed.stream_samples("tiny", options=SampleOptions(max_js=0))
        paused = slow.stream_samples("tiny", options=options, count=40)
        got = [next(paused)]
        with ThreadPoolExecutor() as pool:
            rest = pool.submit(list, waiting)
            samples = list(quick.stream_samples("tiny", options=options, count=40))
            waiting.close()
            assert rest.result(60) == []
        got += paused
    for each in (samples, got):
        assert all(same(sample, message) for sample, message in zip(each, wanted, strict=True))
