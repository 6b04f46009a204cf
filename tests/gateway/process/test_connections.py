"""Connections beyond what a door takes, and those that never say what they want: the others do not feel them."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from labelmint.gateway.process import grpc_server
from labelmint.gateway.process.addresses import take
from labelmint.gateway.process.connections import REQUEST_SECONDS, BoundedListener, ImpatientHttp
from labelmint.gateway.process.grpc_server import GrpcServer
from labelmint.gateway.process.security import Security
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.sampling.sampler import SamplingCore
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import ROOT, start_service
from tests.support.processes import refused_start, triton_pid
from tests.support.waiting import until, wait_for

pytestmark = [pytest.mark.triton, pytest.mark.torch]


Status = health_pb2.HealthCheckResponse
ASKED = health_pb2.HealthCheckRequest()
REQUEST = pb.GetSampleRequest(model="tiny", seed=7, options=pb.SampleOptions(max_js=1e9))
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
MOST = 30
KEEP_ALIVE = 7
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
                    watch = health.Watch(ASKED, timeout=300)
                    assert any(answer.status == Status.SERVING for answer in watch)
                    os.kill(triton_pid(service), signal.SIGKILL)
                    assert [next(watch).status for _ in range(2)] == [Status.NOT_SERVING, Status.SERVING]
                    watch.cancel()
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


class Timer:
    """What `call_later` returns. It runs out when the test says so."""

    def __init__(self, seconds: float, callback: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self.seconds = seconds
        self.pending = True
        self._callback = callback
        self._arguments = arguments

    def cancel(self) -> None:
        self.pending = False

    def run_out(self) -> None:
        self.pending = False
        self._callback(*self._arguments)


@dataclass
class Impatient:
    """A server whose timers the test drives. It answers when `answering` is set."""

    port: int = 0
    received: bytes = b""
    asked: int = 0
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    timers: list[Timer] = field(default_factory=list)

    def pending(self, seconds: float) -> list[Timer]:
        return [timer for timer in self.timers if timer.pending and timer.seconds == seconds]

    async def application(self, scope: object, receive: object, send: Callable[..., Awaitable[None]]) -> None:
        self.asked += 1
        await self.answering.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def impatient() -> AsyncIterator[Impatient]:
    found = Impatient()

    class Loop:
        """The event loop, but for its timers."""

        def __getattr__(self, name: str) -> object:
            return getattr(asyncio.get_running_loop(), name)

        def call_later(self, seconds: float, callback: Callable[..., object], *arguments: object) -> Timer:
            found.timers.append(Timer(seconds, callback, arguments))
            return found.timers[-1]

    class Driven(ImpatientHttp):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[arg-type]
            self.loop = Loop()  # type: ignore[assignment]

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            found.received += data

    config = uvicorn.Config(found.application, http=Driven, interface="asgi3", lifespan="off", log_config=None, port=0)
    config.timeout_keep_alive = KEEP_ALIVE
    server = uvicorn.Server(config)
    with config.bind_socket() as listener:
        found.port = listener.getsockname()[1]
        running = asyncio.create_task(server.serve(sockets=[listener]))
        yield found
        found.answering.set()
        server.should_exit = True
        await running


@pytest.mark.parametrize("half", [b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"])
@pytest.mark.parametrize("first", [b"", GET])
async def test_half_a_request_loses_its_connection(impatient: Impatient, half: bytes, first: bytes) -> None:
    """Before the first request, and after one."""
    impatient.answering.set()
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    if first:
        writer.write(first)
        assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"ok"), 60)
        assert not impatient.pending(REQUEST_SECONDS)
    impatient.answering.clear()
    writer.write(half)
    await until(lambda: impatient.received == first + half)
    (limit,) = impatient.pending(REQUEST_SECONDS)
    limit.run_out()
    assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()


async def test_no_request_loses_its_connection(impatient: Impatient) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    (limit,) = await until(lambda: impatient.pending(REQUEST_SECONDS))
    limit.run_out()
    assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()


async def test_a_slow_answer_is_not_cut(impatient: Impatient) -> None:
    """No limit runs while the application works, whatever parts the request came in, and on the second one too."""
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    for number in (1, 2):
        impatient.answering.clear()
        writer.write(GET[:9])
        await until(lambda: impatient.pending(REQUEST_SECONDS))
        writer.write(GET[9:])
        await until(lambda number=number: impatient.asked == number)  # type: ignore[misc]
        assert not impatient.pending(REQUEST_SECONDS) and not impatient.pending(KEEP_ALIVE)
        impatient.answering.set()
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
