"""What surrounds every REST request: security headers, measuring, tokens, the size of bodies.

Rules of this file:
- Plain ASGI, so that a streamed answer stays a stream and its end is seen here.
- Open are health, since probes carry no token, and the pages, which are the same in every labelmint and hold no data.
  Everything that tells of this one wants a token, metrics included.
- No header allows another origin anything, but those that the operator names (`--cors-origin`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labelmint.core.errors import LabelmintError, RequestTooLarge
from labelmint.gateway.rest.docs import DOCS_PATHS
from labelmint.gateway.rest.gallery import GALLERY_PATHS
from labelmint.gateway.rest.problems import problem
from labelmint.gateway.sampling.access import Tokens, current_caller
from labelmint.gateway.sampling.metrics import UNKNOWN_MODEL, Metrics

ALIVE_PATH, READY_PATH = "/healthz", "/readyz"
OPEN_PATHS = (ALIVE_PATH, READY_PATH, "/openapi.json", *DOCS_PATHS, *GALLERY_PATHS)

# A page that needs more (the gallery, /docs) sets its own policy; what is set is left alone.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_HSTS = "max-age=31536000"


class SecurityHeaders:
    """Sets what a browser must know to keep its user safe, on every answer."""

    def __init__(self, app: ASGIApp, tls: bool, cors: bool) -> None:
        self._app = app
        self._cors = cors
        self._headers = {**_HEADERS, **({"Strict-Transport-Security": _HSTS} if tls else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                # On every answer: one that a browser kept without an origin would fail with one.
                if self._cors and "Origin" not in headers.get("vary", ""):
                    headers.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, send_with_headers)


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of these origins ask, with tokens if they have one; browsers ask first, and without a token."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("authorization", "content-type", "if-none-match", "traceparent", "x-request-id"),
        expose_headers=("etag", "retry-after", "x-request-id"),
    )


class Measured:
    """Counts and times every request until its last byte; `state.outcome` overrides the status that was sent."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), "500"
        state = scope.setdefault("state", {})

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        self._metrics.requests_in_flight.labels("rest").inc()
        try:
            await self._app(scope, receive, send_noting_status)
        except asyncio.CancelledError:
            state["outcome"] = "499"  # nginx's number for a client that went away
            raise
        finally:
            route = getattr(scope.get("route"), "path", "-")
            self._metrics.requests_in_flight.labels("rest").dec()
            code, model = state.get("outcome", status), state.get("model", UNKNOWN_MODEL)
            self._metrics.requests.labels("rest", route, model, code).inc()
            self._metrics.request_seconds.labels("rest", route).observe(time.perf_counter() - started)


class Access:
    """Asks every request but those for OPEN_PATHS for a token; `current_caller` is whose it is."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            caller = self._tokens.authenticate(Headers(scope=scope).get("authorization"))
            with caller.request():
                current_caller.set(caller)
                await self._app(scope, receive, send)
        except LabelmintError as error:  # the application answers its own
            await problem(error)(scope, receive, send)


class BodyLimit:
    """Reads a body, at most `limit` bytes of it, before the application does."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        size, received, messages = int(announced) if announced.isdecimal() else 0, 0, list[Message]()
        while size <= self._limit and not (messages and not messages[-1].get("more_body", False)):
            messages.append(await receive())
            received += len(messages[-1].get("body", b""))
            size = max(size, received)
        if size > self._limit:
            error = RequestTooLarge(f"the body is larger than {self._limit} bytes; send fewer seeds at once")
            await problem(error)(scope, receive, send)
            return
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)
