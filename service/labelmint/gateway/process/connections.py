"""Limits the connections of both servers, which keeps file descriptors free for Triton, its log and the models.

Rules of this file:
- At the limit, the REST server closes the connection that was idle longest and accepts the new one. If no connection
  is idle, it closes the new one. gRPC's core closes the new one by itself.
- A client must send a whole request in time, or the server closes the connection. An incomplete request would
  otherwise occupy its connection for ever.
- asyncio must not run out of descriptors. It would log a traceback for every entry of its backlog, thousands a second
  (python/cpython#151615), and the gateway would do little else.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from labelmint.core.errors import InsufficientResources

logger = logging.getLogger(__name__)

# From the start of the connection, or from the first byte of a later request, to the last byte of the request's body.
# The TLS handshake has a time limit of its own in both servers.
REQUEST_SECONDS = 30.0
# In addition to the connections: the child Triton uses 69 with two models, this process 20.
_OTHER_DESCRIPTORS = 224
_TOLD_SECONDS = 60.0


def grpc_options(max_connections: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", int(1000 * REQUEST_SECONDS)),
    ]


def grant_descriptors(max_connections: int) -> None:
    """Raise this process's limit of open files to its need. Raises InsufficientResources if that is not allowed."""
    needed = _OTHER_DESCRIPTORS + 2 * max_connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise InsufficientResources(
                f"this process may open {hard} files, but {max_connections} connections at each of the two servers "
                f"need {needed}: raise the limit (ulimit -n) or lower --max-connections"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class BoundedListener(socket.socket):
    """Replaces a listening socket and keeps at most `most` accepted connections open at a time.

    `make_room` closes an idle connection, if there is one, and returns whether it did.
    """

    def __init__(self, listener: socket.socket, most: int, make_room: Callable[[], bool] = lambda: False) -> None:
        super().__init__(listener.family, listener.type, listener.proto, listener.detach())
        self._most = most
        self._make_room = make_room
        self._accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._told = float("-inf")

    def accept(self) -> tuple[socket.socket, Any]:
        """Raises ConnectionAbortedError beyond the limit; asyncio treats it as a connection that the client ended."""
        connection, address = super().accept()
        if len(self._accepted) >= self._most:
            self._accepted = weakref.WeakSet(each for each in self._accepted if each.fileno() >= 0)
        if len(self._accepted) >= self._most and not self._make_room():
            connection.close()
            if time.monotonic() - self._told > _TOLD_SECONDS:
                self._told = time.monotonic()
                logger.warning("the REST server has its limit of %d connections; new ones are closed", self._most)
            raise ConnectionAbortedError
        # asyncio sets this only if the listener names its protocol, which uvicorn's does not. Without it, the second
        # write of a response waits 40 ms for the client's delayed acknowledgement of the first.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._accepted.add(connection)
        return connection, address


class ImpatientHttp(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a time limit for requests; uvicorn's own waits for a request for ever."""

    _limit: asyncio.TimerHandle | None = None
    idle_since: float | None = None  # since when it waits for the next request, by the loop's clock

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit = self.loop.call_later(REQUEST_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        self.idle_since = None
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._lift()
        elif self._limit is None:
            self._limit = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()  # this may begin the next request
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle_since = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._lift()
        super().connection_lost(exc)

    def _lift(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


def make_room(connections: Iterable[Any]) -> bool:
    """Close the REST connection that was idle longest; return False if none is idle."""
    idle = [each for each in connections if each.idle_since is not None and not each.transport.is_closing()]
    if not idle:
        return False
    min(idle, key=lambda each: float(each.idle_since)).transport.abort()
    return True
