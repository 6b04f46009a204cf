"""The routes of samples: the sample of one seed in several forms, and a batch of samples as JSON.

Rules of this file:
- Each form of a sample has its own route. All of them follow the same steps, in `Resources.answer`.
- HEAD generates the sample, because only the sample's JS score decides whether GET would return it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from labelmint.core.policy import check_has_label
from labelmint.gateway.encoding.npz import npz
from labelmint.gateway.encoding.people import overlay_png, uncertainty_png
from labelmint.gateway.encoding.pixels import Encoder, image_png, label_png
from labelmint.gateway.rest.caching import Caching
from labelmint.gateway.rest.documented import (
    BATCH_ERRORS,
    NOT_MODIFIED,
    SAMPLE_ERRORS,
    VALIDATORS,
    documented_bytes,
)
from labelmint.gateway.rest.messages import (
    BatchBody,
    BatchModel,
    PinnedQuery,
    SampleModel,
    SampleQuery,
    batch_model,
    sample_model,
)
from labelmint.gateway.rest.problems import documented
from labelmint.gateway.rest.resources import IfNoneMatch, ModelName, Resources, Seed
from labelmint.gateway.sampling.sample import Sample


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
        "The label as palette PNG whose indices are class ids. Not for keypoint models",
        needs_label=True,
    ),
    _Form("/overlay.png", overlay_png, "image/png", "For viewing: image, label or keypoints, legend and score"),
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
        "Image, label or keypoints, JS map and score as a NumPy archive",
        js_map=True,
    ),
)


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
        response_model=SampleModel,
        responses={**documented(*SAMPLE_ERRORS), **NOT_MODIFIED, 200: {"headers": VALIDATORS}},
        summary="The image-label pair of one seed",
    )
    async def get_sample(
        request: Request,
        response: Response,
        model: ModelName,
        seed: Seed,
        query: Annotated[SampleQuery, Query()],
        if_none_match: IfNoneMatch = None,
    ) -> Any:
        async def encode(sample: Sample, caching: Caching) -> SampleModel:
            response.headers.update(caching.headers)
            return await asyncio.to_thread(sample_model, sample, query.encoding)

        return await resources.answer(
            request,
            await resources.find(request, model, query),
            seed,
            query=query,
            representation=str(seed),
            js_map=query.include_js_map,
            if_none_match=if_none_match,
            encode=encode,
        )


def add_batch(app: FastAPI, resources: Resources) -> None:
    @app.post(
        "/v1/models/{model}/samples:batchGet",
        responses=documented(*BATCH_ERRORS),
        summary="The image-label pairs of several seeds",
    )
    async def batch_get_samples(request: Request, model: ModelName, body: BatchBody) -> BatchModel:
        found = await resources.find(request, model, body, owed=len(body.seeds))
        options = body.to_sample_options(body.include_js_map)
        samples = await resources.sampler.batch(found, body.seeds, options, style_seeds=body.style_seeds)
        return await asyncio.to_thread(batch_model, samples, body)


def _endpoint(resources: Resources, form: _Form) -> Callable[..., Any]:
    async def endpoint(
        request: Request,
        model: ModelName,
        seed: Seed,
        query: Annotated[PinnedQuery, Query()],
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        async def encode(sample: Sample, caching: Caching) -> Response:
            body = await asyncio.to_thread(form.encoder, sample)
            return Response(body, media_type=form.media_type, headers=caching.headers)

        found = await resources.find(request, model, query)
        if form.needs_label:
            check_has_label(found, "model", "request the sample's JSON, overlay.png or .npz")
        answer: Response = await resources.answer(
            request,
            found,
            seed,
            query=query,
            representation=f"{seed}{form.suffix}",
            js_map=form.js_map,
            if_none_match=if_none_match,
            encode=encode,
        )
        return answer

    return endpoint
