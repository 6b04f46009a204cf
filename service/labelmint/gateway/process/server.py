"""The gateway process: a child Triton, the gRPC server and the HTTP server over one sampling core, in one event loop.

Rules of this file:
- Startup order: ports, Triton, servers, readiness. Shutdown order: readiness, a pause in which load balancers notice
  that, servers, Triton. Nothing outlives the process.
- Ready means that the gateway answers requests or keeps them waiting for Triton, and that no shutdown has begun. Alive
  means that the process answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version

from grpc_health.v1._async import HealthServicer
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from labelmint.core.errors import LabelmintError
from labelmint.gateway.process.access_log import RestAccessLog
from labelmint.gateway.process.addresses import Listening, take_ports
from labelmint.gateway.process.announcing import Announcer
from labelmint.gateway.process.background import give_back, health_service, running
from labelmint.gateway.process.connections import grant_descriptors
from labelmint.gateway.process.grpc_server import GrpcServer
from labelmint.gateway.process.http_server import HttpServer
from labelmint.gateway.process.logs import configure_logging
from labelmint.gateway.process.own_triton import OwnTriton
from labelmint.gateway.process.security import Security, check_exposure
from labelmint.gateway.process.settings import ServeSettings, unknown_variables
from labelmint.gateway.process.signals import Signals
from labelmint.gateway.rest.app import Exposure, create_app
from labelmint.gateway.sampling.access import Tokens
from labelmint.gateway.sampling.cache import SampleCache
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.indexed import Indexed
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import CallerSamples, Metrics, ServedModels
from labelmint.gateway.sampling.sampler import Limits, Sampler, SamplingCore
from labelmint.tracing import start_tracing
from labelmint.triton.client import TritonClient

logger = logging.getLogger(__name__)


async def serve(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises LabelmintError if the gateway cannot start.

    On SIGHUP it reads the models again. A second SIGINT or SIGTERM ends the process at once.
    """
    configure_logging(settings.log_format, settings.log_level)
    check_exposure(settings)
    grant_descriptors(settings.max_connections)
    security = Security.of(settings)
    announcer, signals = Announcer(settings), Signals()
    for line in unknown_variables():
        logger.warning("%s", line)
    index = _index(settings)
    async with contextlib.AsyncExitStack() as stack:
        listening = stack.enter_context(take_ports(settings.host, settings.http_port, settings.grpc_port))
        stack.callback(start_tracing(settings.otlp_endpoint))
        own = await _own_triton(settings, stack, announcer, signals=signals)
        if signals.stop.is_set():
            return
        client = TritonClient(settings.triton_url if own is None else own.server.grpc_url)
        stack.push_async_callback(client.close)
        catalog = Catalog(client, settings.pipeline)
        metrics = _metrics(catalog, security.tokens)
        if own is not None:
            await _check_index(index, catalog)
            own.supervise(metrics, catalog)
        lifecycle = Lifecycle(catalog, settings.max_connection_age_seconds, settings.capacity_wait_seconds > 0)
        cache = SampleCache(settings.cache_bytes, metrics)
        sampler = Sampler(catalog, client, metrics, cache=cache, limits=_limits(settings), index=index)
        core = SamplingCore(sampler, metrics, lifecycle)
        health = await stack.enter_async_context(health_service(lifecycle))
        await stack.enter_async_context(running(asyncio.create_task(give_back())))
        async with _servers(settings, security, listening, core=core, health=health):
            await stack.enter_async_context(_following(signals.reload, own, client, catalog=catalog))
            await announcer.announce(catalog, signals.stop, ports=listening.ports, tls=security.tls is not None)
            index.report(catalog.known())
            await signals.stop.wait()
            announcer.say("stopping")
            lifecycle.drain()
            await health.enter_graceful_shutdown()
            await asyncio.sleep(settings.drain_seconds)
            lifecycle.close()


async def _own_triton(
    settings: ServeSettings, stack: contextlib.AsyncExitStack, announcer: Announcer, *, signals: Signals
) -> OwnTriton | None:
    """Start a child Triton and wait until it is ready or a signal stops it; None if the settings name another."""
    if settings.triton_url:
        return None
    own = OwnTriton(settings)
    signals.at_once = own.server.kill
    stack.push_async_callback(own.stop)
    announcer.say(f"starting Triton on {settings.model_repository} ({', '.join(own.server.models)})")
    await own.start(signals.stop)
    return own


def _index(settings: ServeSettings) -> Indexed:
    """The index of the settings; raises UnusableFile."""
    if settings.index is None:
        return Indexed()
    from labelmint.seed_index.reading import SeedIndex  # here, because only an index needs pyarrow

    return Indexed(SeedIndex(settings.index), settings.index)


async def _check_index(index: Indexed, catalog: Catalog) -> None:
    """Raises UnusableFile if the index does not fit the models of the child Triton."""
    await catalog.refresh_anew()
    index.check(catalog.known())


def _limits(settings: ServeSettings) -> Limits:
    return Limits(
        max_in_flight=settings.max_in_flight,
        triton_slots=settings.triton_slots,
        max_streams=settings.max_streams,
        max_window=settings.max_window,
        max_empty_seeds=settings.max_empty_seeds,
        capacity_wait_seconds=settings.capacity_wait_seconds,
    )


def _metrics(catalog: Catalog, tokens: Tokens | None) -> Metrics:
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    registry.register(ServedModels(catalog.known))
    if tokens is not None:
        registry.register(CallerSamples(tokens.charged))
    return Metrics(registry)


@contextlib.asynccontextmanager
async def _servers(
    settings: ServeSettings,
    security: Security,
    listening: Listening,
    *,
    core: SamplingCore,
    health: HealthServicer,
) -> AsyncIterator[None]:
    """Run both servers until the end of the block. They stop concurrently, so the grace period passes once."""
    exposure = Exposure(
        tokens=security.tokens,
        tls=security.tls is not None,
        private=security.private,
        cors_origins=tuple(settings.cors_origins),
    )
    app = create_app(core, version=version("labelmint"), exposure=exposure)
    http_server = HttpServer(settings, security.tls, listening.http, app=RestAccessLog(app))
    grpc_server = GrpcServer(settings, security, listening.grpc, core=core, health=health)
    await grpc_server.start()
    try:
        await http_server.start()
    except LabelmintError:
        await grpc_server.stop_at_once()
        raise
    try:
        yield
    finally:
        await asyncio.gather(http_server.stop(), grpc_server.stop())


def _following(
    asked: asyncio.Event, own: OwnTriton | None, client: TritonClient, *, catalog: Catalog
) -> contextlib.AbstractAsyncContextManager[None]:
    """On each `asked`, reload the child Triton from its repository; of any other Triton, only read the models again."""

    async def follow() -> None:
        while True:
            await asked.wait()
            asked.clear()
            try:
                await (catalog.refresh_anew() if own is None else own.reload(client, catalog))
            except LabelmintError as error:
                logger.error("the models were not read again: %s", error.message)
            except Exception:
                logger.exception("the models were not read again")

    return running(asyncio.create_task(follow()))
