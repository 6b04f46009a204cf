"""The routes: models, samples in several forms, batches, tar archives of samples, lists of seeds, health checks and metrics.

Rules of this file:
- Each form of a sample has its own route. All of them follow the same steps, which `Resources` has.
- HEAD generates the sample, because only the sample's JS score decides whether GET would return it. HEAD of an archive
  checks the request and generates no sample.
- An archive has the same limits as a gRPC stream: the maximum connection age, the gateway's shutdown and the caller's
  rate.
- A request for a model's description counts as demand, because sample requests follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from labelmint.core.policy import Walk, check_has_label, mixing_of, terms_of
from labelmint.gateway.encoding.archives import archive, members, npz
from labelmint.gateway.encoding.people import overlay_png, uncertainty_png
from labelmint.gateway.encoding.pixels import Encoder, image_png, label_png
from labelmint.gateway.rest import messages
from labelmint.gateway.rest.documented import (
    BATCH_ERRORS,
    NOT_MODIFIED,
    SAMPLE_ERRORS,
    SEEDS_ERRORS,
    VALIDATORS,
    documented_bytes,
)
from labelmint.gateway.rest.middleware import ALIVE_PATH, READY_PATH
from labelmint.gateway.rest.problems import documented
from labelmint.gateway.rest.resources import IfNoneMatch, ModelName, Resources, Seed, not_modified
from labelmint.gateway.rest.streamed import Streamed
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import Metrics


@dataclass(frozen=True)
class _Form:
    """A form of a sample as bytes. Its route is the sample's path plus `suffix`."""

    suffix: str
    encoder: Encoder
    media_type: str
    summary: str
    js_map: bool = False  # whether it needs the JS divergence of each pixel
    needs_label: bool = False


_FORMS = (
    _Form("/image.png", image_png, "image/png", "The image as RGB PNG"),
    _Form(
        "/label.png",
        label_png,
        "image/png",
        "The label as palette PNG whose indices are class ids. Only for models with a label image",
        needs_label=True,
    ),
    _Form("/overlay.png", overlay_png, "image/png", "For viewing: image, labels, legend and score"),
    _Form(
        "/uncertainty.png",
        uncertainty_png,
        "image/png",
        "For viewing: image and JS divergence of its pixels",
        js_map=True,
    ),
    _Form(
        ".npz",
        npz,
        "application/octet-stream",
        "Image, labels, JS map and score as a NumPy archive",
        js_map=True,
    ),
)
_TAR = "application/x-tar"


def add_models(app: FastAPI, resources: Resources) -> None:
    @app.get("/v1/models", responses=documented(503), summary="List the served models")
    async def list_models() -> messages.ModelsModel:
        return messages.ModelsModel(
            models=[messages.model_model(model) for model in await resources.sampler.catalog.list()]
        )

    @app.get(
        "/v1/models/{model}",
        responses=documented(400, 404, 503),
        summary="Describe a model: task, digest, label names, palette, calibration",
    )
    async def get_model(
        request: Request, model: ModelName, query: Annotated[messages.VersionModel, Query()]
    ) -> messages.ModelModel:
        return messages.model_model(await resources.find(request, model, query))


def add_samples(app: FastAPI, resources: Resources) -> None:
    for form in _FORMS:
        app.get(
            "/v1/models/{model}/samples/{seed}" + form.suffix,
            responses=documented_bytes(form.media_type),
            summary=form.summary,
            response_class=Response,
            name="get" + form.suffix.replace(".", "_").replace("/", "_"),
        )(_endpoint(resources, form))

    @app.get(
        "/v1/models/{model}/samples/{seed}",
        response_model=messages.SampleModel,
        response_model_exclude_unset=True,
        responses={**documented(*SAMPLE_ERRORS), **NOT_MODIFIED, 200: {"headers": VALIDATORS}},
        summary="The image-label pair of one seed",
    )
    async def get_sample(
        request: Request,
        response: Response,
        model: ModelName,
        seed: Seed,
        query: Annotated[messages.SampleQuery, Query()],
        if_none_match: IfNoneMatch = None,
    ) -> Any:
        found = await resources.find(request, model, query)
        caching = resources.caching(request, found, str(seed), query=query)
        sample = await resources.sample(
            found, seed, query, js_map=query.include_js_map, caching=caching, held=if_none_match
        )
        if sample is None:
            return not_modified(caching)
        response.headers.update(caching.headers)
        return await resources.encoded(found, messages.sample_model, sample, query.encoding)


