"""Authentication and concurrency limits of the gRPC server: one interceptor for every call, reflection included.

Rules of this file:
- The health service needs no token, because probes carry none. Every other service of the server needs one.
- This file identifies the caller and limits its concurrency. The sampler reads the caller from `current_caller` and
  charges it for samples.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from labelmint.core.errors import LabelmintError
from labelmint.gateway.grpc.service import Context, refuse
from labelmint.gateway.sampling.access import Caller, Tokens, current_caller
from labelmint.gateway.sampling.metrics import Metrics

_OPEN = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
# A handler of grpc.aio. Its functions are coroutines and async generators, which gRPC's type annotations do not say.
Handler: TypeAlias = Any


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Requires a token for every call except those of grpc.health.v1."""

    def __init__(self, tokens: Tokens, metrics: Metrics) -> None:
        self._tokens = tokens
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN):
            return handler
        caller: Caller | LabelmintError
        try:
            headers = dict(handler_call_details.invocation_metadata or ())
            authorization = headers.get("authorization")
            caller = self._tokens.authenticate(authorization if isinstance(authorization, str) else None)
        except LabelmintError as error:
            caller = error
        return self._guarded(handler, method.rpartition("/")[2], caller)

    def _guarded(self, handler: Handler, method: str, caller: Caller | LabelmintError) -> Handler:
        """Wrap a handler in one of the same kind that applies the caller's limits, or refuses the call."""
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                async with AsyncExitStack() as stack:
                    await self._admit(stack, context, method, caller=caller)
                    async for message in await stack.enter_async_context(aclosing(behaviour(request, context))):
                        yield message

            wrap = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return wrap(stream, handler.request_deserializer, handler.response_serializer)

        async def single(request: Any, context: Context) -> Any:
            async with AsyncExitStack() as stack:
                await self._admit(stack, context, method, caller=caller)
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(single, handler.request_deserializer, handler.response_serializer)

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
