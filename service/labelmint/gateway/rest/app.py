"""The REST application: its routes and the middleware around them.

Rules of this file:
- This file only assembles. The routes, the middleware and the errors are in `routes`, `middleware` and `problems`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI
from starlette.types import ASGIApp

from labelmint.gateway.rest import middleware, problems, routes
from labelmint.gateway.rest.documented import answer_head, describe
from labelmint.gateway.rest.pages import add_pages
from labelmint.gateway.rest.resources import Resources
from labelmint.gateway.sampling.access import Tokens
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sampler import SamplingCore

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
    app = FastAPI(
        title="labelmint",
        version=version,
        description="Image-label pairs, generated on demand from latent seeds.",
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    resources = Resources(core.sampler, core.metrics, exposure.private)
    routes.add_models(app, resources)
    routes.add_samples(app, resources)
    routes.add_archives(app, resources, core.lifecycle)
    routes.add_seeds(app, resources)
    routes.add_batch(app, resources)
    routes.add_operations(app, core.lifecycle, core.metrics)
    add_pages(app)
    answer_head(app)
    describe(app, exposure.tokens is not None)
    return _surrounded(app, core.metrics, exposure)


def _surrounded(app: ASGIApp, metrics: Metrics, exposure: Exposure) -> ASGIApp:
    """Wrap the application in its middleware, from the innermost outwards.

    FastAPI's own middleware list would not cover the response to an unexpected error.
    """
    layered: ASGIApp = middleware.BodyLimit(app, MAX_BODY_BYTES)
    if exposure.tokens is not None:
        layered = middleware.Access(layered, exposure.tokens)
    layered = middleware.CancelOnDisconnect(middleware.Measured(layered, metrics))
    if exposure.cors_origins:
        layered = middleware.allow_origins(layered, exposure.cors_origins)
    return middleware.SecurityHeaders(layered, exposure.tls, bool(exposure.cors_origins))
