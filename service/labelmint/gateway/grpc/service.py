"""The gRPC service: it passes requests to the sampling core and returns the results as messages.

Rules of this file:
- It knows nothing of Triton and makes no policy decisions. It translates messages and, in one place, errors.
- Unknown exceptions become an opaque INTERNAL. Their traceback goes only to the log.
- The client's deadline bounds a handler. When the client cancels the call, the handler is cancelled too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from labelmint.core.errors import LabelmintError
from labelmint.core.policy import MAX_BATCH, Walk
from labelmint.core.served_model import ServedModel
from labelmint.gateway.encoding.fields import page_fields
from labelmint.gateway.grpc.messages import copies_only, model_message, options_of, outcome_messages, sample_message
from labelmint.gateway.sampling.metrics import UNKNOWN_MODEL, Metrics
from labelmint.gateway.sampling.sample import Delivery
from labelmint.gateway.sampling.sampler import HEARTBEAT_SECONDS, Sampler, SamplingCore
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

Request: TypeAlias = (
    pb.GetSampleRequest | pb.BatchGetSamplesRequest | pb.StreamSamplesRequest | pb.ListSeedsRequest | pb.GetModelRequest
)
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SampleService"].full_name
ERROR_DOMAIN = "labelmint"
MAX_MESSAGE = 1_000  # characters


class SampleService(pb_grpc.SampleServiceServicer):
    def __init__(self, core: SamplingCore) -> None:
        self._sampler = core.sampler
        self._metrics = core.metrics
        self._lifecycle = core.lifecycle

    def _call(self, method: str, context: Context) -> _Call:
        return _Call(self._metrics, f"{SERVICE_NAME}/{method}", context)

    async def GetSample(self, request: pb.GetSampleRequest, context: Context) -> pb.GetSampleResponse:
        async with self._call("GetSample", context) as call:
            model = await call.find(self._sampler, request)
            options = options_of(model, request.options)
            timeout = context.time_remaining()
            sample = await self._sampler.sample(model, request.seed, options, timeout_seconds=timeout)
            fields = await call.encoded(sample_message, sample, request.options)
            return pb.GetSampleResponse(sample=fields)

    async def BatchGetSamples(self, request: pb.BatchGetSamplesRequest, context: Context) -> pb.BatchGetSamplesResponse:
        async with self._call("BatchGetSamples", context) as call:
            model = await call.find(self._sampler, request, min(len(request.seeds), MAX_BATCH))
            options = options_of(model, request.options)
            samples = await self._sampler.batch(
                model,
                request.seeds,
                options,
                style_seeds=request.style_seeds,
                timeout_seconds=context.time_remaining(),
            )
            outcomes = await call.encoded(outcome_messages, samples, request.options)
            return pb.BatchGetSamplesResponse(outcomes=outcomes)

    async def StreamSamples(
        self, request: pb.StreamSamplesRequest, context: Context
    ) -> AsyncIterator[pb.StreamSamplesResponse]:
        async with self._call("StreamSamples", context) as call:
            walk = self._walk(call, request, context)
            deliveries = self._lifecycle.guard(walk, request.start_seed)
            # Close the stream as soon as the client disconnects, not when the garbage collector finds it.
            async with aclosing(deliveries):
                async for delivery in deliveries:
                    fields = None
                    if delivery.sample is not None:
                        fields = await call.encoded(sample_message, delivery.sample, request.options)
                    # Backpressure: the transport takes one message at a time, so a slow reader also slows the walk.
                    yield pb.StreamSamplesResponse(
                        sample=fields,
                        next_seed=delivery.next_seed,
                        rejected_count=delivery.rejected_count,
                        filtered_count=delivery.filtered_count,
                    )

    async def _walk(
        self, call: _Call, request: pb.StreamSamplesRequest, context: Context
    ) -> AsyncGenerator[Delivery, None]:
        """Yield heartbeats until the model is available, then the deliveries of its walk."""
        walk = Walk(request.start_seed, request.shard_index, request.shard_count or 1)
        owed = self._sampler.owed_at_first(request.window, request.count)
        finding = asyncio.create_task(call.find(self._sampler, request, owed))
        try:
            while not (await asyncio.wait({finding}, timeout=HEARTBEAT_SECONDS))[0]:
                yield Delivery(None, walk.start)
            model = finding.result()
        finally:
            finding.cancel()
        options = options_of(model, request.options)
        samples = self._sampler.walk(
            model,
            walk,
            options,
            count=request.count,
            window=request.window,
            timeout_seconds=context.time_remaining(),
        )
        async with aclosing(samples):
            async for delivery in samples:
                yield delivery

    async def ListSeeds(self, request: pb.ListSeedsRequest, context: Context) -> pb.ListSeedsResponse:
        async with self._call("ListSeeds", context) as call:
            model = await call.find(self._sampler, request)
            page = await self._sampler.list_seeds(
                model,
                (request.start_seed, request.end_seed),
                options_of(model, request.options),
                page_size=request.page_size,
                timeout_seconds=context.time_remaining(),
            )
            return pb.ListSeedsResponse(**page_fields(page))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with self._call("GetModel", context) as call:
            model = await call.find(self._sampler, request)
            return pb.GetModelResponse(model=model_message(model))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with self._call("ListModels", context):
            models = await self._sampler.catalog.list()
            return pb.ListModelsResponse(models=[model_message(model) for model in models])


class _Call:
    """Wraps every handler: it records metrics and translates errors to gRPC status."""

    def __init__(self, metrics: Metrics, method: str, context: Context) -> None:
        """`method` is package.Service/Method."""
        self._metrics = metrics
        self._method = method
        self._context = context
        self._model = UNKNOWN_MODEL

    async def find(self, sampler: Sampler, request: Request, owed: int = 1) -> ServedModel:
        """Return the model of a call that owes `owed` samples. From here on the metrics carry its name."""
        model = await sampler.find(request.model, request.model_version, owed)
        self._model = model.name
        return model

    async def encoded(self, make: Callable[[S, pb.SampleOptions], T], minted: S, options: pb.SampleOptions) -> T:
        """Run `make` on samples: in a thread if it compresses pixels, directly if it only copies them."""
        with self._metrics.encoding(self._model):
            if copies_only(options):
                return make(minted, options)
            return await asyncio.to_thread(make, minted, options)

    async def __aenter__(self) -> _Call:
        self._started = time.perf_counter()
        self._metrics.requests_in_flight.labels("grpc").inc()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        translated = _translated(error)
        code = grpc.StatusCode.OK if translated is None else translated.grpc_code
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            code = grpc.StatusCode.CANCELLED
        self._metrics.requests_in_flight.labels("grpc").dec()
        seconds = time.perf_counter() - self._started
        self._metrics.rpc_ended(self._method, code, model=self._model, seconds=seconds)
        if translated is not None:
            await _abort(self._context, translated)


async def refuse(metrics: Metrics, method: str, context: Context, *, error: LabelmintError) -> NoReturn:
    """End a call of package.Service/Method before its handler runs. Count and translate the error as handlers do."""
    async with _Call(metrics, method, context):
        raise error
    raise AssertionError("the error ends the call")


def _translated(error: BaseException | None) -> LabelmintError | None:
    if error is None or not isinstance(error, Exception):
        return None  # cancellation is not translated
    if isinstance(error, LabelmintError):
        return error
    logger.error("unexpected error while answering", exc_info=error)
    return LabelmintError("an unexpected error happened; see the gateway's log")


async def _abort(context: Context, error: LabelmintError) -> NoReturn:
    # Clients limit the size of trailers (many to 8 KiB by default). Longer trailers would lose the status itself.
    message = error.message[:MAX_MESSAGE]
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    status = status_pb2.Status(code=error.grpc_code.value[0], message=message)
    status.details.add().Pack(info)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration(seconds=error.retry_after_seconds)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    trailers = (*context.trailing_metadata(), ("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(error.grpc_code, message, trailers)
    raise AssertionError("abort never returns")
