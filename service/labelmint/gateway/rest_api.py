"""The REST wire: the same core as gRPC, for curl and browsers.

Rules of this file:
- It knows nothing of Triton or policy; it translates requests and, in one place, errors (RFC 9457 problem+json).
- Query parameters are declared once and unknown ones are refused: a misspelt gate must not be ignored.
- The document at /docs is what the routes really take and answer.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from labelmint.errors import InvalidRequest, LabelmintError
from labelmint.gateway import encode
from labelmint.gateway.metrics import UNKNOWN_MODEL, Metrics
from labelmint.gateway.policy import MAX_BATCH, MAX_TRUNCATION_PSI, SEED_END, SampleOptions
from labelmint.gateway.sampling import Sample, Sampler
from labelmint.gateway.served_model import ServedModel

logger = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"


class OptionsModel(BaseModel):
    """Gate and truncation of a request."""

    model_config = ConfigDict(extra="forbid")

    truncation_psi: Annotated[
        float | None,
        Field(ge=0, le=MAX_TRUNCATION_PSI, description="Truncation; unset: as calibrated. Another needs max_js."),
    ] = None
    max_js: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="Accept JS scores up to this, in nats.")
    ] = None
    max_quantile: Annotated[
        float | None, Field(gt=0, le=1, description="Accept JS scores up to this quantile of the calibration.")
    ] = None
    include_rejected: Annotated[bool, Field(description="Answer with a rejected sample too.")] = False


class SampleQuery(OptionsModel):
    encoding: Annotated[
        Literal["png", "raw"], Field(description="Encoding of the base64 data in the JSON: png, or raw rows of bytes.")
    ] = "png"


class BatchBody(SampleQuery):
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, lt=SEED_END, strict=True)]],
        Field(min_length=1, max_length=MAX_BATCH, description=f"1 to {MAX_BATCH} seeds."),
    ]


class PixelsModel(BaseModel):
    encoding: Literal["png", "raw"]
    height: int
    width: int
    channels: int
    data: Annotated[str, Field(description="base64")]


class SampleModel(BaseModel):
    model: str
    seed: int
    accepted: bool
    js_score: float
    threshold: float
    calibration_id: str
    truncation_psi: float
    model_digest: str
    image: PixelsModel
    label: PixelsModel


class RejectionModel(BaseModel):
    seed: int
    accepted: Literal[False]
    js_score: float
    threshold: float
    calibration_id: str


class BatchModel(BaseModel):
    outcomes: list[SampleModel | RejectionModel]


class LabelClassModel(BaseModel):
    id: int
    name: str
    rgb: Annotated[str, Field(description="#RRGGBB in palette images")]


class CalibrationModel(BaseModel):
    id: str
    truncation_psi: float
    threshold: float
    threshold_quantile: float
    quantiles: list[float]
    first_seed: int
    seed_count: int


class ModelModel(BaseModel):
    name: str
    version: str
    pipeline: str
    task: str
    digest: str
    resolution: int
    z_dim: int
    layout: str
    num_heads: int
    score_kind: str
    classes: list[LabelClassModel]
    calibration: CalibrationModel | None


class ModelsModel(BaseModel):
    models: list[ModelModel]


class Problem(BaseModel):
    """RFC 9457 problem details; `reason` is the stable name of the error."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    metadata: dict[str, str]


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text, "content": {PROBLEM_TYPE: {}}}
    for status, text in (
        (400, "The request cannot be honoured; `metadata.field` names the field."),
        (404, "No such model."),
        (422, "The sample was rejected by the JS gate."),
        (429, "Too many requests in flight; see Retry-After."),
        (502, "Triton failed to run the model."),
        (503, "Triton is not ready."),
        (504, "The sample was not ready in time."),
    )
}
_PNG: dict[int | str, dict[str, Any]] = {**_PROBLEMS, 200: {"content": {"image/png": {}}, "description": "A PNG."}}
_NPZ: dict[int | str, dict[str, Any]] = {
    **_PROBLEMS,
    200: {"content": {"application/octet-stream": {}}, "description": "A NumPy archive."},
}

ModelName = Annotated[str, Path(description="Name of the model, as /v1/models lists it.")]
Seed = Annotated[int, Path(ge=0, lt=SEED_END, description="The seed: 0 to 2^32 - 1.")]


