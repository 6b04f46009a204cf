"""Where the doors are, and how they are reached: IPv6, proxies of the environment, other origins, idle connections."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
import pytest_asyncio

from labelmint.core.errors import CannotListen, TritonUnavailable
from labelmint.gateway.process.addresses import bracketed, take
from labelmint.triton.client import TritonClient
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from labelmint_client import Client
from labelmint_client.errors import Unavailable
from tests.conftest import REPOSITORY, start_service
from tests.support.gateways import Gateway, StartGateway
from tests.support.processes import refused_start

pytestmark = [pytest.mark.triton, pytest.mark.torch]


DEAD_PROXY = "http://name:secret@127.0.0.1:9"
ORIGIN = "https://app.example"


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, DEAD_PROXY)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


def need_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


@pytest.mark.usefixtures("proxied")
def test_our_own_triton_is_reached_past_a_proxy(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    try:
        assert httpx.get(f"{service.http}/readyz", trust_env=False).status_code == 200
        with Client(service.grpc) as client:
            assert [model.name for model in client.list_models()] == ["tiny"]
    finally:
        assert service.stop() == 0


@pytest.mark.usefixtures("proxied")
async def test_a_proxy_is_named_where_it_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that is not this machine's: only the proxy is asked for it.
    with pytest.raises(Unavailable) as told, Client("gateway.invalid:50051", deadline_seconds=5.0) as client:
        client.get_model("faces")
    advice = "the proxy 127.0.0.1:9 (https_proxy): to go past it, set no_proxy="
    assert advice + "gateway.invalid" in str(told.value) and "secret" not in str(told.value)
    triton = TritonClient("triton.invalid:8001")
    with pytest.raises(TritonUnavailable) as told_of_triton:
        await triton.model_configs()
    assert advice + "triton.invalid" in told_of_triton.value.message and "secret" not in told_of_triton.value.message
    monkeypatch.setenv("no_proxy", "other.example,.invalid")
    with pytest.raises(TritonUnavailable) as past:
        await triton.model_configs()
    assert "proxy" not in past.value.message
    await triton.close()


@pytest.mark.parametrize("host", ["[::1]", "::"])
async def test_ipv6(host: str, start_gateway: StartGateway) -> None:
    need_ipv6()
    async with start_gateway("--host", host, "--insecure") as gateway:
        service = gateway.service
        shown = f"[{host.strip('[]')}]:"
        assert service.http.startswith(f"http://{shown}") and service.grpc.startswith(shown)
        ports = service.http.rpartition(":")[2], service.grpc.rpartition(":")[2]
        for address in ["[::1]", "127.0.0.1"] if host == "::" else ["[::1]"]:
            async with httpx.AsyncClient(base_url=f"http://{address}:{ports[0]}") as http:
                assert (await http.get("/v1/models/light")).status_code == 200
            async with grpc.aio.insecure_channel(f"{address}:{ports[1]}") as channel:
                await pb_grpc.SampleServiceStub(channel).GetModel(pb.GetModelRequest(model="light"), timeout=30)


def test_what_cannot_be_listened_on_is_named_for_what_it_is() -> None:
    for host, said in (("192.0.2.1", "has no such address"), ("2001:db8::1", "has no such address")):
        with pytest.raises(CannotListen, match=said) as told:
            take(host, 0, "--http-port")
        assert bracketed(host, 0) in told.value.message
    with pytest.raises(CannotListen, match="is not an address"):
        take("no such host", 0, "--http-port")


def test_a_taken_port_is_found_before_triton_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        for flag in ("--http-port", "--grpc-port"):
            said = refused_start("--model-repository", str(REPOSITORY / "nothing"), flag, port)
            assert said.count("\n") == 1 and f"cannot listen on 127.0.0.1:{port}" in said and flag in said


async def test_an_idle_connection_is_kept_as_long_as_told(start_gateway: StartGateway, gateway: Gateway) -> None:
    async with start_gateway("--http-keep-alive-seconds", "1") as brief:
        kept, ended = await asyncio.gather(connected(gateway), connected(brief))
        assert await asyncio.wait_for(ended[0].read(), 60) == b""
        # uvicorn's own five seconds are over too; a busy machine only makes this longer.
        await asyncio.sleep(5.5)
        assert await ask(*kept) == b"HTTP/1.1 200 OK\r\n"


async def test_the_connection_that_is_idle_longest_makes_room(start_gateway: StartGateway) -> None:
    async with start_gateway("--max-connections", "2") as gateway:
        await gateway.http.aclose()
        first, second = await connected(gateway), await connected(gateway)
        third = await connected(gateway)
        assert await asyncio.wait_for(first[0].read(), 60) == b""
        for pair in (second, third):
            assert await ask(*pair) == b"HTTP/1.1 200 OK\r\n"


Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(gateway: Gateway) -> Pair:
    """A connection on which one request was answered."""
    host, _, port = gateway.service.http.rpartition("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await ask(reader, writer) == b"HTTP/1.1 200 OK\r\n"
    return reader, writer


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """The first line of the answer."""
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    assert await asyncio.wait_for(reader.readexactly(3), 60) == b"ok\n"
    return head.partition(b"\n")[0] + b"\n"


@pytest_asyncio.fixture(scope="module")
async def shared(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("page 2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n")  # of `secret`
    async with start_gateway("--tokens-file", str(tokens), "--cors-origin", f"https://a.example,{ORIGIN}") as running:
        yield running


async def test_an_origin_that_was_named_may_ask_with_a_token(shared: Gateway) -> None:
    sample = "/v1/models/light/samples/7?max_js=1e9"
    wanted = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
    preflight = await shared.http.options(sample, headers={"Origin": ORIGIN, **wanted})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    for token, status in (("secret", 200), ("wrong", 401)):
        answer = await shared.http.get(sample, headers={"Origin": ORIGIN, "Authorization": f"Bearer {token}"})
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
        assert {"etag", "retry-after", "x-request-id"} <= set(exposed)
        assert "access-control-allow-credentials" not in answer.headers and answer.headers["vary"] == "Origin"


async def test_other_origins_may_not(shared: Gateway, gateway: Gateway) -> None:
    headers = {"Origin": "https://b.example", "Authorization": "Bearer secret"}
    for where in (shared, gateway):  # the second names no origin at all
        answer = await where.http.get("/v1/models", headers=headers)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    # What a browser keeps of an answer without an origin must not be taken for one with it.
    assert (await shared.http.get("/healthz")).headers["vary"] == "Origin"


async def test_the_icon_needs_no_token(shared: Gateway) -> None:
    answer = await shared.http.get("/favicon.ico")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/x-icon"
