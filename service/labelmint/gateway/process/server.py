"""The gateway process: Triton child, gRPC server and REST server over one sampling core, in one event loop.

Rules of this file:
- Order up: ports, Triton, doors, readiness. Order down: readiness, a pause in which load balancers see it, doors,
  Triton. Nothing outlives the process.
- Ready means that what is asked is answered or held, and the end has not begun; alive, that the process answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import grpc.aio
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from labelmint.core.errors import LabelmintError
from labelmint.gateway.grpc.access import AccessInterceptor
from labelmint.gateway.grpc.parsing import ParsingInterceptor
from labelmint.gateway.grpc.reflection import add_reflection
from labelmint.gateway.grpc.service import SERVICE_NAME, SampleService
from labelmint.gateway.process.addresses import bracketed, cannot_listen, take
from labelmint.gateway.process.connections import (
    BoundedListener,
    ImpatientHttp,
    grant_descriptors,
    grpc_options,
    make_room,
)
from labelmint.gateway.process.exposure import check_exposure
from labelmint.gateway.process.logs import configure_logging
from labelmint.gateway.process.memory import give_back
from labelmint.gateway.process.own_triton import OwnTriton
from labelmint.gateway.process.request_log import GrpcRequests, RestRequests
from labelmint.gateway.process.settings import ServeSettings, unknown_variables
from labelmint.gateway.process.tls import Tls, tls_of
from labelmint.gateway.rest.app import MAX_BODY_BYTES, Exposure, create_app
from labelmint.gateway.sampling.access import Tokens
from labelmint.gateway.sampling.cache import SampleCache
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import CallerSamples, Metrics, ServedModels
from labelmint.gateway.sampling.sampler import Limits, Sampler
from labelmint.tracing import start_tracing
from labelmint.triton.client import TritonClient
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

_HEALTH_SECONDS = 1.0
# Clients usually ping every 10 s; a ping may be late, and the next one then comes early.
_MIN_PING_SECONDS = 5.0
# Calls of other services (somebody who watches our health) and the last answers on their way, once ours are over.
_LAST_SECONDS = 1.0
# After this connection age a stream may run as long again before it ends by itself; this comes on top.
_CONNECTION_SLACK_SECONDS = 10.0


async def serve(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM; raises LabelmintError when it cannot start.

    SIGHUP reads the models again. A second SIGINT or SIGTERM ends the process at once.
    """
    configure_logging(settings.log_format, settings.log_level)
    check_exposure(settings)
    grant_descriptors(settings.max_connections)
    access = _Access.of(settings)
    started = time.monotonic()
    signals = _Signals()
    for line in unknown_variables():
        logger.warning("%s", line)
    async with contextlib.AsyncExitStack() as stack:
        addresses = _Addresses(
            stack.enter_context(take(settings.host, settings.http_port, "--http-port")),
            stack.enter_context(take(settings.host, settings.grpc_port, "--grpc-port")),
        )
        ports = addresses.http.getsockname()[1], addresses.grpc.getsockname()[1]
        stack.callback(start_tracing(settings.otlp_endpoint))
        own = None
        if not settings.triton_url:
            own = OwnTriton(settings.model_repository, settings.pipeline, settings.triton_log, settings.otlp_endpoint)
            signals.at_once = own.kill
            stack.push_async_callback(own.stop)
            _say(settings, f"starting Triton on {settings.model_repository} ({', '.join(own.models)})")
            await own.start(signals.stop)
            if signals.stop.is_set():
                return
        client = TritonClient(settings.triton_url if own is None else own.url)
        stack.push_async_callback(client.close)
        catalog = Catalog(client, settings.pipeline)
        metrics = _metrics(catalog, access.tokens)
        if own is not None:
            own.supervise(metrics, catalog)
        lifecycle = Lifecycle(catalog, settings.max_connection_age_seconds, settings.capacity_wait_seconds > 0)
        limits = Limits(
            settings.max_in_flight,
            settings.triton_slots,
            settings.max_streams,
            settings.max_window,
            settings.capacity_wait_seconds,
        )
        sampler = Sampler(catalog, client, metrics, cache=SampleCache(settings.cache_bytes, metrics), limits=limits)
        health = await stack.enter_async_context(_health(lifecycle))
        await stack.enter_async_context(_running(asyncio.create_task(give_back())))
        async with _doors(settings, access, addresses, sampler, metrics, lifecycle, health):
            await stack.enter_async_context(_following(signals.reload, own, client, catalog))
            await _announce(settings, access, catalog, signals.stop, ports, started)
            await signals.stop.wait()
            _say(settings, "stopping")
            lifecycle.drain()
            await health.enter_graceful_shutdown()
            await asyncio.sleep(settings.drain_seconds)
            lifecycle.close()


