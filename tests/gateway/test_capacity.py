"""Triton that is not there yet, or no more: what is asked is held, told as demand, and answered when it comes.

Rules of this file:
- Triton's address is a name, as in a cluster: a name server of the test gives it addresses when there are some.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2

from labelmint.core.errors import TritonUnavailable
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.triton.client import TritonClient
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service
from tests.support.gateways import Gateway
from tests.support.metrics import DEMAND
from tests.support.names import Names
from tests.support.waiting import until, wait_for
from tests.support.wire import health_of, info_of, pause_of

pytestmark = [pytest.mark.triton, pytest.mark.torch]


ALL = pb.SampleOptions(max_js=1e9, omit_image=True)
SECONDS = 120  # for what must happen, on any machine


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@asynccontextmanager
async def waiting_gateway(directory: Path, url: str, *arguments: str) -> AsyncIterator[Gateway]:
    """A gateway whose Triton need not be there."""
    http_port, grpc_port = free_ports()
    command = [sys.executable, "-m", "labelmint.cli", "serve", "--triton-url", url]
    command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port), *arguments]
    log = directory / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, text=True)
    try:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", timeout=SECONDS) as http,
        ):

            async def lives() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.ConnectError):
                    return (await http.get("/healthz")).status_code == 200
                return False

            await until(lives, SECONDS)
            service = Service(process, str(http.base_url), f"127.0.0.1:{grpc_port}", log)
            yield Gateway(service, pb_grpc.SampleServiceStub(channel), http)
    finally:
        if process.poll() is None:
            process.terminate()
        assert await asyncio.to_thread(process.wait, 60) == 0, log.read_text()


async def test_what_is_asked_waits_for_the_first_triton(tmp_path: Path, tiny_repository: Path, names: Names) -> None:
    triton = TritonServer(tiny_repository, ["tiny"])
    port = int(triton.grpc_url.rsplit(":", 1)[1])
    try:
        async with waiting_gateway(tmp_path, names.url(port), "--capacity-wait-seconds", "600") as gateway:
            # Whoever does not get requests does not learn of the demand.
            assert (await gateway.http.get("/readyz")).status_code == 200
            assert await gateway.until("labelmint_triton_ready", lambda value: value == 0) == 0
            wanted = pb.StreamSamplesRequest(model="tiny", start_seed=5, count=20, window=3, options=ALL)
            stream = aiter(gateway.stub.StreamSamples(wanted))
            others = asyncio.gather(
                gateway.stub.GetSample(pb.GetSampleRequest(model="tiny", seed=7, options=ALL)),
                gateway.stub.BatchGetSamples(pb.BatchGetSamplesRequest(model="tiny", seeds=[1, 2], options=ALL)),
                gateway.http.get("/v1/models/tiny/samples/7?max_js=1e9"),
            )
            beat = await anext(stream)
            assert beat == pb.StreamSamplesResponse(next_seed=5)
            assert await gateway.until(DEMAND, lambda value: value == 3 + 1 + 2 + 1) == 7
            # gRPC alone would look again after 1, 2, 4 ... 120 seconds.
            await until(lambda: names.lookups >= 20, SECONDS)
            await triton.start()
            await wait_until_ready(triton)
            names.addresses = ["127.0.0.1"]
            sample, batch, answer = await others
            assert sample.sample.seed == 7 and len(batch.outcomes) == 2 and answer.status_code == 200
            assert await gateway.until("labelmint_triton_ready", lambda value: value == 1) == 1
            seeds = [message.sample.seed async for message in stream if message.HasField("sample")]
            assert seeds == list(range(5, 25))
            assert await gateway.until(DEMAND, lambda value: value == 0) == 0

            # It goes, and comes back: a stream in the middle goes on where it was.
            endless = gateway.stub.StreamSamples(pb.StreamSamplesRequest(model="tiny", window=4, options=ALL))
            got = [(await endless.read()).sample.seed]
            await triton.stop()
            names.addresses = []
            while (message := await endless.read()).HasField("sample"):
                got.append(message.sample.seed)
            assert message.next_seed == got[-1] + 1
            assert await gateway.until(DEMAND, lambda value: value == 4) == 4
            assert (await gateway.http.get("/readyz")).status_code == 200
            back = TritonServer(tiny_repository, ["tiny"])
            back._grpc_port = port
            try:
                await back.start()
                names.addresses = ["127.0.0.1"]
                while not (message := await endless.read()).HasField("sample"):
                    pass
                assert message.sample.seed == got[-1] + 1
            finally:
                endless.cancel()
                await back.stop()
    finally:
        await triton.stop()


async def test_the_wait_ends_with_an_error_that_says_when_to_ask_again(tmp_path: Path, names: Names) -> None:
    async with waiting_gateway(tmp_path, names.url(1), "--capacity-wait-seconds", "2") as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.GetSample(pb.GetSampleRequest(model="tiny", seed=7, options=ALL))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and pause_of(caught.value) == 2
        assert info_of(caught.value).reason == "TRITON_UNAVAILABLE"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for message in gateway.stub.StreamSamples(pb.StreamSamplesRequest(model="tiny", start_seed=9)):
                assert message == pb.StreamSamplesResponse(next_seed=9)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and pause_of(caught.value) == 2
        assert info_of(caught.value).metadata["next_seed"] == "9"
        assert (await gateway.http.get("/v1/models/tiny/samples/7")).status_code == 503
        await gateway.until(DEMAND, lambda value: value == 0)


async def test_a_stream_that_waits_ends_when_the_gateway_does(tmp_path: Path, names: Names) -> None:
    async with waiting_gateway(tmp_path, names.url(1), "--capacity-wait-seconds", "600") as gateway:
        stream = gateway.stub.StreamSamples(pb.StreamSamplesRequest(model="tiny", start_seed=9))
        reading = asyncio.create_task(drained(stream))
        serving = health_pb2.HealthCheckResponse.SERVING
        await asyncio.to_thread(wait_for, lambda: health_of(gateway.service) == serving)
        asked = asyncio.create_task(gateway.http.get("/v1/models/tiny/samples/1"))
        await gateway.until(DEMAND, lambda value: value == 8 + 1)
        asked.cancel()
        assert await gateway.until(DEMAND, lambda value: value == 8) == 8
        gateway.service.process.terminate()
        error = info_of(await reading)
        assert (error.reason, error.metadata["next_seed"]) == ("SERVER_DRAINING", "9")
        await asyncio.to_thread(gateway.service.process.wait, 60)


async def test_no_model_is_unknown_before_the_models_were_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = TritonClient(f"127.0.0.1:{silent.getsockname()[1]}")
        catalog = Catalog(client, "fused")
        reading = asyncio.create_task(catalog.refresh())
        try:
            await asyncio.sleep(0)  # it has begun
            with pytest.raises(TritonUnavailable, match="being read"):
                await catalog.get("tiny")
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await client.close()


async def drained(stream: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    """The error that ends a stream."""
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended without an error")


class Counting(grpc.GenericRpcHandler):
    """A Triton that says of every model that it is ready."""

    def __init__(self) -> None:
        self.calls = 0

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            self.calls += 1
            return service_pb2.ModelReadyResponse(ready=True).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


async def test_tritons_of_one_name_take_turns(names: Names) -> None:
    counting, servers, port = (Counting(), Counting()), [], 0
    for handler, host in zip(counting, ("127.0.0.1", "127.0.0.2"), strict=True):
        server = grpc.aio.server(handlers=[handler], options=[("grpc.so_reuseport", 0)])
        port = server.add_insecure_port(f"{host}:{port}")
        await server.start()
        servers.append(server)
    names.addresses = ["127.0.0.1", "127.0.0.2"]
    client = TritonClient(names.url(port))
    try:
        for _ in range(1000):
            if all(handler.calls for handler in counting):
                break
            assert await client.is_ready("any")
        before = [handler.calls for handler in counting]
        for _ in range(20):
            assert await client.is_ready("any")
        assert [handler.calls - calls for handler, calls in zip(counting, before, strict=True)] == [10, 10]
    finally:
        await client.close()
        for server in servers:
            await server.stop(None)
