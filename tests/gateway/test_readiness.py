"""What the gateway knows of Triton: asked once a second whoever wants to know, and told at once while Triton hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from labelmint.core.errors import ModelNotFound, TritonUnavailable
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.triton.client import TritonClient
from labelmint.triton.model_config import read_config
from labelmint.triton.server import TritonServer, wait_until_ready
from tests.conftest import start_service
from tests.support.names import Names
from tests.support.running import Running
from tests.support.waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.torch]


class CountingTriton(grpc.GenericRpcHandler):
    """A Triton with version 1 of `tiny`, and `more` that is alike, which counts what it is asked."""

    def __init__(self, repository: Path, *more: str) -> None:
        self.calls: Counter[str] = Counter()
        self._names = ("tiny", *more)
        self._config = read_config(repository / "tiny" / "config.pbtxt")

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method.rsplit("/", 1)[1]

        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            self.calls[method] += 1
            await asyncio.sleep(0)
            if method == "ModelConfig":
                if service_pb2.ModelConfigRequest.FromString(request).name not in self._names:
                    await context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model")
                return service_pb2.ModelConfigResponse(config=self._config).SerializeToString()
            if method == "ModelReady":
                return service_pb2.ModelReadyResponse(ready=True).SerializeToString()
            assert method == "RepositoryIndex"
            index = service_pb2.RepositoryIndexResponse()
            for name in self._names:
                index.models.add(name=name, version="1", state="READY")
            return index.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


async def test_triton_is_asked_once_a_second_whoever_asks(tiny_repository: Path) -> None:
    triton = CountingTriton(tiny_repository)
    server = grpc.aio.server(handlers=[triton])
    client = TritonClient(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    catalog = Catalog(client, "fused")
    lifecycle = Lifecycle(catalog, 0.0, False)
    began = time.monotonic()

    async def caller(number: int) -> None:
        for _ in range(50):
            await lifecycle.check_ready()
            await catalog.list()
            with pytest.raises(ModelNotFound):
                await catalog.get(f"nonesuch-{number}")
            with pytest.raises(ModelNotFound):
                await catalog.get("tiny", "2")
        await catalog.refresh_anew()

    try:
        await catalog.refresh_anew()
        await asyncio.gather(*(caller(number) for number in range(8)))
        # However slow this machine is.
        assert 2 <= triton.calls["RepositoryIndex"] <= 2 + (time.monotonic() - began)
        assert triton.calls["ModelConfig"] == triton.calls["RepositoryIndex"]
    finally:
        await client.close()
        await server.stop(None)


async def test_a_look_that_meets_two_behind_one_address_still_finds_what_both_have(
    tiny_repository: Path, names: Names
) -> None:
    servers, port = [], 0
    for handler, host in (
        (CountingTriton(tiny_repository), "127.0.0.1"),
        (CountingTriton(tiny_repository, "more"), "127.0.0.2"),
    ):
        server = grpc.aio.server(handlers=[handler], options=[("grpc.so_reuseport", 0)])
        port = server.add_insecure_port(f"{host}:{port}")
        await server.start()
        servers.append(server)
    names.addresses = ["127.0.0.1", "127.0.0.2"]
    client = TritonClient(names.url(port))  # gRPC resolves it, and lets them take turns call by call
    try:
        looks = []
        for _ in range(40):
            looks.append(await client.model_configs())
            await client.is_ready("tiny")  # so that the next look does not begin where this one did
        assert all(("tiny", "1") in look for look in looks) and any(("more", "1") in look for look in looks)
    finally:
        await client.close()
        for server in servers:
            await server.stop(None)


async def test_a_triton_that_hangs_holds_up_nobody_and_is_told_once(tmp_path: Path, tiny_repository: Path) -> None:
    triton = TritonServer(tiny_repository, ["tiny"])
    await triton.start()
    try:
        await wait_until_ready(triton)
        service = await asyncio.to_thread(
            start_service, tmp_path / "serve.log", "--triton-url", triton.grpc_url, repository=tmp_path / "unused"
        )
        running = Running(service, tmp_path)
        client = TritonClient(triton.grpc_url)
        catalog = Catalog(client, "fused")
        try:
            await catalog.refresh_anew()
            send(triton, signal.SIGSTOP)
            # What is known holds until the question fails; then it is away, and the next question holds up nobody.
            with pytest.raises(TritonUnavailable, match="does not answer"):
                await until(catalog.refresh)  # it returns nothing
            for _ in range(3):
                with pytest.raises(TritonUnavailable, match="does not answer"):
                    await catalog.get("tiny")
            assert catalog._look is not None and not catalog._look.done()

            async def told() -> bool:
                return (await running.http.get("/readyz")).status_code == 503

            await until(told)
            began = time.monotonic()
            for path in ("/readyz", "/v1/models", "/v1/models/tiny", "/v1/models/tiny/samples/7"):
                answer = await running.http.get(path)
                assert answer.status_code == 503 and "retry-after" in answer.headers, path
            assert time.monotonic() - began < 15  # each waits half a second at most; they took up to 9 seconds each
            send(triton, signal.SIGCONT)
            await running.come_to([("tiny", "1")])
            await running.logged("ready again")
            assert (await running.http.get("/v1/models/tiny/samples/7?max_js=1e9")).status_code == 200
            log = service.log.read_text()
            assert log.count("not ready: Triton at") == 1 and log.count("ready again: Triton at") == 1, log
        finally:
            with contextlib.suppress(ProcessLookupError):
                send(triton, signal.SIGCONT)
            await client.close()
            await running.close()
    finally:
        await triton.stop()


def send(triton: TritonServer, number: int) -> None:
    assert triton.pid is not None
    os.kill(triton.pid, number)
