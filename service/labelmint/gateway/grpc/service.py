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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from labelmint.core.errors import InvalidRequest, LabelmintError
from labelmint.core.policy import MAX_BATCH, SampleOptions, Walk, check_has_label
from labelmint.core.served_model import ServedModel
from labelmint.gateway.encoding import encoders as encode
from labelmint.gateway.sampling.access import current_caller
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import UNKNOWN_MODEL, Metrics
from labelmint.gateway.sampling.sample import Delivery, Sample
from labelmint.gateway.sampling.sampler import HEARTBEAT_SECONDS, Sampler
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

Request: TypeAlias = pb.GetSampleRequest | pb.BatchGetSamplesRequest | pb.StreamSamplesRequest | pb.GetModelRequest
# A message's fields by name. The message is made from them as a whole, inside of the one that it belongs to: making it
# alone first copies its pixels once more for each message around it.
Fields: TypeAlias = dict[str, Any]
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SampleService"].full_name
ERROR_DOMAIN = "labelmint"
MAX_MESSAGE = 1_000  # characters

_IMAGE_ENCODERS: Mapping[pb.Encoding, Callable[[Sample], bytes]] = {
    pb.ENCODING_RAW: encode.image_raw,
    pb.ENCODING_PNG: encode.image_png,
    pb.ENCODING_JPEG: encode.image_jpeg,
}
_LABEL_ENCODERS: Mapping[pb.Encoding, Callable[[Sample], bytes]] = {
    pb.ENCODING_RAW: encode.label_raw,
    pb.ENCODING_PNG: encode.label_png,
}


class SampleService(pb_grpc.SampleServiceServicer):
    def __init__(self, sampler: Sampler, metrics: Metrics, lifecycle: Lifecycle) -> None:
        self._sampler = sampler
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def GetSample(self, request: pb.GetSampleRequest, context: Context) -> pb.GetSampleResponse:
        async with _Call(self._metrics, "GetSample", context) as call:
            model = await call.find(self._sampler, request)
            options = _options(model, request.options)
            sample = await self._sampler.sample(model, request.seed, options, context.time_remaining())
            fields = await _encoded(_sample, sample, request.options)
            return pb.GetSampleResponse(sample=fields)

    async def BatchGetSamples(self, request: pb.BatchGetSamplesRequest, context: Context) -> pb.BatchGetSamplesResponse:
        async with _Call(self._metrics, "BatchGetSamples", context) as call:
            model = await call.find(self._sampler, request, min(len(request.seeds), MAX_BATCH))
            options = _options(model, request.options)
            samples = await self._sampler.batch(
                model, request.seeds, request.style_seeds, options, context.time_remaining()
            )
            outcomes = await _encoded(_outcomes, samples, request.options)
            return pb.BatchGetSamplesResponse(outcomes=outcomes)

    async def StreamSamples(
        self, request: pb.StreamSamplesRequest, context: Context
    ) -> AsyncIterator[pb.StreamSamplesResponse]:
        async with _Call(self._metrics, "StreamSamples", context) as call:
            walk = self._walk(call, request, context)
            if (caller := current_caller.get()) is not None:
                walk = caller.paced(walk)
            deliveries = self._lifecycle.guard(walk, request.start_seed)
            # Closed here and now when the client leaves, not when the collector finds it.
            async with aclosing(deliveries):
                async for delivery in deliveries:
                    fields = None
                    if delivery.sample is not None:
                        fields = await _encoded(_sample, delivery.sample, request.options)
                    # The transport takes one message at a time and waits for a slow reader, and the walk with it.
                    yield pb.StreamSamplesResponse(
                        sample=fields,
                        next_seed=delivery.next_seed,
                        rejected_count=delivery.rejected_count,
                    )

    async def _walk(
        self, call: _Call, request: pb.StreamSamplesRequest, context: Context
    ) -> AsyncGenerator[Delivery, None]:
        """Heartbeats until the model is there, then what is delivered of it."""
        walk = Walk(request.start_seed, request.shard_index, request.shard_count or 1)
        owed = self._sampler.owed_at_first(request.window, request.count)
        finding = asyncio.create_task(call.find(self._sampler, request, owed))
        try:
            while not (await asyncio.wait({finding}, timeout=HEARTBEAT_SECONDS))[0]:
                yield Delivery(None, walk.start, 0)
            model = finding.result()
        finally:
            finding.cancel()
        options = _options(model, request.options)
        samples = self._sampler.walk(model, walk, request.count, options, request.window, context.time_remaining())
        async with aclosing(samples):
            async for delivery in samples:
                yield delivery

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with _Call(self._metrics, "GetModel", context) as call:
            model = await call.find(self._sampler, request)
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

    async def find(self, sampler: Sampler, request: Request, owed: int = 1) -> ServedModel:
        """The model that the call, for `owed` samples, is about; from here on the metrics name it."""
        model = await sampler.find(request.model, request.model_version, owed)
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


