"""The gRPC server: its services, limits and port, and its orderly end.

Rules of this file:
- Interceptors run from the outermost inwards: the access log, authentication, parsing.
- The port was bound before; here the server begins to listen at it.
"""

from __future__ import annotations

import asyncio
import errno
import socket

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from labelmint.gateway.grpc.access import AccessInterceptor
from labelmint.gateway.grpc.parsing import ParsingInterceptor
from labelmint.gateway.grpc.reflection import add_reflection
from labelmint.gateway.grpc.service import SERVICE_NAME, SampleService
from labelmint.gateway.process.access_log import GrpcAccessLog
from labelmint.gateway.process.addresses import bracketed, cannot_listen
from labelmint.gateway.process.connections import grpc_options
from labelmint.gateway.process.security import Security
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.rest.app import MAX_BODY_BYTES
from labelmint.gateway.sampling.core import SamplingCore
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

# Clients usually ping every 10 s; a ping may be late, and the next one then comes early.
MIN_PING_SECONDS = 5.0
# Calls of other services (a client that watches our health) and the last answers on their way, once ours are over.
_LAST_SECONDS = 1.0
# After the age of connections a stream may run as long again before it ends by itself; this comes on top.
_CONNECTION_SLACK_SECONDS = 10.0


class GrpcServer:
    def __init__(
        self,
        settings: ServeSettings,
        security: Security,
        taken: socket.socket,
        *,
        core: SamplingCore,
        health: HealthServicer,
    ) -> None:
        """`taken` is bound to the address. Raises CannotListen."""
        self._grace_seconds = settings.grace_seconds
        self._requests = GrpcAccessLog()
        interceptors: list[grpc.aio.ServerInterceptor] = [self._requests]
        if security.tokens is not None:
            interceptors.append(AccessInterceptor(security.tokens, core.metrics))
        interceptors.append(ParsingInterceptor(core.metrics))
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(settings))
        pb_grpc.add_SampleServiceServicer_to_server(SampleService(core), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        add_reflection(self._server, (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
        host, port = taken.getsockname()[:2]
        try:
            if security.tls is None:
                self._server.add_insecure_port(bracketed(host, port))
            else:
                self._server.add_secure_port(bracketed(host, port), security.tls.credentials())
        except RuntimeError as error:  # another process listens there since
            in_use = OSError(errno.EADDRINUSE, str(error))
            raise cannot_listen(in_use, settings.host, settings.grpc_port, "--grpc-port") from error

    async def start(self) -> None:
        await self._server.start()

    async def stop_at_once(self) -> None:
        await self._server.stop(None)

    async def stop(self) -> None:
        """Take nothing new, and let what runs end within the grace; a client that only watches our health is not
        waited for."""
        stopping = asyncio.create_task(self._server.stop(self._grace_seconds))
        while self._requests.in_flight and not stopping.done():
            await asyncio.sleep(0.02)
        await self._server.stop(_LAST_SECONDS)
        await stopping


def _options(settings: ServeSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", MAX_BODY_BYTES),
        ("grpc.so_reuseport", 0),
        *grpc_options(settings.max_connections),
        # Clients may ask whether we are there, while a slow reader holds up its stream and when they have no call open.
        # By gRPC's own limits, five minutes and two hours, they would be cut off.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * MIN_PING_SECONDS)),
    ]
    if settings.max_connection_age_seconds:
        # gRPC cuts what is open after the age and the grace; our streams end by themselves before that.
        age = settings.max_connection_age_seconds
        options.append(("grpc.max_connection_age_ms", int(1000 * age)))
        options.append(("grpc.max_connection_age_grace_ms", int(1000 * (age + _CONNECTION_SLACK_SECONDS))))
    return options
