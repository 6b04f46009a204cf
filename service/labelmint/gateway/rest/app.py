"""The REST application: its routes and the middleware around them.

Rules of this file:
- This file only assembles. The routes are in `routes/`, the middleware in `middleware.py`, the errors in `problems.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI
from starlette.types import ASGIApp

from labelmint.gateway.rest import docs, problems
from labelmint.gateway.rest.disconnect import CancelOnDisconnect
from labelmint.gateway.rest.documented import answer_head, describe
from labelmint.gateway.rest.gallery import add_gallery
from labelmint.gateway.rest.middleware import Access, BodyLimit, Measured, SecurityHeaders, allow_origins
from labelmint.gateway.rest.resources import Resources
from labelmint.gateway.rest.routes.archives import add_archives
from labelmint.gateway.rest.routes.models import add_models
from labelmint.gateway.rest.routes.operations import add_operations
from labelmint.gateway.rest.routes.samples import add_batch, add_samples
from labelmint.gateway.sampling.access import Tokens
from labelmint.gateway.sampling.core import SamplingCore
from labelmint.gateway.sampling.metrics import Metrics

MAX_BODY_BYTES = 1 << 20  # a request body holds a few numbers


@dataclass(frozen=True)
class Exposure:
    """Who may use the API, and what the responses tell browsers and caches.

    tokens: the accepted tokens; None: requests need no token.
    tls: whether the connection is encrypted.
    private: whether shared caches must not store responses.
    cors_origins: the origins whose pages may send requests.
    """

    tokens: Tokens | None
    tls: bool
    private: bool
    cors_origins: tuple[str, ...]


def create_app(core: SamplingCore, *, version: str, exposure: Exposure) -> ASGIApp:
    """Return the REST application of a sampling core."""
    app = FastAPI(
        title="labelmint",
        version=version,
        description="Image-label pairs, generated on demand from latent seeds.",
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    docs.install(app)
    resources = Resources(core.sampler, exposure.private)
    add_models(app, resources)
    add_samples(app, resources)
    add_archives(app, resources, core.lifecycle)
    add_batch(app, resources)
    add_operations(app, core.lifecycle, core.metrics)
    add_gallery(app)
    answer_head(app)
    describe(app, exposure.tokens is not None)
    return _surrounded(app, core.metrics, exposure)


def _surrounded(app: ASGIApp, metrics: Metrics, exposure: Exposure) -> ASGIApp:
    """Wrap the application in its middleware, from the innermost outwards.

    FastAPI's own middleware list would not cover the response to an unexpected error.
    """
    layered: ASGIApp = BodyLimit(app, MAX_BODY_BYTES)
    if exposure.tokens is not None:
        layered = Access(layered, exposure.tokens)
    layered = CancelOnDisconnect(Measured(layered, metrics))
    if exposure.cors_origins:
        layered = allow_origins(layered, exposure.cors_origins)
    return SecurityHeaders(layered, exposure.tls, bool(exposure.cors_origins))
