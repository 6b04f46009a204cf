"""The REST wire: the same core as gRPC, for curl and browsers.

Rules of this file:
- It knows nothing of Triton or policy; it translates requests and, in one place, errors (RFC 9457 problem+json).
- The document at /docs is what the routes really take and answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from labelmint.errors import InvalidRequest, LabelmintError
from labelmint.gateway import encode
from labelmint.gateway.metrics import UNKNOWN_MODEL, Metrics
from labelmint.gateway.policy import SEED_END
from labelmint.gateway.rest_messages import (
    BatchBody,
    BatchModel,
    ModelModel,
    ModelsModel,
    OptionsModel,
    Problem,
    SampleModel,
    SampleQuery,
    batch_model,
    model_model,
    sample_model,
)
from labelmint.gateway.sampling import Sample, Sampler
from labelmint.gateway.served_model import ServedModel

logger = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"


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

    async def find(request: Request, name: str) -> ServedModel:
        """The model that a request is about; from here on the metrics name it."""
        model = await sampler.catalog.get(name)
        request.state.model = model.name
        return model

    async def sample(request: Request, model: str, seed: int, options: OptionsModel, js_map: bool = False) -> Sample:
        return await sampler.sample(await find(request, model), seed, options.to_sample_options(js_map))

    def picture(encoder: Callable[[Sample], bytes], media_type: str, js_map: bool = False) -> Any:
        async def endpoint(
            request: Request, model: ModelName, seed: Seed, options: Annotated[OptionsModel, Query()]
        ) -> Response:
            minted = await sample(request, model, seed, options, js_map)
            return Response(await asyncio.to_thread(encoder, minted), media_type=media_type)

        return endpoint

    @app.get("/v1/models", responses={503: _PROBLEMS[503]}, summary="List the served models")
    async def list_models() -> ModelsModel:
        return ModelsModel(models=[model_model(model) for model in await sampler.catalog.list()])

    @app.get(
        "/v1/models/{model}",
        responses={404: _PROBLEMS[404], 503: _PROBLEMS[503]},
        summary="Describe a model: digest, classes, palette, calibration",
    )
    async def get_model(request: Request, model: ModelName) -> ModelModel:
        return model_model(await find(request, model))

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
        return await asyncio.to_thread(sample_model, minted, query.encoding)

    @app.post("/v1/models/{model}/samples:batchGet", responses=_PROBLEMS, summary="The pairs of several seeds")
    async def batch_get_samples(request: Request, model: ModelName, body: BatchBody) -> BatchModel:
        samples = await sampler.batch(await find(request, model), body.seeds, body.to_sample_options())
        return await asyncio.to_thread(batch_model, samples, body)

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
    if first["type"] == "json_invalid":
        field, problem = "body", f"is not JSON: {first['ctx']['error']}"
    elif first["type"] == "extra_forbidden":
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
