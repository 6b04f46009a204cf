"""Messages that cannot be parsed: every service of the gRPC server reports them as the client's error.

Rules of this file:
- gRPC for Python reports such a message as an unknown error of the server and logs a traceback. This file reports an
  InvalidRequest, as REST does for a body that is not JSON.
- This is the innermost interceptor. Authentication comes first, so a client without a token learns nothing about its
  message.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from labelmint.core.errors import InvalidRequest
from labelmint.gateway.grpc.service import Context, refuse
from labelmint.gateway.sampling.metrics import Metrics


class ParsingInterceptor(grpc.aio.ServerInterceptor):
    """Passes parsed messages to the handler and refuses the others."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.rpartition("/")[2]
        kind = "stream" if handler.request_streaming else "unary"
        kind += "_stream" if handler.response_streaming else "_unary"
        behaviour = getattr(handler, kind)

        async def whole(request: Any, context: Context) -> Any:
            try:
                parsed = _checked(request)
            except InvalidRequest as error:
                await refuse(self._metrics, method, context, error=error)
            return await behaviour(parsed, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                parsed = _each_checked(request) if handler.request_streaming else _checked(request)
                async with aclosing(behaviour(parsed, context)) as answers:
                    async for answer in answers:
                        yield answer
            except InvalidRequest as error:
                await refuse(self._metrics, method, context, error=error)

        # A coroutine can also write a response stream, as gRPC's own health Watch does.
        guarded = stream if inspect.isasyncgenfunction(behaviour) else whole
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            guarded, _lenient(handler.request_deserializer), handler.response_serializer
        )


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return the message, or an InvalidRequest as a value: an exception raised here would never reach a handler."""

    def parse(content: bytes) -> Any:
        try:
            return deserialize(content)
        except DecodeError as error:
            return InvalidRequest("message", f"cannot be parsed as the request of this method: {error}")

    return parse


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidRequest):
        raise request
    return request


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
