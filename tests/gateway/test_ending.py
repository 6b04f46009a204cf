"""How a gateway ends and renews connections: seen by load balancers, nothing cut, streams told where to resume."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import READY, Service, start_service
from tests.support.processes import alive, descendants, triton_pid
from tests.support.waiting import wait_for

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
    with grpc.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        # Who watches our health must not hold up the end.
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=300)
        assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)  # at first or soon
        stream = stream_of(stub, 100)
        seeds = [next(message.sample.seed for message in stream if message.HasField("sample"))]
        service.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        signalled = time.monotonic()
        not_ready = httpx.get(f"{service.http}/readyz")
        assert not_ready.status_code == 503 and not_ready.json()["reason"] == "SERVER_DRAINING"
        assert httpx.get(f"{service.http}/healthz").status_code == 200
        # Whoever still comes is served, on new connections too.
        assert httpx.get(f"{service.http}/v1/models/tiny/samples/7?max_js=1e9").status_code == 200
        assert stub.GetSample(pb.GetSampleRequest(model="tiny", seed=7, options=ALL)).sample.seed == 7
        with pytest.raises(grpc.RpcError) as caught:
            for message in stream:
                seeds += [message.sample.seed] if message.HasField("sample") else []  # or a heartbeat
        assert time.monotonic() - signalled > 5.0, "the stream was not served during the pause"
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        info = details(caught.value)
        assert info.reason == "SERVER_DRAINING"
        assert seeds == list(range(100, int(info.metadata["next_seed"])))
        assert service.process.wait(40) == 0  # within the grace: nothing was in flight any more
    assert "Traceback" not in service.log.read_text()


def test_what_is_in_flight_is_finished(tmp_path: Path) -> None:
    service = start_service(tmp_path / "serve.log", "--grace-seconds", "120")
    body = {"seeds": list(range(4)), "max_js": 1e9}
    busy = ('labelmint_requests_in_flight{transport="grpc"} 1.0', 'labelmint_requests_in_flight{transport="rest"} 2.0')
    with grpc.insecure_channel(service.grpc) as channel, ThreadPoolExecutor() as pool:
        request = pb.BatchGetSamplesRequest(model="faces", seeds=range(8), options=ALL)
        over_grpc = pb_grpc.SampleServiceStub(channel).BatchGetSamples.future(request)
        url = f"{service.http}/v1/models/faces/samples:batchGet"
        over_rest = pool.submit(httpx.post, url, json=body, timeout=120.0)
        # The batch and the one that asks are in flight.
        wait_for(lambda: all(line in httpx.get(f"{service.http}/metrics").text for line in busy))
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "stopping" in service.log.read_text())
        assert not over_grpc.done() and not over_rest.done(), "too quick to show anything"
        assert over_rest.result().status_code == 200, over_rest.result().text
        assert len(over_rest.result().json()["outcomes"]) == 4
        assert len(over_grpc.result().outcomes) == 8
    assert service.process.wait(60) == 0


def test_what_takes_longer_than_the_grace_is_cut(tmp_path: Path) -> None:
    service = start_service(tmp_path / "serve.log", "--grace-seconds", "0.2")
    with grpc.insecure_channel(service.grpc) as channel:
        request = pb.BatchGetSamplesRequest(model="faces", seeds=range(64), options=ALL)
        answer = pb_grpc.SampleServiceStub(channel).BatchGetSamples.future(request)
        busy = 'labelmint_requests_in_flight{transport="grpc"} 1.0'
        wait_for(lambda: busy in httpx.get(f"{service.http}/metrics").text)
        assert service.stop() == 0
        assert answer.code() is not grpc.StatusCode.OK


def test_a_second_signal_ends_at_once(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", "--drain-seconds", "600", repository=tiny_repository)
    processes, before = descendants(service.process.pid), regions(service)
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in service.log.read_text())
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 128 + signal.SIGTERM
    wait_for(lambda: not alive(processes))
    assert before and not any(region.exists() for region in before)


def regions(service: Service) -> set[Path]:
    """The shared memory of the service's Triton."""
    arguments = Path(f"/proc/{triton_pid(service)}/cmdline").read_text().split("\0")
    (prefix,) = [text.rpartition("=")[2] for text in arguments if "shm-region-prefix-name=" in text]
    return set(Path("/dev/shm").glob(f"{prefix}*"))


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
