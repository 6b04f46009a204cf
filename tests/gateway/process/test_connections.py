"""Connections beyond what a door takes, and those that never say what they want: the others do not feel them."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from labelmint.gateway.process import connections, grpc_server
from labelmint.gateway.process.addresses import take
from labelmint.gateway.process.connections import BoundedListener, ImpatientHttp
from labelmint.gateway.process.grpc_server import GrpcServer
from labelmint.gateway.process.security import Security
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.sampling.core import SamplingCore
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import ROOT, start_service
from tests.support.processes import refused_start, triton_pid
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.triton, pytest.mark.torch]


Status = health_pb2.HealthCheckResponse
ASKED = health_pb2.HealthCheckRequest()
REQUEST = pb.GetSampleRequest(model="tiny", seed=7, options=pb.SampleOptions(max_js=1e9))
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
MOST = 30
NEEDED = 224 + 2 * MOST


def limited(descriptors: int) -> list[str]:
    return ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh"]


@contextlib.contextmanager
def crowd(address: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]


def open_connections(members: list[socket.socket]) -> int:
    """How many of these the other side keeps."""

    def is_open(member: socket.socket) -> bool:
        member.setblocking(False)
        try:
            return member.recv(1) != b""
        except BlockingIOError:
            return True
        except ConnectionError:
            return False

    return sum(map(is_open, members))


def test_a_crowd_at_the_doors_takes_nothing_from_who_is_inside(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(
        tmp_path / "serve.log",
        *("--max-connections", str(MOST)),
        repository=tiny_repository,
        under=limited(NEEDED),
    )
    try:
        with grpc.insecure_channel(service.grpc) as channel, httpx.Client(base_url=service.http, timeout=60.0) as http:
            stub, health = pb_grpc.SampleServiceStub(channel), health_pb2_grpc.HealthStub(channel)
            before = stub.GetSample(REQUEST)
            assert http.get("/readyz").status_code == 200
            for door in (service.http, f"grpc://{service.grpc}"):
                with crowd(door, 3 * MOST) as members:
                    wait_for(lambda members=members: open_connections(members) <= MOST)  # ours was idle
                    assert stub.GetSample(REQUEST) == before
                    # Descriptors are left for a new Triton.
                    os.kill(triton_pid(service), signal.SIGKILL)
                    for expected in (Status.NOT_SERVING, Status.SERVING):
                        wait_for(lambda expected=expected: health.Check(ASKED).status == expected)
                    assert stub.GetSample(REQUEST) == before
            assert http.get("/readyz").status_code == 200
        said = service.log.read_text()
        assert said.count(f"the REST server has its limit of {MOST} connections") == 1
        assert "Too many open files" not in said and "Traceback" not in said
    finally:
        assert service.stop() == 0


def test_too_few_descriptors_are_named() -> None:
    said = refused_start("--max-connections", str(MOST), under=limited(NEEDED - 1))
    assert f"may open {NEEDED - 1} files" in said and f"need {NEEDED}" in said


def test_the_listener_counts_what_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        address = plain.getsockname()
        with BoundedListener(plain, 2) as listener:
            for _ in range(3):  # whoever leaves makes room
                with socket.create_connection(address), socket.create_connection(address):
                    held = [listener.accept()[0] for _ in range(2)]
                    with socket.create_connection(address) as third:
                        with pytest.raises(ConnectionAbortedError):
                            listener.accept()
                        assert third.recv(1) == b""
                    for each in held:
                        each.close()


@pytest.fixture
async def impatient(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The port of a server that gives a request half a second; its answer to one takes longer."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)

    async def application(scope: object, receive: object, send: object) -> None:
        await asyncio.sleep(1.0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]

    config = uvicorn.Config(application, http=ImpatientHttp, lifespan="off", log_config=None, port=0)
    server = uvicorn.Server(config)
    with config.bind_socket() as listener:
        running = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await running


@pytest.mark.parametrize("half", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"])
async def test_half_a_request_loses_its_connection(impatient: int, half: bytes) -> None:
    """Before the first request, and after one."""
    for first in (b"", GET):
        reader, writer = await asyncio.open_connection("127.0.0.1", impatient)
        writer.write(first)
        if first:
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"ok"), 60)
        writer.write(half)
        await asyncio.wait_for(reader.read(), 60)
        writer.close()


async def test_a_slow_answer_is_not_cut(impatient: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient)
    for _ in range(2):
        for part in (GET[:9], GET[9:]):
            writer.write(part)
            await asyncio.sleep(0.1)
        assert (await asyncio.wait_for(reader.readuntil(b"ok"), 60)).startswith(b"HTTP/1.1 200 OK")
    writer.close()


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    listener = BoundedListener(socket.create_server(("127.0.0.1", 0)), 1)
    with listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def states_of(port: int) -> list[grpc.ChannelConnectivity]:
    """The states within five seconds of an idle channel that pings every second, which is as often as gRPC does."""
    options = [
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    states = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        await channel.channel_ready()
        state = channel.get_state()
        with contextlib.suppress(asyncio.TimeoutError):
            while True:
                states.append(state)
                await asyncio.wait_for(channel.wait_for_state_change(state), 5.0)
                state = channel.get_state()
    return states


async def test_an_idle_client_may_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is scaled: clients ping every 10 s, the limit is 5 s."""
    monkeypatch.setattr(grpc_server, "MIN_PING_SECONDS", 0.1)
    unused = SamplingCore(None, None, None)  # type: ignore[arg-type]
    with take("127.0.0.1", 0, "--grpc-port") as taken:
        door = GrpcServer(ServeSettings(), Security(None, None), taken, core=unused, health=HealthServicer())
        await door.start()
        try:
            assert await states_of(taken.getsockname()[1]) == [grpc.ChannelConnectivity.READY]
        finally:
            await door.stop_at_once()


def test_the_limit_of_pings_lets_those_of_every_ten_seconds_pass() -> None:
    assert grpc_server.MIN_PING_SECONDS <= 5.0  # half of it: one may be late and the next one early
    assert f"every {grpc_server.MIN_PING_SECONDS:g} s" in (ROOT / "docs" / "other-languages.md").read_text()
