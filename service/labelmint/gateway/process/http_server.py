"""The HTTP server: uvicorn with the REST application, its TLS and its limits.

Rules of this file:
- The process handles signals; uvicorn does not.
- The caller has bound the port before; this file makes the server listen on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from labelmint.gateway.process.addresses import cannot_listen
from labelmint.gateway.process.connections import BoundedListener, ImpatientHttp, make_room
from labelmint.gateway.process.security import Tls
from labelmint.gateway.process.settings import ServeSettings


class HttpServer:
    def __init__(self, settings: ServeSettings, tls: Tls | None, taken: socket.socket, *, app: ASGIApp) -> None:
        self._settings = settings
        self._server = _Uvicorn(_config(settings, tls, app))
        connections = self._server.server_state.connections
        self._listener = BoundedListener(taken, settings.max_connections, lambda: make_room(connections))
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises CannotListen."""
        try:
            self._listener.listen()
        except OSError as error:  # another process has started to listen there
            raise cannot_listen(error, self._settings.host, self._settings.http_port, flag="--http-port") from error
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Accept no new requests and let running requests finish within the grace period."""
        assert self._serving is not None, "it was not started"
        self._server.should_exit = True
        await self._serving
        self._listener.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(settings: ServeSettings, tls: Tls | None, app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
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
