"""The gRPC server: its services, limits, port and graceful shutdown.

Rules of this file:
- Interceptors run in this order, outermost first: access log, authentication, parsing.
- The caller has bound the port before; this file makes the server listen on it.
"""

from __future__ import annotations

import asyncio
import errno
import socket

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from labelmint.gateway.grpc.interceptors import AccessInterceptor, ParsingInterceptor
from labelmint.gateway.grpc.reflection import add_reflection
from labelmint.gateway.grpc.service import SERVICE_NAME, SampleService
from labelmint.gateway.process.access_log import GrpcAccessLog
from labelmint.gateway.process.addresses import bracketed, cannot_listen
from labelmint.gateway.process.connections import grpc_options
from labelmint.gateway.process.security import Security
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.rest.app import MAX_BODY_BYTES
from labelmint.gateway.sampling.sampler import SamplingCore
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

# Clients usually ping every 10 s. After a late ping, the next one comes early.
MIN_PING_SECONDS = 5.0
# After SampleService's calls ended: time for calls of other services (a health watch) and for the last responses.
_LAST_SECONDS = 1.0
# A stream may run on for the maximum age after its connection reached that age. This time is added on top.
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
        """`taken` is a socket bound to the address. Raises CannotListen."""
        self._grace_seconds = settings.grace_seconds
        host, port = taken.getsockname()[:2]
        self._requests = GrpcAccessLog(host, port)
        interceptors: list[grpc.aio.ServerInterceptor] = [self._requests]
        if security.tokens is not None:
            interceptors.append(AccessInterceptor(security.tokens, core.metrics))
        interceptors.append(ParsingInterceptor(core.metrics))
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(settings))
        pb_grpc.add_SampleServiceServicer_to_server(SampleService(core), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        add_reflection(self._server, (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
        try:
            if security.tls is None:
                self._server.add_insecure_port(bracketed(host, port))
            else:
                self._server.add_secure_port(bracketed(host, port), security.tls.credentials())
        except RuntimeError as error:  # another process has started to listen there
            in_use = OSError(errno.EADDRINUSE, str(error))
            raise cannot_listen(in_use, settings.host, settings.grpc_port, flag="--grpc-port") from error

    async def start(self) -> None:
        await self._server.start()

    async def stop_at_once(self) -> None:
        await self._server.stop(None)

    async def stop(self) -> None:
        """Accept no new calls and let running calls finish within the grace period.

        It does not wait for clients that only watch the health service.
        """
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
        # Clients may send keepalive pings while a slow reader blocks its stream, and while they have no open call.
        # With gRPC's default limits, five minutes and two hours, gRPC would close their connections.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * MIN_PING_SECONDS)),
    ]
    if settings.max_connection_age_seconds:
        # gRPC cuts open calls after the age and the grace. The streams end by themselves before that.
        age = settings.max_connection_age_seconds
        options.append(("grpc.max_connection_age_ms", int(1000 * age)))
        options.append(("grpc.max_connection_age_grace_ms", int(1000 * (age + _CONNECTION_SLACK_SECONDS))))
    return options