@dataclass(frozen=True)
class _Addresses:
    """Where the doors are to be: sockets that are bound and do not listen."""

    http: socket.socket
    grpc: socket.socket


@dataclass(frozen=True)
class _Access:
    """Who may ask, and under which keys; None where the settings ask for neither."""

    tokens: Tokens | None
    tls: Tls | None

    @classmethod
    def of(cls, settings: ServeSettings) -> _Access:
        """Raises UnusableFile before anything is started."""
        tls = tls_of(settings)
        if tls is not None:
            tls.check()
        return cls(None if settings.tokens_file is None else Tokens(settings.tokens_file), tls)


class _Signals:
    """What signals ask for. `at_once` is called before the process exits because the end was asked for twice."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        self.at_once: Callable[[], None] = lambda: None
        # A terminal that is closed sends SIGHUP too; who serves from there wants the end.
        self._had_terminal = os.isatty(0)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _end(self, number: int) -> None:
        if self.stop.is_set():
            self.at_once()
            os._exit(128 + number)
        self.stop.set()

    def _hang_up(self) -> None:
        if self._had_terminal and not os.isatty(0):
            self.stop.set()
        else:
            self.reload.set()


@contextlib.asynccontextmanager
async def _running(task: asyncio.Task[None]) -> AsyncIterator[None]:
    """Until the end of the block; one that fails before is logged at once."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a part of the gateway has failed, the others go on", exc_info=error)

    task.add_done_callback(ended)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _following(
    asked: asyncio.Event, own: OwnTriton | None, client: TritonClient, catalog: Catalog
) -> contextlib.AbstractAsyncContextManager[None]:
    """Whenever asked, our own Triton follows the repository; what another one has is only looked at again."""

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

    return _running(asyncio.create_task(follow()))


def _metrics(catalog: Catalog, tokens: Tokens | None) -> Metrics:
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    registry.register(ServedModels(catalog.known))
    if tokens is not None:
        registry.register(CallerSamples(tokens.charged))
    return Metrics(registry)


@contextlib.asynccontextmanager
async def _health(lifecycle: Lifecycle) -> AsyncIterator[HealthServicer]:
    """grpc.health.v1, which follows our readiness."""
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
                    logger.exception("the readiness of Triton could not be asked")
            for service in services:
                await health.set(service, status)
            await asyncio.sleep(_HEALTH_SECONDS)

    async with _running(asyncio.create_task(watch())):
        yield health


@contextlib.asynccontextmanager
async def _doors(
    settings: ServeSettings,
    access: _Access,
    addresses: _Addresses,
    sampler: Sampler,
    metrics: Metrics,
    lifecycle: Lifecycle,
    health: HealthServicer,
) -> AsyncIterator[None]:
    """REST and gRPC are open. Both doors are closed side by side, so that the grace passes once."""
    requests = GrpcRequests()
    interceptors: list[grpc.aio.ServerInterceptor] = [requests]
    if access.tokens is not None:
        interceptors.append(AccessInterceptor(access.tokens, metrics))
    interceptors.append(ParsingInterceptor(metrics))
    service = SampleService(sampler, metrics, lifecycle)
    grpc_server = _grpc_server(settings, access.tls, addresses.grpc, service, health, interceptors)
    await grpc_server.start()
    http_server = _Uvicorn(_http_config(settings, access, sampler, metrics, lifecycle))
    connections = http_server.server_state.connections
    listener = BoundedListener(addresses.http, settings.max_connections, lambda: make_room(connections))
    try:
        listener.listen()
    except OSError as error:  # somebody else listens since
        await grpc_server.stop(None)
        raise cannot_listen(error, settings.host, settings.http_port, "--http-port") from error
    http_task = asyncio.create_task(http_server.serve(sockets=[listener]))
    try:
        while not http_server.started and not http_task.done():
            await asyncio.sleep(0.01)
        yield
    finally:
        http_server.should_exit = True
        await asyncio.gather(http_task, _close_grpc(grpc_server, requests, settings.grace_seconds))
        listener.close()


