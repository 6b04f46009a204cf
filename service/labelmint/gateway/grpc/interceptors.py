"""What every gRPC call passes before its handler: the check of its token, the limits, and the parsing of its message.

Rules of this file:
- The health service needs no token, because probes carry none. Every other service of the server needs one, reflection
  included.
- `AccessInterceptor` identifies the caller and limits its concurrency. The sampler reads the caller from
  `current_caller` and charges it for samples.
- gRPC for Python reports a message that cannot be parsed as an unknown error of the server and logs a traceback.
  `ParsingInterceptor` reports an InvalidRequest, as REST does for a body that is not JSON. It is the innermost
  interceptor, so a client without a token learns nothing about its message.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from labelmint.core.errors import InvalidRequest, LabelmintError
from labelmint.gateway.grpc.service import Context, refuse
from labelmint.gateway.sampling.access import Caller, Tokens, current_caller
from labelmint.gateway.sampling.metrics import Metrics

_OPEN = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
# A handler of grpc.aio. Its functions are coroutines and async generators, which gRPC's type annotations do not say.
Handler: TypeAlias = Any


class Interceptor(grpc.aio.ServerInterceptor):
    """Replaces the handlers of the server's methods by those that `wrap` returns."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return None if handler is None else self.wrap(handler, handler_call_details)

    def wrap(self, handler: Handler, details: grpc.HandlerCallDetails) -> Handler:
        raise NotImplementedError


def function_of(handler: Handler) -> Any:
    return getattr(handler, _kind_of(handler))


def with_function(handler: Handler, function: Any, deserializer: Any = None) -> Handler:
    """Return a handler of the same kind with another function and, if given, another deserializer."""
    make = getattr(grpc, f"{_kind_of(handler)}_rpc_method_handler")
    return make(function, deserializer or handler.request_deserializer, handler.response_serializer)


def _kind_of(handler: Handler) -> str:
    sides = (handler.request_streaming, handler.response_streaming)
    return "_".join("stream" if streaming else "unary" for streaming in sides)


class AccessInterceptor(Interceptor):
    """Requires a token for every call except those of grpc.health.v1."""

    def __init__(self, tokens: Tokens, metrics: Metrics) -> None:
        self._tokens = tokens
        self._metrics = metrics

    def wrap(self, handler: Handler, details: grpc.HandlerCallDetails) -> Handler:
        if details.method.startswith(_OPEN):
            return handler
        method, function = details.method.lstrip("/"), function_of(handler)
        caller: Caller | LabelmintError
        try:
            authorization = dict(details.invocation_metadata or ()).get("authorization")
            caller = self._tokens.authenticate(authorization if isinstance(authorization, str) else None)
        except LabelmintError as error:
            caller = error

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with AsyncExitStack() as stack:
                await self._admit(stack, context, method, caller=caller)
                async for message in await stack.enter_async_context(aclosing(function(request, context))):
                    yield message

        async def single(request: Any, context: Context) -> Any:
            async with AsyncExitStack() as stack:
                await self._admit(stack, context, method, caller=caller)
                return await function(request, context)

        return with_function(handler, stream if handler.response_streaming else single)

    async def _admit(
        self, stack: AsyncExitStack, context: Context, method: str, *, caller: Caller | LabelmintError
    ) -> None:
        if isinstance(caller, LabelmintError):
            await refuse(self._metrics, method, context, error=caller)
        current_caller.set(caller)
        try:
            stack.enter_context(caller.request())
        except LabelmintError as error:
            await refuse(self._metrics, method, context, error=error)


class ParsingInterceptor(Interceptor):
    """Passes parsed messages to the handler and refuses the others."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def wrap(self, handler: Handler, details: grpc.HandlerCallDetails) -> Handler:
        method, function = details.method.lstrip("/"), function_of(handler)

        async def single(request: Any, context: Context) -> Any:
            try:
                parsed = _checked(request)
            except InvalidRequest as error:
                await refuse(self._metrics, method, context, error=error)
            return await function(parsed, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                parsed = _each_checked(request) if handler.request_streaming else _checked(request)
                async with aclosing(function(parsed, context)) as answers:
                    async for answer in answers:
                        yield answer
            except InvalidRequest as error:
                await refuse(self._metrics, method, context, error=error)

        # A coroutine can also write a response stream, as gRPC's own health Watch does.
        guarded = stream if inspect.isasyncgenfunction(function) else single
        return with_function(handler, guarded, _lenient(handler.request_deserializer))


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
