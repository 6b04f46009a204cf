"""The gRPC wire: requests in, sampling core, messages out.

Rules of this file:
- It knows nothing of Triton or policy; it translates messages and, in one place, errors.
- Unknown exceptions become an opaque INTERNAL; their traceback goes to the log only.
- A handler is bounded by its client's deadline and cancelled with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from labelmint.errors import InvalidRequest, LabelmintError
from labelmint.gateway import encode
from labelmint.gateway.catalog import Catalog
from labelmint.gateway.metrics import UNKNOWN_MODEL, Metrics
from labelmint.gateway.policy import SampleOptions, Walk
from labelmint.gateway.sampling import Sample, Sampler
from labelmint.gateway.served_model import ServedModel
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SampleService"].full_name
ERROR_DOMAIN = "labelmint"
MAX_MESSAGE = 1_000  # characters


class SampleService(pb_grpc.SampleServiceServicer):
    def __init__(self, sampler: Sampler, metrics: Metrics) -> None:
        self._sampler = sampler
        self._metrics = metrics

    async def GetSample(self, request: pb.GetSampleRequest, context: Context) -> pb.GetSampleResponse:
        async with _Call(self._metrics, "GetSample", context) as call:
            model = await call.find(self._sampler.catalog, request.model)
            options = _options(request.options)
            sample = await self._sampler.sample(model, request.seed, options, context.time_remaining())
            return pb.GetSampleResponse(sample=await asyncio.to_thread(_sample, sample, request.options))

    async def BatchGetSamples(self, request: pb.BatchGetSamplesRequest, context: Context) -> pb.BatchGetSamplesResponse:
        async with _Call(self._metrics, "BatchGetSamples", context) as call:
            model = await call.find(self._sampler.catalog, request.model)
            options = _options(request.options)
            samples = await self._sampler.batch(model, request.seeds, options, context.time_remaining())
            outcomes = await asyncio.to_thread(_outcomes, samples, request.options)
            return pb.BatchGetSamplesResponse(outcomes=outcomes)

    async def StreamSamples(
        self, request: pb.StreamSamplesRequest, context: Context
    ) -> AsyncIterator[pb.StreamSamplesResponse]:
        async with _Call(self._metrics, "StreamSamples", context) as call:
            model = await call.find(self._sampler.catalog, request.model)
            walk = Walk(request.start_seed, request.shard_index, request.shard_count or 1)
            deliveries = self._sampler.walk(model, walk, request.count, _options(request.options))
            # Closed here and now when the client leaves, not when the collector finds it.
            async with aclosing(deliveries):
                async for delivery in deliveries:
                    yield pb.StreamSamplesResponse(
                        sample=await asyncio.to_thread(_sample, delivery.sample, request.options),
                        next_seed=delivery.next_seed,
                        rejected_count=delivery.rejected_count,
                    )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with _Call(self._metrics, "GetModel", context) as call:
            model = await call.find(self._sampler.catalog, request.model)
            return pb.GetModelResponse(model=model_message(model))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with _Call(self._metrics, "ListModels", context):
            models = await self._sampler.catalog.list()
            return pb.ListModelsResponse(models=[model_message(model) for model in models])


class _Call:
    """Around every handler: metrics, and the one translation of errors to gRPC status."""

    def __init__(self, metrics: Metrics, method: str, context: Context) -> None:
        self._metrics = metrics
        self._method = method
        self._context = context
        self._model = UNKNOWN_MODEL

    async def find(self, catalog: Catalog, name: str) -> ServedModel:
        """The model that the call is about; from here on the metrics name it."""
        model = await catalog.get(name)
        self._model = model.name
        return model

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
        self._metrics.requests.labels("grpc", self._method, self._model, code.name).inc()
        self._metrics.request_seconds.labels("grpc", self._method).observe(time.perf_counter() - self._started)
        if translated is not None:
            await _abort(self._context, translated)


def _translated(error: BaseException | None) -> LabelmintError | None:
    if error is None or not isinstance(error, Exception):
        return None  # cancellation passes through
    if isinstance(error, LabelmintError):
        return error
    logger.error("unexpected error while answering", exc_info=error)
    return LabelmintError("an unexpected error happened; the gateway's log has it")


async def _abort(context: Context, error: LabelmintError) -> NoReturn:
    # Trailers are bounded (8 KiB by default in many clients); beyond that the status itself would be lost.
    message = error.message[:MAX_MESSAGE]
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(code=error.grpc_code.value[0], message=message, details=[detail])
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(error.grpc_code, message, trailers)
    raise AssertionError("abort returns never")


def _options(options: pb.SampleOptions) -> SampleOptions:
    for field in ("image_encoding", "label_encoding"):
        if getattr(options, field) not in pb.Encoding.values():
            known = ", ".join(pb.Encoding.keys())
            raise InvalidRequest(f"options.{field}", f"{getattr(options, field)} is no encoding; known: {known}")
    gate = options.WhichOneof("gate")
    return SampleOptions(
        truncation_psi=options.truncation_psi if options.HasField("truncation_psi") else None,
        max_js=options.max_js if gate == "max_js" else None,
        max_quantile=options.max_quantile if gate == "max_quantile" else None,
        include_rejected=options.include_rejected,
        include_js_map=options.include_js_map,
    )


def _sample(sample: Sample, options: pb.SampleOptions) -> pb.Sample:
    return pb.Sample(
        model=sample.model.name,
        seed=sample.seed,
        image=_pixels(sample.image, options.image_encoding, lambda: encode.image_png(sample)),
        label=_pixels(sample.label, options.label_encoding, lambda: encode.label_png(sample)),
        js_map=b"" if sample.js_map is None else sample.js_map.astype("<f4").tobytes(),
        js_score=sample.js_score,
        threshold=sample.gate.threshold,
        accepted=sample.accepted,
        model_digest=sample.model.digest,
        calibration_id=sample.gate.calibration_id,
        truncation_psi=sample.gate.truncation_psi,
    )


def _outcomes(samples: list[Sample], options: pb.SampleOptions) -> list[pb.SampleOutcome]:
    return [
        pb.SampleOutcome(sample=_sample(sample, options))
        if sample.accepted or options.include_rejected
        else pb.SampleOutcome(
            rejection=pb.Rejection(
                seed=sample.seed,
                js_score=sample.js_score,
                threshold=sample.gate.threshold,
                calibration_id=sample.gate.calibration_id,
            )
        )
        for sample in samples
    ]


def _pixels(array: npt.NDArray[np.uint8], encoding: pb.Encoding, png: Callable[[], bytes]) -> pb.Pixels:
    raw = encoding == pb.ENCODING_RAW
    return pb.Pixels(
        encoding=pb.ENCODING_RAW if raw else pb.ENCODING_PNG,
        height=array.shape[0],
        width=array.shape[1],
        channels=1 if array.ndim == 2 else array.shape[2],
        data=array.tobytes() if raw else png(),
    )


def model_message(model: ServedModel) -> pb.Model:
    message = pb.Model(
        name=model.name,
        version=model.version,
        pipeline=model.pipeline,
        task=model.task,
        digest=model.digest,
        resolution=model.resolution,
        z_dim=model.z_dim,
        classes=[
            pb.LabelClass(name=name, rgb=red << 16 | green << 8 | blue)
            for name, (red, green, blue) in zip(model.class_names, model.palette, strict=True)
        ],
        layout=model.layout,
        num_heads=model.num_heads,
        score_kind=model.score_kind,
    )
    if model.calibration is not None:
        message.calibration.CopyFrom(pb.Calibration(**model.calibration.described()))
    return message
