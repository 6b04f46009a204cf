"""The REST wire: the same core as gRPC, for curl and browsers.

Rules of this file:
- It knows nothing of Triton or policy; it translates requests, and errors leave it to `rest_problems`.
- The document at /docs is what the routes really take and answer; schemathesis holds it to that.
- HEAD answers as GET does, without the body: it mints the sample, because only then is it known whether one is there.
  Of an archive it checks the request only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BeforeValidator
from starlette.types import ASGIApp

from labelmint.core.policy import SEED_END, Walk, check_has_label, gate_of, mixing_of
from labelmint.core.served_model import ServedModel
from labelmint.gateway.encoding import tar
from labelmint.gateway.encoding.npz import npz
from labelmint.gateway.encoding.people import overlay_png, uncertainty_png
from labelmint.gateway.encoding.pixels import image_png, label_png
from labelmint.gateway.rest import docs as rest_docs
from labelmint.gateway.rest import problems as rest_problems
from labelmint.gateway.rest.caching import Caching, caching_of
from labelmint.gateway.rest.disconnect import CancelOnDisconnect
from labelmint.gateway.rest.gallery import add_gallery
from labelmint.gateway.rest.messages import (
    BatchBody,
    BatchModel,
    ModelModel,
    ModelsModel,
    PinnedQuery,
    Problem,
    SampleModel,
    SampleQuery,
    TarQuery,
    VersionModel,
    batch_model,
    model_model,
    sample_model,
)
from labelmint.gateway.rest.middleware import (
    ALIVE_PATH,
    OPEN_PATHS,
    READY_PATH,
    Access,
    BodyLimit,
    Measured,
    SecurityHeaders,
    allow_origins,
)
from labelmint.gateway.rest.problems import documented
from labelmint.gateway.rest.streamed import Streamed
from labelmint.gateway.sampling.access import Tokens
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sample import Sample
from labelmint.gateway.sampling.sampler import Sampler

MAX_BODY_BYTES = 1 << 20  # a request is a few numbers

_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "If-None-Match names what the client holds already."}
}
_VALIDATORS = {
    "ETag": {"description": "Strong; known before anything is minted.", "schema": {"type": "string"}},
    "Cache-Control": {"description": "Immutable where `revision` is given.", "schema": {"type": "string"}},
}
_SAMPLE_ERRORS = (400, 404, 409, 410, 422, 429, 502, 503, 504)
_BATCH_ERRORS = (400, 404, 410, 413, 429, 502, 503, 504)

ModelName = Annotated[str, Path(description="Name of the model, as /v1/models lists it.", examples=["faces"])]


def _spelled(seed: str) -> str:
    """A number in a path has one spelling, so that a sample has one address for caches: not 007, -0 or 7.0."""
    if str(int(seed)) != seed:
        raise ValueError("is spelled in another way")  # what is right is said for all seeds, in `rest_problems`
    return seed


Seed = Annotated[int, Path(ge=0, lt=SEED_END, description="The seed: 0 to 2^32 - 1."), BeforeValidator(_spelled)]
IfNoneMatch = Annotated[str | None, Header(description="ETags of what the client holds.")]


def create_app(
    sampler: Sampler,
    metrics: Metrics,
    lifecycle: Lifecycle,
    version: str,
    tokens: Tokens | None,
    tls: bool,
    private: bool,
    cors_origins: Sequence[str],
) -> ASGIApp:
    """The REST application over a sampling core.

    `tokens` says who may ask, None anyone; `private` that shared caches must keep nothing.
    `cors_origins` are the origins whose pages may ask.
    """
    app = FastAPI(
        title="labelmint",
        version=version,
        description="Image-label pairs minted on demand from latent seeds.",
        docs_url=None,
        redoc_url=None,
    )
    rest_problems.install(app)
    rest_docs.install(app)

    async def find(request: Request, name: str, asked: VersionModel, owed: int = 1) -> ServedModel:
        """The model that a request, for `owed` samples, is about; from here on the metrics name it."""
        model = await sampler.find(name, asked.model_version, owed)
        request.state.model = model.name
        return model

    def caching(request: Request, model: ServedModel, representation: str, query: PinnedQuery) -> Caching:
        """How the answer may be cached; errors that last as long are told the same."""
        found = caching_of(model, representation, query, query.revision, private)
        request.state.cache_control = found.cache_control
        return found

    async def mint(request: Request, model: ServedModel, seed: int, query: PinnedQuery, js_map: bool = False) -> Sample:
        return await sampler.sample(model, seed, query.to_sample_options(js_map))

    def rendered(suffix: str, encoder: Callable[[Sample], bytes], media_type: str, js_map: bool) -> Callable[..., Any]:
        async def endpoint(
            request: Request,
            model: ModelName,
            seed: Seed,
            query: Annotated[PinnedQuery, Query()],
            if_none_match: IfNoneMatch = None,
        ) -> Response:
            found = await find(request, model, query)
            if encoder is label_png:
                check_has_label(found, "model", "ask for the sample's JSON, overlay.png or .npz")
            caches = caching(request, found, f"{seed}{suffix}", query)
            if caches.held(if_none_match):
                return Response(status_code=304, headers=caches.headers)
            minted = await mint(request, found, seed, query, js_map)
            if caches.held(if_none_match, exists=True):
                return Response(status_code=304, headers=caches.headers)
            body = await asyncio.to_thread(encoder, minted)
            return Response(body, media_type=media_type, headers=caches.headers)

        return endpoint

    @app.get("/v1/models", responses=documented(503), summary="List the served models")
    async def list_models() -> ModelsModel:
        return ModelsModel(models=[model_model(model) for model in await sampler.catalog.list()])

    @app.get(
        "/v1/models/{model}",
        responses=documented(400, 404, 503),
        summary="Describe a model: task, digest, classes or keypoints, palette, calibration",
    )
    async def get_model(request: Request, model: ModelName, query: Annotated[VersionModel, Query()]) -> ModelModel:
        return model_model(await find(request, model, query))

    representations = (
        ("/image.png", image_png, "image/png", False, "The image as RGB PNG"),
        (
            "/label.png",
            label_png,
            "image/png",
            False,
            "The label as palette PNG: indices are class ids. Not of keypoint models",
        ),
        (
            "/overlay.png",
            overlay_png,
            "image/png",
            False,
            "For people: image, label or keypoints, legend, score",
        ),
        (
            "/uncertainty.png",
            uncertainty_png,
            "image/png",
            True,
            "For people: image and JS divergence of its pixels",
        ),
        (
            ".npz",
            npz,
            "application/octet-stream",
            True,
            "Image, label or keypoints, JS map and score as a NumPy archive",
        ),
    )
    for suffix, encoder, media_type, js_map, summary in representations:
        app.get(
            "/v1/models/{model}/samples/{seed}" + suffix,
            responses=_bytes(media_type),
            summary=summary,
            response_class=Response,
            name="get" + suffix.replace(".", "_").replace("/", "_"),
        )(rendered(suffix, encoder, media_type, js_map))

    @app.get(
        "/v1/models/{model}/samples/{seed}",
        response_model=SampleModel,
        responses={**documented(*_SAMPLE_ERRORS), **_NOT_MODIFIED, 200: {"headers": _VALIDATORS}},
        summary="The image-label pair of a seed",
    )
    async def get_sample(
        request: Request,
        response: Response,
        model: ModelName,
        seed: Seed,
        query: Annotated[SampleQuery, Query()],
        if_none_match: IfNoneMatch = None,
    ) -> Any:
        found = await find(request, model, query)
        caches = caching(request, found, str(seed), query)
        if caches.held(if_none_match):
            return Response(status_code=304, headers=caches.headers)
        minted = await mint(request, found, seed, query, query.include_js_map)
        if caches.held(if_none_match, exists=True):
            return Response(status_code=304, headers=caches.headers)
        response.headers.update(caches.headers)
        return await asyncio.to_thread(sample_model, minted, query.encoding)

    @app.get(
        "/v1/models/{model}/samples.tar",
        responses=_bytes("application/x-tar"),
        summary="The samples of a walk as a WebDataset shard",
        description=(
            "Members `SEED.image.png`, `SEED.label.npy` (class ids; not of keypoint models) and `SEED.json` of each "
            "accepted sample, in order. `shard_index` and `shard_count` give disjoint archives of `count` samples "
            "each; `next_seed` in the last JSON is where another archive goes on. An archive that breaks off ends the "
            "connection without the end of the body."
        ),
        response_class=Response,
    )
    async def get_tar(
        request: Request, model: ModelName, query: Annotated[TarQuery, Query()], if_none_match: IfNoneMatch = None
    ) -> Response:
        found = await find(request, model, query, sampler.owed_at_first(0, query.count))
        caches = caching(request, found, "tar", query)
        walk, options = Walk(query.start_seed, query.shard_index, query.shard_count), query.to_sample_options()
        mixing_of(found, options)
        gate_of(found, options)
        if caches.held(if_none_match, exists=True):
            return Response(status_code=304, headers=caches.headers)
        if request.method == "HEAD":
            response = Response(media_type="application/x-tar", headers=caches.headers)
            del response.headers["content-length"]  # GET does not know it either
            return response

        samples = sampler.walk(found, walk, options, count=query.count)
        archive = tar.archive(lifecycle.guard(samples, walk.start))
        return Streamed(archive, "application/x-tar", caches.headers)

    @app.post(
        "/v1/models/{model}/samples:batchGet",
        responses=documented(*_BATCH_ERRORS),
        summary="The pairs of several seeds",
    )
    async def batch_get_samples(request: Request, model: ModelName, body: BatchBody) -> BatchModel:
        found = await find(request, model, body, len(body.seeds))
        options = body.to_sample_options(body.include_js_map)
        samples = await sampler.batch(found, body.seeds, options, style_seeds=body.style_seeds)
        return await asyncio.to_thread(batch_model, samples, body)

    app.get(
        ALIVE_PATH, response_class=PlainTextResponse, summary="200 while the gateway answers at all", name="healthz"
    )(_ok)
    app.get(
        READY_PATH,
        response_class=PlainTextResponse,
        responses=documented(503),
        dependencies=[Depends(lifecycle.check_ready)],
        summary="200 while Triton has a model ready and the gateway is not shutting down",
        name="readyz",
    )(_ok)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    add_gallery(app)
    _answer_head(app)
    _describe(app, tokens is not None)
    # From the outermost inwards; FastAPI's own middleware would leave out the answer to an unexpected error.
    guarded: ASGIApp = BodyLimit(app, MAX_BODY_BYTES)
    if tokens is not None:
        guarded = Access(guarded, tokens)
    answering: ASGIApp = CancelOnDisconnect(Measured(guarded, metrics))
    if cors_origins:
        answering = allow_origins(answering, cors_origins)
    return SecurityHeaders(answering, tls, bool(cors_origins))


async def _ok() -> str:
    return "ok\n"


def _bytes(media_type: str) -> dict[int | str, dict[str, Any]]:
    answer = {
        "description": "The bytes.",
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}}},
        "headers": _VALIDATORS,
    }
    return {**documented(*_SAMPLE_ERRORS), **_NOT_MODIFIED, 200: answer}


def _answer_head(app: FastAPI) -> None:
    """HEAD beside every GET. The server leaves out the body; the document says that there is none."""
    for route in list(app.routes):
        if not isinstance(route, APIRoute) or route.methods != {"GET"}:
            continue
        statuses: dict[int | str, dict[str, Any]] = {key: {"description": "As GET."} for key in (200, *route.responses)}
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=["HEAD"],
            response_class=route.response_class,
            response_model=route.response_model,
            dependencies=route.dependencies,
            responses=statuses,
            summary=f"As GET, without the body: {route.summary}",
            include_in_schema=route.include_in_schema,
            name=f"head_{route.name}",
        )


def _describe(app: FastAPI, tokens: bool) -> None:
    """Make the OpenAPI document exact where FastAPI guesses."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    schemas["Problem"] = Problem.model_json_schema()
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                del responses["422"]  # a bad request is a 400 here
            if tokens and path not in OPEN_PATHS:
                responses.update({str(status): answer for status, answer in documented(401, 429).items()})
                operation["security"] = [{"bearer": []}]
            if method == "head":
                for answer in responses.values():
                    answer.pop("content", None)
    if tokens:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
