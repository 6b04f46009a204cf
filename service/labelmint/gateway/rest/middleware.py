"""Middleware of every REST request: security headers, CORS, disconnects, metrics, authentication, limit on body size.

Rules of this file:
- The middleware is plain ASGI. A streamed response therefore stays a stream, and the middleware sees its end.
- Health checks need no token, because probes carry none. The static pages and the OpenAPI document need none, because
  they tell nothing about the served models. Everything else, metrics included, needs a token.
- If the client disconnects before its response is complete, the application's task is cancelled.
- No header gives other origins access, except the origins that the operator names (`--cors-origin`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labelmint import conventions
from labelmint.core.errors import LabelmintError, RequestTooLarge
from labelmint.gateway.rest.pages import PAGES
from labelmint.gateway.rest.problems import problem
from labelmint.gateway.sampling.access import Tokens, current_caller
from labelmint.gateway.sampling.metrics import UNKNOWN_MODEL, Metrics

ALIVE_PATH, READY_PATH = "/healthz", "/readyz"
OPEN_PATHS = (ALIVE_PATH, READY_PATH, "/openapi.json", *PAGES)

# Defaults: a header that the application has set is kept. The gallery and /docs set a policy of their own.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_HSTS = "max-age=31536000"


class Middleware:
    """Answers HTTP requests by `answer`. Passes on everything else, such as the server's lifespan messages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.answer if scope["type"] == "http" else self._app)(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class SecurityHeaders(Middleware):
    """Adds security headers for browsers to every response."""

    def __init__(self, app: ASGIApp, tls: bool, cors: bool) -> None:
        super().__init__(app)
        self._cors = cors
        self._headers = {**_HEADERS, **({"Strict-Transport-Security": _HSTS} if tls else {})}

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                # On every response: one that a browser cached for a request without Origin fails if reused with one.
                if self._cors and "Origin" not in headers.get("vary", ""):
                    headers.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, send_with_headers)


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Allow pages of these origins to send requests, with or without a token.

    Browsers may send a preflight request first, without a token. This middleware must therefore be outside `Access`.
    """
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("authorization", "content-type", "if-none-match", "traceparent", "x-request-id"),
        expose_headers=("etag", "retry-after", "x-request-id"),
    )


class CancelOnDisconnect(Middleware):
    """Hands the request on unchanged, and reads at most one message of its body ahead."""

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        working = asyncio.current_task()
        assert working is not None
        answered = gone = False

        async def watch() -> None:
            nonlocal gone
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)
            if answered:
                await messages.put(message)  # the application may be waiting for it
            else:
                gone = True
                working.cancel()

        async def send_on(message: Message) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, messages.get, send_on)
        except asyncio.CancelledError:
            if not gone:
                raise
        finally:
            watching.cancel()


def begun_with(scope: Scope) -> conventions.Attributes:
    """What OpenTelemetry's conventions say of a request when it begins."""
    path, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
    return conventions.http_request(scope["method"], scope["scheme"], path, query=query)


def ended_with(scope: Scope, status: int | None) -> conventions.Attributes:
    """What OpenTelemetry's conventions say of a request when it ends; `status` is None if nothing was sent.

    `state.error_type` says why a response was broken off.
    """
    state = scope.get("state", {})
    if status is None and "outcome" not in state:
        status = 500  # the server sends it for an application that failed before its response
    attributes = conventions.http_response(getattr(scope.get("route"), "path", ""), status)
    if error := state.get("error_type", conventions.http_error(status)):
        attributes[conventions.ERROR_TYPE] = error
    return attributes


class Measured(Middleware):
    """Counts every request and measures its time until the last byte. `state.outcome` overrides the sent status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        super().__init__(app)
        self._metrics = metrics

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status: int | None = None
        state = scope.setdefault("state", {})

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.requests_in_flight.labels("rest").inc()
        try:
            await self._app(scope, receive, send_noting_status)
        except asyncio.CancelledError:
            state["outcome"] = "499"  # nginx's status code for a client that disconnected
            raise
        finally:
            self._metrics.requests_in_flight.labels("rest").dec()
            attributes = {**begun_with(scope), **ended_with(scope, status)}
            outcome = state.get("outcome", str(attributes.get("http.response.status_code")))
            model, seconds = state.get("model", UNKNOWN_MODEL), time.perf_counter() - started
            self._metrics.http_ended(attributes, model=model, outcome=outcome, seconds=seconds)


class Access(Middleware):
    """Requires a token for every request except those for OPEN_PATHS, and sets `current_caller` to its owner."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        super().__init__(app)
        self._tokens = tokens

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            caller = self._tokens.authenticate(Headers(scope=scope).get("authorization"))
            with caller.request():
                current_caller.set(caller)
                await self._app(scope, receive, send)
        except LabelmintError as error:  # of this middleware; the application answers its own errors
            await problem(error)(scope, receive, send)


class BodyLimit(Middleware):
    """Reads the whole body before the application does, and refuses one larger than `limit` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        super().__init__(app)
        self._limit = limit

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
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
