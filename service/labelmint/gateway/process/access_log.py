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
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from starlette.types import Message, Receive, Scope, Send

from labelmint import tracing
from labelmint.gateway.grpc.interceptors import Handler, Interceptor, function_of, with_function
from labelmint.gateway.grpc.service import SERVICE_NAME, Context
from labelmint.gateway.rest.middleware import ALIVE_PATH, READY_PATH, Middleware
from labelmint.gateway.sampling.access import current_caller

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_PROBES = (ALIVE_PATH, READY_PATH, "/metrics")
_MAX_PATH = 200  # logged characters of a path or a model name
_CODES = {code.value[0]: code for code in grpc.StatusCode}
# These codes say that the server failed, not the client.
_SERVER_CODES = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNIMPLEMENTED", "DEADLINE_EXCEEDED")


class _Request:
    def __init__(self, transport: str, method: str, given_id: str, *, traceparent: str) -> None:
        self._started = time.perf_counter()
        self._fields: dict[str, Any] = {"transport": transport, "method": method}
        self._end_span = tracing.begin_request(f"{transport} {method}", given_id, traceparent)
        self.id = tracing.request_id()

    def end(self, level: int, outcome: str, failed: bool, /, **fields: Any) -> None:
        """Record `outcome` in the trace and `fields` in the log."""
        seconds = round(time.perf_counter() - self._started, 6)
        logger.log(level, "request", extra={"fields": {**self._fields, **fields, "seconds": seconds}})
        self._end_span(outcome, failed)


class RestAccessLog(Middleware):
    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given_id, traceparent = headers.get(REQUEST_ID_HEADER.encode(), ""), headers.get(b"traceparent", "")
        request = _Request("rest", scope["method"], given_id, traceparent=traceparent)
        status = 500

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
            outcome = str(scope.get("state", {}).get("outcome", status))
            told = {"status": int(outcome)} if outcome.isdecimal() else {"outcome": outcome, "status": status}
            request.end(level, outcome, outcome.startswith("5"), path=path, **told, **_caller())


class GrpcAccessLog(Interceptor):
    """An interceptor for all gRPC services; it logs and counts (`in_flight`) the calls of SampleService only."""

    def __init__(self) -> None:
        self.in_flight = 0

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
        metadata = dict(context.invocation_metadata() or ())
        given_id, traceparent = str(metadata.get(REQUEST_ID_HEADER, "")), str(metadata.get("traceparent", ""))
        request = _Request("grpc", method, given_id, traceparent=traceparent)
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
            request.end(logging.INFO, code.name, code.name in _SERVER_CODES, **told, **_caller())


def _caller() -> dict[str, str]:
    """The caller whose token the request carried; empty without authentication or for an unknown token."""
    caller = current_caller.get()
    return {} if caller is None else {"caller": caller.name}
