"""Background tasks that run while the servers run: the gRPC health check, and the return of freed memory.

Rules of this file:
- The failure of a task is logged at once, and the other tasks go on.
- The gRPC health check (grpc.health.v1) follows the readiness of the gateway, which is checked once a second,
  independent of the number of clients that watch it.
- glibc keeps freed memory in per-thread arenas, and a later peak uses another arena. Under repeated floods, a gateway
  would grow for hours although most memory is free (18 MB of 267 in use after eight times 20,000 calls at once). If the
  C library has malloc_trim, the freed memory therefore goes back to the system.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from labelmint.core.errors import LabelmintError
from labelmint.gateway.grpc.service import SERVICE_NAME
from labelmint.gateway.sampling.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 1.0
PAUSE_SECONDS = 5.0  # between two returns of memory


@contextlib.asynccontextmanager
async def running(task: asyncio.Task[None]) -> AsyncIterator[None]:
    """Let `task` run until the end of the block, then cancel it. If it fails earlier, log that at once."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task of the gateway failed; the others go on", exc_info=error)

    task.add_done_callback(ended)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


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


async def give_back() -> None:
    """Trim the heap every few seconds until cancelled; in a thread, because a trim may take milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(PAUSE_SECONDS)
        await asyncio.to_thread(trim, 0)