def _http_config(
    settings: ServeSettings, access: _Access, sampler: Sampler, metrics: Metrics, lifecycle: Lifecycle
) -> uvicorn.Config:
    tls = access.tls
    exposure = Exposure(
        tokens=access.tokens,
        tls=tls is not None,
        private=access.tokens is not None or (tls is not None and tls.client_ca is not None),
        cors_origins=tuple(settings.cors_origins),
    )
    app = create_app(sampler, metrics, lifecycle, version=version("labelmint"), exposure=exposure)
    return uvicorn.Config(
        RestRequests(app),
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.key,
        ssl_ca_certs=None if tls is None or tls.client_ca is None else str(tls.client_ca),
        ssl_cert_reqs=ssl.CERT_NONE if tls is None or tls.client_ca is None else ssl.CERT_REQUIRED,
        http=ImpatientHttp,
        timeout_keep_alive=settings.http_keep_alive_seconds,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
    )


def _grpc_server(
    settings: ServeSettings,
    tls: Tls | None,
    taken: socket.socket,
    service: SampleService,
    health: HealthServicer,
    interceptors: list[grpc.aio.ServerInterceptor],
) -> grpc.aio.Server:
    options = [
        ("grpc.max_receive_message_length", MAX_BODY_BYTES),
        ("grpc.so_reuseport", 0),
        *grpc_options(settings.max_connections),
        # Clients may ask whether we are there, while a slow reader holds up its stream and when they have no call open.
        # By gRPC's own limits, five minutes and two hours, they would be cut off.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * _MIN_PING_SECONDS)),
    ]
    if settings.max_connection_age_seconds:
        # gRPC cuts what is open after the age and the grace; our streams end by themselves before that.
        age = settings.max_connection_age_seconds
        options.append(("grpc.max_connection_age_ms", int(1000 * age)))
        options.append(("grpc.max_connection_age_grace_ms", int(1000 * (age + _CONNECTION_SLACK_SECONDS))))
    server = grpc.aio.server(interceptors=interceptors, options=options)
    pb_grpc.add_SampleServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_reflection(server, (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
    host, port = taken.getsockname()[:2]
    try:
        if tls is None:
            server.add_insecure_port(bracketed(host, port))
        else:
            server.add_secure_port(bracketed(host, port), tls.credentials())
    except RuntimeError as error:  # somebody else listens since
        in_use = OSError(errno.EADDRINUSE, str(error))
        raise cannot_listen(in_use, settings.host, settings.grpc_port, "--grpc-port") from error
    return server


async def _close_grpc(server: grpc.aio.Server, requests: GrpcRequests, grace_seconds: float) -> None:
    """Take nothing new, let what runs end within the grace; who only watches our health does not hold us up."""
    stopping = asyncio.create_task(server.stop(grace_seconds))
    while requests.in_flight and not stopping.done():
        await asyncio.sleep(0.02)
    await server.stop(_LAST_SECONDS)
    await stopping


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers of its own: `serve` owns them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _say(settings: ServeSettings, text: str) -> None:
    """To the person who started us, on stdout; where logs are read by machines, to the log."""
    if settings.log_format == "text":
        print(f"labelmint: {text}", flush=True)
    else:
        logger.info("%s", text)


async def _announce(
    settings: ServeSettings,
    access: _Access,
    catalog: Catalog,
    stop: asyncio.Event,
    ports: tuple[int, int],
    started: float,
) -> None:
    """Say what is served once it is; until then say, once, what is waited for."""
    waiting = False
    while not stop.is_set():
        try:
            await catalog.refresh_anew()
            models = catalog.known()
            break
        except LabelmintError as error:
            if not waiting:
                _say(settings, f"listening, but not ready: {error.message}. Waiting for Triton.")
                waiting = True
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), _HEALTH_SECONDS)
    else:
        return
    for model in models:
        gate = f"gate at JS {model.calibration.threshold:.4g}" if model.calibration is not None else "not calibrated"
        labels = f"{len(model.label_names)} {model.task.names}"
        name = model.name if model.version == "1" else f"{model.name} version {model.version}"
        _say(settings, f"{name}, {model.resolution}x{model.resolution}, {labels}, {gate}")
    http, grpc_address = (bracketed(settings.host, port) for port in ports)
    url = f"{'http' if access.tls is None else 'https'}://{http}"
    _say(
        settings,
        f"ready after {time.monotonic() - started:.1f} s. REST {url} (docs at /docs), "
        f"gRPC {grpc_address}. Ctrl-C stops everything.",
    )
    if settings.log_format == "text":
        print(f"  try: curl -so pair.png {url}/v1/models/{models[0].name}/samples/7/overlay.png", flush=True)