def create_app(sampler: Sampler, metrics: Metrics, version: str) -> FastAPI:
    """The REST application over a sampling core."""
    app = FastAPI(
        title="labelmint",
        version=version,
        description="Image-label pairs minted on demand from latent seeds.",
        redoc_url=None,
    )
    app.add_exception_handler(LabelmintError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.middleware("http")(_measured(metrics))

    async def sample(request: Request, model: str, seed: int, options: OptionsModel, js_map: bool = False) -> Sample:
        wanted = SampleOptions(
            truncation_psi=options.truncation_psi,
            max_js=options.max_js,
            max_quantile=options.max_quantile,
            include_rejected=options.include_rejected,
            include_js_map=js_map,
        )
        minted = await sampler.sample(model, seed, wanted)
        request.state.model = minted.model.name
        return minted

    def picture(encoder: Callable[[Sample], bytes], media_type: str, js_map: bool = False) -> Any:
        async def endpoint(
            request: Request, model: ModelName, seed: Seed, options: Annotated[OptionsModel, Query()]
        ) -> Response:
            minted = await sample(request, model, seed, options, js_map)
            return Response(await asyncio.to_thread(encoder, minted), media_type=media_type)

        return endpoint

    @app.get("/v1/models", responses={503: _PROBLEMS[503]}, summary="List the served models")
    async def list_models() -> ModelsModel:
        return ModelsModel(models=[_model(model) for model in await sampler.catalog.list()])

    @app.get(
        "/v1/models/{model}",
        responses={404: _PROBLEMS[404], 503: _PROBLEMS[503]},
        summary="Describe a model: digest, classes, palette, calibration",
    )
    async def get_model(request: Request, model: ModelName) -> ModelModel:
        served = await sampler.catalog.get(model)
        request.state.model = served.name
        return _model(served)

    pictures = (
        ("/image.png", encode.image_png, False, "The image as RGB PNG"),
        ("/label.png", encode.label_png, False, "The label as palette PNG: indices are class ids"),
        ("/overlay.png", encode.overlay_png, False, "For people: image, label, legend, score"),
        ("/uncertainty.png", encode.uncertainty_png, True, "For people: image and JS divergence of its pixels"),
    )
    for suffix, encoder, js_map, summary in pictures:
        app.get("/v1/models/{model}/samples/{seed}" + suffix, responses=_PNG, summary=summary, response_class=Response)(
            picture(encoder, "image/png", js_map)
        )
    app.get(
        "/v1/models/{model}/samples/{seed}.npz",
        responses=_NPZ,
        summary="Image, label, JS map and score as a NumPy archive",
        response_class=Response,
    )(picture(encode.npz, "application/octet-stream", js_map=True))

    @app.get("/v1/models/{model}/samples/{seed}", responses=_PROBLEMS, summary="The image-label pair of a seed")
    async def get_sample(
        request: Request, model: ModelName, seed: Seed, query: Annotated[SampleQuery, Query()]
    ) -> SampleModel:
        minted = await sample(request, model, seed, query)
        return await asyncio.to_thread(_sample, minted, query.encoding)

    @app.post("/v1/models/{model}/samples:batchGet", responses=_PROBLEMS, summary="The pairs of several seeds")
    async def batch_get_samples(request: Request, model: ModelName, body: BatchBody) -> BatchModel:
        options = SampleOptions(body.truncation_psi, body.max_js, body.max_quantile, body.include_rejected)
        samples = await sampler.batch(model, body.seeds, options)
        request.state.model = samples[0].model.name
        return await asyncio.to_thread(_batch, samples, body)

    async def ready() -> None:
        await sampler.catalog.check_ready()

    for path in ("/healthz", "/readyz"):
        app.get(
            path,
            response_class=PlainTextResponse,
            responses={503: _PROBLEMS[503]},
            dependencies=[Depends(ready)],
            summary="200 while Triton has the model ready",
        )(_ok)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _ok() -> str:
    return "ok\n"


def _measured(metrics: Metrics) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def middleware(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        metrics.requests_in_flight.labels("rest").inc()
        status = "500"
        try:
            response = await call_next(request)
            status = str(response.status_code)
            return response
        finally:
            route = getattr(request.scope.get("route"), "path", "-")
            model = getattr(request.state, "model", UNKNOWN_MODEL)
            metrics.requests_in_flight.labels("rest").dec()
            metrics.requests.labels("rest", route, model, status).inc()
            metrics.request_seconds.labels("rest", route).observe(time.perf_counter() - started)

    return middleware


def _problem(error: LabelmintError) -> JSONResponse:
    problem = Problem(
        type="about:blank",
        title=error.title,
        status=error.http_status,
        detail=error.message,
        reason=error.reason,
        metadata=error.metadata,
    )
    headers = {}
    if (pause := getattr(error, "retry_after_seconds", None)) is not None:
        headers["Retry-After"] = str(pause)
    return JSONResponse(problem.model_dump(), error.http_status, headers, PROBLEM_TYPE)


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LabelmintError)
    return _problem(error)


async def _answer_invalid(_: Request, error: Exception) -> Response:
    """FastAPI's list of problems as one InvalidRequest that names the first field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    problem = str(first["msg"])
    if first["type"] == "extra_forbidden":
        problem = "unknown parameter; see /docs for those that exist"
    elif field == "seed":
        problem = f"{first['input']!r} is not a seed; seeds are whole numbers from 0 to {SEED_END - 1}"
    return _problem(InvalidRequest(field, problem))


async def _answer_http(_: Request, error: Exception) -> Response:
    """Starlette's own answers: no such route, method not allowed."""
    assert isinstance(error, HTTPException)
    titles = {404: "No such path", 405: "Method not allowed"}
    problem = Problem(
        type="about:blank",
        title=titles.get(error.status_code, "HTTP error"),
        status=error.status_code,
        detail=f"{error.detail}; the paths that exist are listed at /docs",
        reason="NO_SUCH_ROUTE",
        metadata={},
    )
    return JSONResponse(problem.model_dump(), error.status_code, error.headers, PROBLEM_TYPE)


async def _answer_unexpected(_: Request, error: Exception) -> Response:
    logger.error("unexpected error while answering", exc_info=error)
    return _problem(LabelmintError("an unexpected error happened; the gateway's log has it"))


def _sample(sample: Sample, encoding: Literal["png", "raw"]) -> SampleModel:
    raw = encoding == "raw"
    image = sample.image.tobytes() if raw else encode.image_png(sample)
    label = sample.label.tobytes() if raw else encode.label_png(sample)
    height, width, channels = sample.image.shape

    def pixels(data: bytes, count: int) -> PixelsModel:
        text = base64.b64encode(data).decode()
        return PixelsModel(encoding=encoding, height=height, width=width, channels=count, data=text)

    return SampleModel(
        model=sample.model.name,
        seed=sample.seed,
        accepted=sample.accepted,
        js_score=sample.js_score,
        threshold=sample.gate.threshold,
        calibration_id=sample.gate.calibration_id,
        truncation_psi=sample.gate.truncation_psi,
        model_digest=sample.model.digest,
        image=pixels(image, channels),
        label=pixels(label, 1),
    )


def _batch(samples: list[Sample], body: BatchBody) -> BatchModel:
    return BatchModel(
        outcomes=[
            _sample(sample, body.encoding)
            if sample.accepted or body.include_rejected
            else RejectionModel(
                seed=sample.seed,
                accepted=False,
                js_score=sample.js_score,
                threshold=sample.gate.threshold,
                calibration_id=sample.gate.calibration_id,
            )
            for sample in samples
        ]
    )


def _model(model: ServedModel) -> ModelModel:
    calibration = None
    if model.calibration is not None:
        calibration = CalibrationModel(
            id=model.calibration.id,
            truncation_psi=model.calibration.truncation_psi,
            threshold=model.calibration.threshold,
            threshold_quantile=model.calibration.threshold_quantile,
            quantiles=list(model.calibration.quantiles),
            first_seed=model.calibration.first_seed,
            seed_count=model.calibration.seed_count,
        )
    return ModelModel(
        name=model.name,
        version=model.version,
        pipeline=model.pipeline,
        task=model.task,
        digest=model.digest,
        resolution=model.resolution,
        z_dim=model.z_dim,
        layout=model.layout,
        num_heads=model.num_heads,
        score_kind=model.score_kind,
        classes=[
            LabelClassModel(id=index, name=name, rgb="#{:02x}{:02x}{:02x}".format(*colour))
            for index, (name, colour) in enumerate(zip(model.class_names, model.palette, strict=True))
        ],
        calibration=calibration,
    )
