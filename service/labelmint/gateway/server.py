"""The gateway process: Triton child, gRPC server and REST server over one sampling core, in one event loop.

Rules of this file:
- Order up: Triton, doors, readiness. Order down: readiness, doors, Triton. Nothing outlives the process.
- A Triton child that dies is started again with growing pauses; readiness follows Triton, not us.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version

import grpc.aio
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from labelmint.errors import AddressInUse, LabelmintError, UnusableFile
from labelmint.gateway.catalog import Catalog
from labelmint.gateway.grpc_api import SERVICE_NAME, SampleService
from labelmint.gateway.metrics import Metrics
from labelmint.gateway.rest_api import create_app
from labelmint.gateway.sampling import Sampler
from labelmint.gateway.served_model import MalformedModel, read_served_model
from labelmint.settings import ServeSettings
from labelmint.triton.client import TritonClient
from labelmint.triton.model_config import check_artifacts, ensembles
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

_HEALTH_SECONDS = 1.0
_RESTART_PAUSES_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
MAX_REQUEST_BYTES = 1 << 20  # a request is a few numbers


async def serve(settings: ServeSettings, say: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; raises LabelmintError when it cannot start."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop.set)
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        triton_url = settings.triton_url or await stack.enter_async_context(_own_triton(settings, stop, say))
        if stop.is_set():
            return
        client = TritonClient(triton_url)
        stack.push_async_callback(client.close)
        catalog = Catalog(client, settings.pipeline)
        registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        metrics = Metrics(registry)
        sampler = Sampler(catalog, client, metrics, settings.max_in_flight)
        grpc_port = await stack.enter_async_context(_grpc_server(settings, sampler, metrics))
        http_port = await stack.enter_async_context(_http_server(settings, sampler, metrics))
        await _announce(settings, catalog, stop, (http_port, grpc_port), started, say)
        await stop.wait()
        say("labelmint: stopping")


@contextlib.asynccontextmanager
async def _own_triton(settings: ServeSettings, stop: asyncio.Event, say: Callable[[str], None]) -> AsyncIterator[str]:
    """A child Triton that has its models ready, and a task that restarts it when it dies."""
    served = []
    for name, config in ensembles(settings.model_repository).items():
        if config.parameters["pipeline"].string_value == settings.pipeline:
            check_artifacts(settings.model_repository, config)
            try:
                read_served_model(config, "1")
            except MalformedModel as error:
                raise UnusableFile(
                    settings.model_repository / name / "config.pbtxt", f"is malformed: {error}"
                ) from error
            served.append(name)
    if not served:
        raise UnusableFile(settings.model_repository, f"holds no {settings.pipeline} ensemble; export the model again")
    server = TritonServer(settings.model_repository, served, settings.triton_log)
    say(f"labelmint: starting Triton on {settings.model_repository} ({', '.join(served)})")
    supervisor: asyncio.Task[None] | None = None
    try:
        await server.start()
        await wait_until_ready(server, served, stop)
        supervisor = asyncio.create_task(_keep_running(server))
        yield server.grpc_url
    finally:
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        await server.stop()


async def _keep_running(server: TritonServer) -> None:
    failures = 0
    while True:
        started = time.monotonic()
        code = await server.wait()
        if time.monotonic() - started > 60.0:
            failures = 0
        pause = _RESTART_PAUSES_SECONDS[min(failures, len(_RESTART_PAUSES_SECONDS) - 1)]
        failures += 1
        logger.error("Triton ended with exit code %s; starting it again in %.1f s", code, pause)
        await asyncio.sleep(pause)
        try:
            await server.start()
        except Exception:
            logger.exception("Triton could not be started; trying again")


@contextlib.asynccontextmanager
async def _grpc_server(settings: ServeSettings, sampler: Sampler, metrics: Metrics) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)])
    pb_grpc.add_SampleServiceServicer_to_server(SampleService(sampler, metrics), server)  # type: ignore[no-untyped-call]
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )
    try:
        port = server.add_insecure_port(f"{settings.host}:{settings.grpc_port}")
    except RuntimeError as error:
        raise _port_taken(settings.host, settings.grpc_port, "--grpc-port") from error
    for service in ("", SERVICE_NAME):
        await health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
    await server.start()
    watcher = asyncio.create_task(_watch_health(health, sampler.catalog))
    try:
        yield port
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await health.enter_graceful_shutdown()
        await server.stop(settings.grace_seconds)


async def _watch_health(health: HealthServicer, catalog: Catalog) -> None:
    """grpc.health.v1 follows Triton's readiness."""
    while True:
        status = health_pb2.HealthCheckResponse.SERVING
        try:
            await catalog.check_ready()
        except Exception as error:
            status = health_pb2.HealthCheckResponse.NOT_SERVING  # type: ignore[assignment]
            if not isinstance(error, LabelmintError):
                logger.exception("the readiness of Triton could not be asked")
        for service in ("", SERVICE_NAME):
            await health.set(service, status)
        await asyncio.sleep(_HEALTH_SECONDS)


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers of its own: `serve` owns them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _http_server(settings: ServeSettings, sampler: Sampler, metrics: Metrics) -> AsyncIterator[int]:
    config = uvicorn.Config(
        create_app(sampler, metrics, version("labelmint")),
        host=settings.host,
        port=settings.http_port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
    )
    try:
        listener = config.bind_socket()
    except SystemExit as error:  # uvicorn's way to say that the address is taken
        raise _port_taken(settings.host, settings.http_port, "--http-port") from error
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        listener.close()


def _port_taken(host: str, port: int, flag: str) -> LabelmintError:
    return AddressInUse(f"cannot listen on {host}:{port}; is another labelmint running? Choose a port with {flag}")


async def _announce(
    settings: ServeSettings,
    catalog: Catalog,
    stop: asyncio.Event,
    ports: tuple[int, int],
    started: float,
    say: Callable[[str], None],
) -> None:
    """Say what is served once it is; until then say, once, what is waited for."""
    waiting = False
    while not stop.is_set():
        try:
            await catalog.check_ready()
            break
        except LabelmintError as error:
            if not waiting:
                say(f"labelmint: listening, but not ready: {error.message}. Waiting for Triton.")
                waiting = True
            await asyncio.sleep(_HEALTH_SECONDS)
    else:
        return
    models = await catalog.list()
    for model in models:
        gate = f"gate at JS {model.calibration.threshold:.4g}" if model.calibration is not None else "not calibrated"
        say(f"labelmint: {model.name}, {model.resolution}x{model.resolution}, {len(model.class_names)} classes, {gate}")
    http_port, grpc_port = ports
    say(
        f"labelmint: ready after {time.monotonic() - started:.1f} s. REST http://{settings.host}:{http_port} "
        f"(docs at /docs), gRPC {settings.host}:{grpc_port}. Ctrl-C stops everything."
    )
    url = f"http://{settings.host}:{http_port}/v1/models/{models[0].name}/samples/7/overlay.png"
    say(f"  try: curl -so pair.png {url}")
