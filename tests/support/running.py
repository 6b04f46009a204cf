"""A running service with its clients and its repository, for tests that change models under it."""

import asyncio
import signal
from pathlib import Path

import grpc.aio
import httpx

from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service, start_service
from tests.support.waiting import until

ALL = pb.SampleOptions(max_js=1e9, image_encoding=pb.ENCODING_RAW, label_encoding=pb.ENCODING_RAW, include_js_map=True)


class Running:
    """A service, both ways to it, and its repository."""

    def __init__(self, service: Service, repository: Path) -> None:
        self.service = service
        self.repository = repository
        self.http = httpx.AsyncClient(base_url=service.http, timeout=60.0)
        self.channel = grpc.aio.insecure_channel(service.grpc)
        self.stub = pb_grpc.SampleServiceStub(self.channel)

    async def close(self) -> None:
        await self.http.aclose()
        await self.channel.close()
        assert await asyncio.to_thread(self.service.stop) == 0

    async def versions(self) -> list[tuple[str, str]]:
        models = (await self.stub.ListModels(pb.ListModelsRequest())).models
        return [(model.name, model.version) for model in models]

    async def reload(self, expected: list[tuple[str, str]]) -> None:
        self.service.process.send_signal(signal.SIGHUP)
        await self.come_to(expected)

    async def come_to(self, expected: list[tuple[str, str]]) -> None:
        """Wait until these models and versions are served."""
        found: list[tuple[str, str]] = []

        async def reached() -> bool:
            nonlocal found
            try:
                found = await self.versions()
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
            return found == expected

        try:
            await until(reached)
        except AssertionError as error:
            raise AssertionError(f"{found} instead of {expected}: {self.service.log.read_text()}") from error

    async def logged(self, text: str, times: int = 1) -> None:
        try:
            await until(lambda: self.service.log.read_text().count(text) >= times)
        except AssertionError as error:
            raise AssertionError(f"{text!r} was not logged: {self.service.log.read_text()}") from error

    async def sample(self, seed: int, version: str = "", model: str = "tiny") -> pb.Sample:
        request = pb.GetSampleRequest(model=model, seed=seed, options=ALL, model_version=version)
        return (await self.stub.GetSample(request)).sample

    def stream(self, start_seed: int, version: str = "") -> grpc.aio.UnaryStreamCall:
        request = pb.StreamSamplesRequest(model="tiny", start_seed=start_seed, options=ALL, model_version=version)
        return self.stub.StreamSamples(request)


async def read(stream: grpc.aio.UnaryStreamCall, count: int) -> list[pb.StreamSamplesResponse]:
    """The next samples; a slow machine has heartbeats between."""
    messages: list[pb.StreamSamplesResponse] = []
    while len(messages) < count:
        message = await anext(aiter(stream))
        messages += [message] if message.HasField("sample") else []
    return messages


async def start_before(log: Path, triton: TritonServer, *flags: str) -> Service:
    """A gateway before a Triton that runs already."""
    return await asyncio.to_thread(
        start_service, log, "--triton-url", triton.grpc_url, *flags, repository=log.parent / "unused"
    )
