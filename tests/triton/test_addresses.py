"""What a target stands for: addresses of our own finding, or one that gRPC resolves."""

import asyncio
import socket

import pytest

from labelmint.triton.addresses import Addresses

pytestmark = pytest.mark.unit


PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("target", "addresses"),
    [
        ("127.0.0.1:8001", ("127.0.0.1:8001",)),
        ("[::1]:8001", ("[::1]:8001",)),
        ("ipv4:10.0.0.1:1", ("10.0.0.1:1",)),
        ("ipv4:10.0.0.1:1,10.0.0.2:1,10.0.0.1:1", ("10.0.0.1:1", "10.0.0.2:1")),
        ("ipv6:[::1]:1,%5B::2%5D:1", ("[::1]:1", "[::2]:1")),
        *(
            (other, (other,))
            for other in ("unix:/run/triton", "dns://10.0.0.1/triton:1", "xds:///triton", "triton", "")
        ),
    ],
)
async def test_what_names_no_host_is_taken_as_it_is(target: str, addresses: tuple[str, ...]) -> None:
    found = Addresses(target)
    assert await found.now() == addresses
    assert {option for each in addresses for option in found.options(each)} == {("grpc.enable_http_proxy", 0)}


@pytest.mark.parametrize("target", ["localhost:8001", "dns:localhost:8001", "dns:///localhost:8001"])
async def test_a_host_is_resolved(target: str) -> None:
    found = Addresses(target)
    hosts = {str(address[0]) for *_, address in socket.getaddrinfo("localhost", 8001, type=socket.SOCK_STREAM)}
    assert await found.now() == tuple(sorted(f"[{host}]:8001" if ":" in host else f"{host}:8001" for host in hosts))
    assert ("grpc.default_authority", "localhost:8001") in found.options((await found.now())[0])


@pytest.mark.parametrize(
    ("environment", "proxied"),
    [
        ({"http_proxy": "http://127.0.0.1:1"}, True),
        ({"https_proxy": "http://127.0.0.1:1", "no_proxy": "elsewhere, other"}, True),
        ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "elsewhere, triton"}, False),
        ({"grpc_proxy": "http://127.0.0.1:1", "no_grpc_proxy": "ton", "no_proxy": "elsewhere"}, False),
        ({"no_proxy": "elsewhere"}, False),
    ],
)
async def test_what_a_proxy_carries_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], proxied: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    async def resolved(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 8001))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolved)
    found = Addresses("triton:8001")
    (address,) = await found.now()
    assert address == ("triton:8001" if proxied else "10.0.0.1:8001")
    assert ("grpc.enable_http_proxy", int(proxied)) in found.options(address)


async def test_no_proxy_leads_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for target in ("127.0.0.1:8001", "[::1]:8001", "localhost:8001"):
        found = Addresses(target)
        assert ("grpc.enable_http_proxy", 0) in found.options((await found.now())[0])
