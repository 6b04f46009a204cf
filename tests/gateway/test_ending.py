"""How a gateway ends and renews connections: seen by load balancers, nothing cut, streams told where to resume."""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from labelmint.triton.server import TritonServer
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import READY, Service, start_service
from tests.support.gateways import release
from tests.support.metrics import IN_TRITON, metric_of
from tests.support.processes import alive, descendants, regions, triton_pid
from tests.support.waiting import until, wait_for

pytestmark = [pytest.mark.triton, pytest.mark.torch]


ALL = pb.SampleOptions(max_js=1e9, image_encoding=pb.ENCODING_RAW, label_encoding=pb.ENCODING_RAW)


def details(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of a call over a blocking channel that failed."""
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return info


def stream_of(stub: pb_grpc.SampleServiceStub, start_seed: int) -> grpc.Call:
    return stub.StreamSamples(pb.StreamSamplesRequest(model="tiny", start_seed=start_seed, options=ALL))


def test_a_drain_is_seen_before_the_doors_close(tmp_path: Path, tiny_repository: Path) -> None:
    options = ("--drain-seconds", "6", "--grace-seconds", "60")
    service = start_service(tmp_path / "serve.log", *options, repository=tiny_repository)
    unshared = httpx.Limits(max_keepalive_connections=0)  # whoever still comes is served, on new connections too
    with grpc.insecure_channel(service.grpc) as channel, httpx.Client(base_url=service.http, limits=unshared) as http:
        stub = pb_grpc.SampleServiceStub(channel)
        # Who watches our health must not hold up the end.
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=300)
        assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)  # at first or soon
        stream = stream_of(stub, 100)
        seeds = [next(message.sample.seed for message in stream if message.HasField("sample"))]
        signalled = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        not_ready = http.get("/readyz")
        assert not_ready.status_code == 503 and not_ready.json()["reason"] == "SERVER_DRAINING"
        assert http.get("/healthz").status_code == 200
        assert http.get("/v1/models/tiny/samples/7?max_js=1e9").status_code == 200
        assert stub.GetSample(pb.GetSampleRequest(model="tiny", seed=7, options=ALL)).sample.seed == 7
        with pytest.raises(grpc.RpcError) as caught:
            for message in stream:
                seeds += [message.sample.seed] if message.HasField("sample") else []  # or a heartbeat
        assert time.monotonic() - signalled >= 6.0, "the stream was not served during the pause"
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        info = details(caught.value)
        assert info.reason == "SERVER_DRAINING"
        assert seeds == list(range(100, int(info.metadata["next_seed"])))
        assert service.process.wait(55) == 0  # within the grace: nothing was in flight any more
    assert "Traceback" not in service.log.read_text()


def gateway_before(triton: TritonServer, directory: Path, grace_seconds: str) -> Service:
    arguments = ("--triton-url", triton.grpc_url, "--grace-seconds", grace_seconds)
    return start_service(directory / "serve.log", *arguments, repository=directory / "unused")


async def test_what_is_in_flight_is_finished(tmp_path: Path, small_triton: TritonServer) -> None:
    """Triton holds the samples until the gateway has said that it stops."""
    service = await asyncio.to_thread(gateway_before, small_triton, tmp_path, "600")
    body = {"seeds": list(range(4)), "max_js": 1e9}
    async with (
        grpc.aio.insecure_channel(service.grpc) as channel,
        httpx.AsyncClient(base_url=service.http, timeout=600.0) as http,
    ):
        request = pb.BatchGetSamplesRequest(model="held", seeds=range(4), options=ALL)
        over_grpc = asyncio.ensure_future(pb_grpc.SampleServiceStub(channel).BatchGetSamples(request))
        over_rest = asyncio.create_task(http.post("/v1/models/held/samples:batchGet", json=body))

        async def all_in_triton() -> bool:
            return await metric_of(http, IN_TRITON) == 4 + 4

        await until(all_in_triton)
        service.process.send_signal(signal.SIGTERM)
        await until(lambda: "stopping" in service.log.read_text())
        assert not over_grpc.done() and not over_rest.done()
        await release(small_triton, 16 - 4 - 4)
        answer = await over_rest
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["outcomes"]) == 4
        assert len((await over_grpc).outcomes) == 4
    assert await asyncio.to_thread(service.process.wait, 60) == 0


async def test_what_takes_longer_than_the_grace_is_cut(tmp_path: Path, small_triton: TritonServer) -> None:
    service = await asyncio.to_thread(gateway_before, small_triton, tmp_path, "0.2")
    async with (
        grpc.aio.insecure_channel(service.grpc) as channel,
        httpx.AsyncClient(base_url=service.http, timeout=60.0) as http,
    ):
        request = pb.BatchGetSamplesRequest(model="held", seeds=range(8), options=ALL)
        answer = asyncio.ensure_future(pb_grpc.SampleServiceStub(channel).BatchGetSamples(request))

        async def all_in_triton() -> bool:
            return await metric_of(http, IN_TRITON) == 8

        await until(all_in_triton)
        assert await asyncio.to_thread(service.stop) == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await answer
    await release(small_triton, 16 - 8)


def test_a_second_signal_ends_at_once(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", "--drain-seconds", "600", repository=tiny_repository)
    processes, before = descendants(service.process.pid), regions(service)
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in service.log.read_text())
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: not alive(processes))
    assert before and not any(region.exists() for region in before)


def test_a_killed_triton_leaves_no_shared_memory(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    before = regions(service)
    assert before
    with httpx.Client(base_url=service.http, timeout=30.0) as http:
        os.kill(triton_pid(service), signal.SIGKILL)
        wait_for(lambda: http.get("/readyz").status_code == 503)
        wait_for(lambda: http.get("/readyz").status_code == 200)
    after = regions(service)
    assert len(after) == len(before)
    assert service.stop() == 0
    assert not any(region.exists() for region in before | after)


def connections(service: Service) -> set[str]:
    """The near ends of the connections that are open to the gateway's gRPC port, from /proc."""
    gateway = f":{int(service.grpc.rsplit(':', 1)[1]):04X}"
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    established = "01"
    return {row[1] for row in rows if row[2].endswith(gateway) and row[3] == established}


def test_connections_are_renewed_and_streams_told_where_to_resume(tmp_path: Path, tiny_repository: Path) -> None:
    options = ("--max-connection-age-seconds", "3")
    service = start_service(tmp_path / "serve.log", *options, repository=tiny_repository)
    seeds: list[int] = []
    used: set[str] = set()
    next_seed = 0
    with grpc.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        for _ in range(3):
            stream = stream_of(stub, next_seed)
            with pytest.raises(grpc.RpcError) as caught:
                for number, message in enumerate(stream):
                    seeds += [message.sample.seed] if message.HasField("sample") else []  # or a heartbeat
                    if number == 0:  # looking takes longer than minting
                        used |= connections(service)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            info = details(caught.value)
            assert info.reason == "STREAM_EXPIRED"
            next_seed = int(info.metadata["next_seed"])
    assert seeds and seeds == list(range(next_seed))
    assert len(used) >= 2, "the connection was never renewed"
    assert service.stop() == 0


def test_a_closed_terminal_ends_everything(tmp_path: Path, tiny_repository: Path) -> None:
    terminal, inside = os.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "labelmint.cli", "serve", "--http-port", "0", "--grpc-port", "0"]
    command += ["--model-repository", str(tiny_repository)]
    log = tmp_path / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdin=inside, stdout=stream, stderr=stream, preexec_fn=take_terminal)
    os.close(inside)
    wait_for(lambda: READY.search(log.read_text()), 120)
    processes = descendants(process.pid)
    os.close(terminal)
    assert process.wait(60) == 0, log.read_text()
    assert alive(processes) == set()