async def refuse(metrics: Metrics, method: str, context: Context, error: LabelmintError) -> NoReturn:
    """End a call before its handler, counted and translated as the handler's own errors are."""
    async with _Call(metrics, method, context):
        raise error
    raise AssertionError("the error ends the call")


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
    status = status_pb2.Status(code=error.grpc_code.value[0], message=message)
    status.details.add().Pack(info)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration(seconds=error.retry_after_seconds)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    trailers = (*context.trailing_metadata(), ("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(error.grpc_code, message, trailers)
    raise AssertionError("abort returns never")


def _options(model: ServedModel, options: pb.SampleOptions) -> SampleOptions:
    for field in ("image_encoding", "label_encoding"):
        if getattr(options, field) not in pb.Encoding.values():
            known = ", ".join(pb.Encoding.keys())
            raise InvalidRequest(f"options.{field}", f"{getattr(options, field)} is no encoding; known: {known}")
    if options.label_encoding != pb.ENCODING_UNSPECIFIED:
        check_has_label(model, "options.label_encoding", "leave it unset")
        if options.label_encoding not in _LABEL_ENCODERS:
            raise InvalidRequest("options.label_encoding", "a label has class ids, which JPEG would change; use PNG")
    for part in ("image", "label"):
        if getattr(options, f"omit_{part}") and getattr(options, f"{part}_encoding") != pb.ENCODING_UNSPECIFIED:
            raise InvalidRequest(f"options.{part}_encoding", f"there is none with omit_{part}; leave it unset")
    gate = options.WhichOneof("gate")
    return SampleOptions(
        truncation_psi=options.truncation_psi if options.HasField("truncation_psi") else None,
        style_seed=options.style_seed if options.HasField("style_seed") else None,
        crossover=options.crossover if options.HasField("crossover") else None,
        max_js=options.max_js if gate == "max_js" else None,
        max_quantile=options.max_quantile if gate == "max_quantile" else None,
        include_rejected=options.include_rejected,
        include_js_map=options.include_js_map,
        omit_image=options.omit_image,
        omit_label=options.omit_label,
    )


async def _encoded(make: Callable[[S, pb.SampleOptions], T], minted: S, options: pb.SampleOptions) -> T:
    """What `make` gives of samples: in a thread where pixels are compressed, here and now where they are copied."""
    parts = ((options.omit_image, options.image_encoding), (options.omit_label, options.label_encoding))
    if all(omitted or encoding == pb.ENCODING_RAW for omitted, encoding in parts):
        return make(minted, options)
    return await asyncio.to_thread(make, minted, options)


def _sample(sample: Sample, options: pb.SampleOptions) -> Fields:
    return {
        "model": sample.model.name,
        "model_version": sample.model.version,
        "seed": sample.seed,
        "image": _pixels(sample, sample.image, options.image_encoding, _IMAGE_ENCODERS),
        "label": _pixels(sample, sample.label, options.label_encoding, _LABEL_ENCODERS),
        "keypoints": _keypoints(sample),
        "js_map": b"" if sample.js_map is None else sample.js_map.astype("<f4").tobytes(),
        "js_score": sample.js_score,
        "threshold": sample.gate.threshold,
        "accepted": sample.accepted,
        "model_digest": sample.model.digest,
        "calibration_id": sample.gate.calibration_id,
        "truncation_psi": sample.gate.truncation_psi,
        "style_seed": None if sample.mixing is None else sample.mixing.style_seed,
        "crossover": None if sample.mixing is None else sample.mixing.crossover,
        "group_id": sample.group_id,
    }


def _keypoints(sample: Sample) -> list[Fields]:
    if sample.keypoints is None:
        return []
    return [
        {"name": name, "x": x, "y": y, "confidence": confidence}
        for name, (x, y), confidence in zip(
            sample.model.label_names,
            sample.keypoints.positions.tolist(),
            sample.keypoints.confidence.tolist(),
            strict=True,
        )
    ]


def _outcomes(samples: list[Sample], options: pb.SampleOptions) -> list[Fields]:
    return [
        {"sample": _sample(sample, options)}
        if sample.accepted or options.include_rejected
        else {
            "rejection": {
                "seed": sample.seed,
                "js_score": sample.js_score,
                "threshold": sample.gate.threshold,
                "calibration_id": sample.gate.calibration_id,
            }
        }
        for sample in samples
    ]


def _pixels(
    sample: Sample,
    array: npt.NDArray[np.uint8] | None,
    encoding: pb.Encoding,
    encoders: Mapping[pb.Encoding, Callable[[Sample], bytes]],
) -> Fields | None:
    if array is None:
        return None
    encoding = encoding or pb.ENCODING_PNG
    return {
        "encoding": encoding,
        "height": array.shape[0],
        "width": array.shape[1],
        "channels": 1 if array.ndim == 2 else array.shape[2],
        "data": encoders[encoding](sample),
    }


def model_message(model: ServedModel) -> pb.Model:
    labels = [
        pb.LabelClass(name=name, rgb=red << 16 | green << 8 | blue)
        for name, (red, green, blue) in zip(model.label_names, model.palette, strict=True)
    ]
    message = pb.Model(
        name=model.name,
        version=model.version,
        pipeline=model.pipeline,
        task=model.task,
        digest=model.digest,
        resolution=model.resolution,
        z_dim=model.z_dim,
        classes=labels if model.task == "segmentation" else [],
        layout=model.layout,
        num_heads=model.num_heads,
        score_kind=model.score_kind,
        num_ws=model.num_ws,
        keypoint_classes=labels if model.task == "keypoints" else [],
    )
    if model.calibration is not None:
        message.calibration.CopyFrom(pb.Calibration(**model.calibration.described()))
    return message
