"""Calls every route and every RPC with every kind of invalid credentials: all must be refused.

The routes and RPCs are read from the gateway itself (the OpenAPI document, and gRPC's reflection), so a new one is
attacked without a change here. Health checks and the pages (`OPEN_PATHS`) are open on purpose to clients that may
connect.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
import grpc.aio
import httpx
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from labelmint.gateway.rest.middleware import OPEN_PATHS
from tests.torture.grpc_messages import ask, methods
from tests.torture.http_bytes import send
from tests.torture.outcome import Outcome

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# Paths that might lead around the middleware of the REST application.
DETOURS = (
    b"//metrics",
    b"/./metrics",
    b"/healthz/../metrics",
    b"/docs/../metrics",
    b"/docs/%2e%2e/metrics",
    b"/healthz%2f..%2fmetrics",
    b"/metrics;/healthz",
    b"/metrics?/healthz",
    b"/metrics#/healthz",
    b"/METRICS",
    b"/metrics%00/healthz",
    b"/metrics/",
    b"http://127.0.0.1/metrics",
    b"http://127.0.0.1/healthz/../metrics",
)


@dataclass(frozen=True)
class Door:
    """The addresses of a gateway, and how a client connects to them."""

    url: str
    target: str
    tls: ssl.SSLContext | None
    credentials: grpc.ChannelCredentials | None

    def channel(self) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target)
        return grpc.aio.secure_channel(self.target, self.credentials)

    def http(self) -> httpx.AsyncClient:
        verify: ssl.SSLContext | bool = True if self.tls is None else self.tls
        return httpx.AsyncClient(base_url=self.url, verify=verify, timeout=60.0)


def bad_keys(token: str, withdrawn: str) -> dict[str, list[tuple[str, str]]]:
    """Return headers with invalid credentials. `token` is a valid token, `withdrawn` a formerly valid one."""
    return {
        "nothing": [],
        "an empty header": [("authorization", "")],
        "no token": [("authorization", "Bearer")],
        "a truncated token": [("authorization", f"Bearer {token[:-1]}")],
        "half a token": [("authorization", f"Bearer {token[: len(token) // 2]}")],
        "a longer token": [("authorization", f"Bearer {token}0")],
        "the token twice": [("authorization", f"Bearer {token} {token}")],
        "the token in the other case": [("authorization", f"Bearer {token.swapcase()}")],
        "a withdrawn token": [("authorization", f"Bearer {withdrawn}")],
        "the hash of the token": [("authorization", f"Bearer {hashlib.sha256(token.encode()).hexdigest()}")],
        "the token alone": [("authorization", token)],
        "the token as a password": [
            ("authorization", f"Basic {base64.b64encode(f'training:{token}'.encode()).decode()}")
        ],
        "the token in another header": [("x-authorization", f"Bearer {token}"), ("cookie", f"token={token}")],
        "the token for a proxy": [("proxy-authorization", f"Bearer {token}")],
    }


async def routes(door: Door, model: str) -> list[tuple[str, str]]:
    """Return method and path of every protected route that the OpenAPI document describes."""
    async with door.http() as client:
        document = (await client.get("/openapi.json")).json()
    return [
        (method.upper(), path.format(model=model, seed=7))
        for path, operations in document["paths"].items()
        for method in operations
        if path not in OPEN_PATHS
    ]


async def reflected(door: Door, metadata: tuple[tuple[str, str], ...]) -> set[str]:
    """Return the path of every RPC that the gateway reports."""
    found = set()
    async with door.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="*")]), metadata=metadata
        )
        names = [service.name async for answer in listing for service in answer.list_services_response.service]
        for name in names:
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
            async for answer in stub.ServerReflectionInfo(iter([request]), metadata=metadata):
                for content in answer.file_descriptor_response.file_descriptor_proto:
                    file = descriptor_pb2.FileDescriptorProto.FromString(content)
                    for service in file.service:
                        if f"{file.package}.{service.name}" == name:
                            found |= {f"/{name}/{method.name}" for method in service.method}
    return found


def closed_methods() -> Mapping[str, MethodDescriptor]:
    return {path: method for path, method in methods().items() if not path.startswith(f"/{HEALTH}/")}


async def without_a_token(door: Door, model: str, token: str, withdrawn: str) -> Outcome:
    """Call everything with all invalid credentials. Each call must be refused as Unauthenticated and nothing else."""
    outcome = Outcome("access: invalid credentials")
    missing = await reflected(door, (("authorization", f"Bearer {token}"),)) - methods().keys()
    if missing:
        outcome.found(f"RPCs that this attack does not cover: {sorted(missing)}")
    closed = await routes(door, model)
    async with door.http() as client, door.channel() as channel:
        for name, headers in bad_keys(token, withdrawn).items():
            for method, path in closed:
                answer = await client.request(method, path, headers=headers, params={"token": token})
                outcome.tries += 1
                if answer.status_code != 401:
                    outcome.found(f"{method} {path} with {name}: {answer.status_code}")
            for path, rpc in closed_methods().items():
                code, _ = await ask(channel, path, rpc, b"", tuple(headers))
                outcome.tries += 1
                if code is not grpc.StatusCode.UNAUTHENTICATED:
                    outcome.found(f"{path} with {name}: {code.name}")
        # The valid token must be accepted everywhere, or the refusals above prove nothing. The requests name unknown
        # models to keep the answers short.
        for method, path in closed:
            answer = await client.request(
                method, path, headers={"authorization": f"Bearer {token}"}, params={"no_such_parameter": "1"}
            )
            if answer.status_code == 401:
                outcome.found(f"{method} {path} with a token: 401")
    for target in DETOURS:
        request = b"GET " + target + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        answer_bytes = await send(door.url, request, door.tls)
        outcome.tries += 1
        if b" 200 " in answer_bytes.split(b"\r\n", 1)[0] or b"labelmint_" in answer_bytes:
            outcome.found(f"{target.decode()}: {answer_bytes[:80]!r}")
    return outcome


async def without_connecting(name: str, door: Door, known_routes: list[tuple[str, str]]) -> Outcome:
    """Call everything over a connection that must fail: plain text to TLS, or a certificate of another authority."""
    outcome = Outcome(f"access: {name}")

    async def route(method: str, path: str) -> None:
        try:
            async with door.http() as client:
                answer = await client.request(method, path)
            outcome.found(f"{method} {path}: {answer.status_code}")
        except httpx.TransportError:
            pass

    async def rpc(path: str, method: MethodDescriptor) -> None:
        async with door.channel() as channel:
            code, _ = await ask(channel, path, method, b"", ())
            if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                outcome.found(f"{path}: {code.name}")

    await asyncio.gather(
        *(route(method, path) for method, path in [*known_routes, *(("GET", path) for path in OPEN_PATHS)]),
        *(rpc(path, method) for path, method in methods().items()),
    )
    outcome.tries = len(known_routes) + len(OPEN_PATHS) + len(methods())
    return outcome
