"""The access log of REST and gRPC: each request gets an id and a trace span, and one log line when it ends.

Rules of this file:
- Every response carries the request id as `x-request-id`: a response header in REST, trailing metadata in gRPC.
- A request ends with the last byte of its response. A stream is one request.
- Requests for health checks and metrics are logged at level debug.
- `status` is a number for both protocols, HTTP's or gRPC's. For gRPC, `code` is the name of that number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from starlette.types import Message, Receive, Scope, Send

from labelmint import conventions, tracing
from labelmint.gateway.grpc.interceptors import Handler, Interceptor, function_of, with_function
from labelmint.gateway.grpc.service import SERVICE_NAME, Context
from labelmint.gateway.rest.middleware import ALIVE_PATH, READY_PATH, Middleware, begun_with, ended_with
from labelmint.gateway.sampling.access import current_caller

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_PROBES = (ALIVE_PATH, READY_PATH, "/metrics")
_MAX_PATH = 200  # logged characters of a path or a model name
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class _Request:
    """`given` has the client's headers or metadata, `attributes` are those with which the request's span begins."""

    def __init__(
        self, span_name: str, given: Mapping[str, str], *, attributes: conventions.Attributes, **fields: str
    ) -> None:
        self._started = time.perf_counter()
        self._fields = fields
        given_id, traceparent = given.get(REQUEST_ID_HEADER, ""), given.get("traceparent", "")
        self._end_span = tracing.begin_request(span_name, given_id, traceparent, attributes=attributes)
        self.id = tracing.request_id()

    def end(self, level: int, span_name: str, attributes: conventions.Attributes, **fields: Any) -> None:
        """Record `attributes` in the trace and `fields` in the log."""
        seconds = round(time.perf_counter() - self._started, 6)
        logger.log(level, "request", extra={"fields": {**self._fields, **fields, "seconds": seconds}})
        self._end_span(span_name, attributes)


class RestAccessLog(Middleware):
    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method, name = scope["method"], conventions.http_span_name(scope["method"], "")
        request = _Request(name, headers, attributes=begun_with(scope), transport="rest", method=method)
        status: int | None = None

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), request.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            path = scope["raw_path"].decode("latin-1")[:_MAX_PATH]
            level = logging.DEBUG if path in _PROBES else logging.INFO
            # `outcome` is set for a client that left or a response that broke off.
            attributes = ended_with(scope, status)
            outcome = str(scope.get("state", {}).get("outcome", attributes.get("http.response.status_code")))
            told = {"status": int(outcome)} if outcome.isdecimal() else {"outcome": outcome, "status": status}
            name = conventions.http_span_name(method, str(attributes.get("http.route", "")))
            request.end(level, name, attributes, path=path, **told, **_caller())


class GrpcAccessLog(Interceptor):
    """An interceptor for all gRPC services; it logs and counts (`in_flight`) the calls of SampleService only."""

    def __init__(self, host: str, port: int) -> None:
        """`host` and `port` are where the server listens."""
        self.in_flight = 0
        self._server: conventions.Attributes = {"server.address": host, "server.port": port}

    def wrap(self, handler: Handler, details: grpc.HandlerCallDetails) -> Handler:
        service, _, method = details.method.lstrip("/").partition("/")
        if service != SERVICE_NAME:
            return handler
        function = function_of(handler)

        async def stream(message: Any, context: Context) -> AsyncIterator[Any]:
            with self._logged(method, message, context):
                async with aclosing(function(message, context)) as answers:
                    async for answer in answers:
                        yield answer

        async def single(message: Any, context: Context) -> Any:
            with self._logged(method, message, context):
                return await function(message, context)

        return with_function(handler, stream if handler.response_streaming else single)

    @contextmanager
    def _logged(self, method: str, message: Any, context: Context) -> Iterator[None]:
        self.in_flight += 1
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        name = f"{SERVICE_NAME}/{method}"
        attributes = {**conventions.rpc_call(name), **self._server}
        request = _Request(name, metadata, attributes=attributes, transport="grpc", method=method)
        context.set_trailing_metadata(((REQUEST_ID_HEADER, request.id),))
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            context.set_code(grpc.StatusCode.CANCELLED)
            raise
        finally:
            self.in_flight -= 1
            code = context.code() or 0
            code = code if isinstance(code, grpc.StatusCode) else _CODES[code]
            model = str(getattr(message, "model", ""))[:_MAX_PATH]
            told = {**({"model": model} if model else {}), "code": code.name, "status": code.value[0]}
            ended = conventions.rpc_status(code)
            if error := conventions.rpc_server_error(code):
                ended[conventions.ERROR_TYPE] = error
            request.end(logging.INFO, name, ended, **told, **_caller())


def _caller() -> dict[str, str]:
    """The caller whose token the request carried; empty without authentication or for an unknown token."""
    caller = current_caller.get()
    return {} if caller is None else {"caller": caller.name}
