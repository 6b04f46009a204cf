"""The routes for the operator: health checks and metrics.

Rules of this file:
- Health checks never need a token. Metrics need one if the gateway requires tokens.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from labelmint.gateway.rest.middleware import ALIVE_PATH, READY_PATH
from labelmint.gateway.rest.problems import documented
from labelmint.gateway.sampling.lifecycle import Lifecycle
from labelmint.gateway.sampling.metrics import Metrics


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
