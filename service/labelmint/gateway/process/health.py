"""The gRPC health check (grpc.health.v1), which follows the readiness of the gateway.

Rules of this file:
- Readiness is checked once a second, independent of the number of clients that watch it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from labelmint.core.errors import LabelmintError
from labelmint.gateway.grpc.service import SERVICE_NAME
from labelmint.gateway.process.background import running
from labelmint.gateway.sampling.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 1.0


@contextlib.asynccontextmanager
async def health_service(lifecycle: Lifecycle) -> AsyncIterator[HealthServicer]:
    """Serve grpc.health.v1 from the readiness of `lifecycle` until the end of the block."""
    health = HealthServicer()
    services = ("", SERVICE_NAME)
    for service in services:
        await health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def watch() -> None:
        while True:
            status = health_pb2.HealthCheckResponse.SERVING
            try:
                await lifecycle.check_ready()
            except Exception as error:
                status = health_pb2.HealthCheckResponse.NOT_SERVING  # type: ignore[assignment]
                if not isinstance(error, LabelmintError):
                    logger.exception("the readiness check failed")
            for service in services:
                await health.set(service, status)
            await asyncio.sleep(HEALTH_SECONDS)

    async with running(asyncio.create_task(watch())):
        yield health