def _endpoint(resources: Resources, form: _Form) -> Callable[..., Any]:
    async def endpoint(
        request: Request,
        model: ModelName,
        seed: Seed,
        query: Annotated[messages.PinnedQuery, Query()],
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        found = await resources.find(request, model, query)
        if form.needs_label:
            check_has_label(found, "model", "request the sample's JSON, overlay.png or .npz")
        caching = resources.caching(request, found, f"{seed}{form.suffix}", query=query)
        sample = await resources.sample(found, seed, query, js_map=form.js_map, caching=caching, held=if_none_match)
        if sample is None:
            return not_modified(caching)
        body = await resources.encoded(found, form.encoder, sample)
        return Response(body, media_type=form.media_type, headers=caching.headers)

    return endpoint


def add_archives(app: FastAPI, resources: Resources, lifecycle: Lifecycle) -> None:
    @app.get(
        "/v1/models/{model}/samples.tar",
        responses=documented_bytes(_TAR),
        summary="The samples of a walk as a WebDataset shard",
        description=(
            "The members of each accepted sample that satisfies `where`, in order: `SEED.image.png`, `SEED.label.npy` "
            "(class ids; only for models with a label image) and `SEED.json`. `shard_index` and `shard_count` select "
            "disjoint archives of `count` samples each. To continue with another archive, start at `next_seed` of the "
            "last JSON. If the archive fails midway, the connection closes without the end of the body."
        ),
        response_class=Response,
    )
    async def get_tar(
        request: Request,
        model: ModelName,
        query: Annotated[messages.TarQuery, Query()],
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        owed = resources.sampler.owed_at_first(0, query.count)
        found = await resources.find(request, model, query, owed=owed)
        caching = resources.caching(request, found, "tar", query=query)
        walk, options = Walk(query.start_seed, query.shard_index, query.shard_count), query.to_sample_options()
        mixing_of(found, options)
        terms_of(found, options)
        if caching.held(if_none_match, exists=True):
            return not_modified(caching)
        if request.method == "HEAD":
            response = Response(media_type=_TAR, headers=caching.headers)
            del response.headers["content-length"]  # GET does not know it either
            return response
        samples = resources.sampler.walk(found, walk, options, count=query.count)
        encode = partial(resources.encoded, found, members)
        return Streamed(archive(lifecycle.guard(samples, walk.start), encode), _TAR, caching.headers)


def add_seeds(app: FastAPI, resources: Resources) -> None:
    @app.get(
        "/v1/models/{model}/seeds",
        response_model=messages.SeedPageModel,
        responses={**documented(*SEEDS_ERRORS), **NOT_MODIFIED, 200: {"headers": VALIDATORS}},
        summary="Which seeds of a range a walk delivers, from the index of the gateway",
        description=(
            "One bit for each seed, for a page of the range; to read the next page, send the request again with "
            "`start_seed` = `next_seed`. Only with an index of these samples (`labelmint serve --index`). Options that "
            "only change the form of samples are checked and have no effect."
        ),
    )
    async def list_seeds(
        request: Request,
        response: Response,
        model: ModelName,
        query: Annotated[messages.SeedsQuery, Query()],
        if_none_match: IfNoneMatch = None,
    ) -> Any:
        found = await resources.find(request, model, query)
        seeds, options = (query.start_seed, query.end_seed), query.to_sample_options()
        page = await resources.sampler.list_seeds(found, seeds, options, page_size=query.page_size)
        caching = resources.caching(request, found, f"seeds to {page.end}", query=query)
        if not query.end_seed:
            caching = caching.revalidated()
        if caching.held(if_none_match, exists=True):
            return not_modified(caching)
        response.headers.update(caching.headers)
        return messages.seed_page_model(page)


def add_batch(app: FastAPI, resources: Resources) -> None:
    @app.post(
        "/v1/models/{model}/samples:batchGet",
        response_model_exclude_unset=True,
        responses=documented(*BATCH_ERRORS),
        summary="The image-label pairs of several seeds",
    )
    async def batch_get_samples(request: Request, model: ModelName, body: messages.BatchBody) -> messages.BatchModel:
        found = await resources.find(request, model, body, owed=len(body.seeds))
        options = body.to_sample_options(body.include_js_map)
        samples = await resources.sampler.batch(found, body.seeds, options, style_seeds=body.style_seeds)
        return await resources.encoded(found, messages.batch_model, samples, body)


def add_operations(app: FastAPI, lifecycle: Lifecycle, metrics: Metrics) -> None:
    app.get(
        ALIVE_PATH, summary="200 while the gateway answers requests", name="healthz", response_class=PlainTextResponse
    )(_ok)
    app.get(
        READY_PATH,
        responses=documented(503),
        dependencies=[Depends(lifecycle.check_ready)],
        summary="200 while Triton has a model ready and the gateway is not shutting down",
        name="readyz",
        response_class=PlainTextResponse,
    )(_ok)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _ok() -> str:
    return "ok\n"
