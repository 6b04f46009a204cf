"""The routes that describe models.

Rules of this file:
- These routes generate no samples. A request for a description still counts as demand, because sample requests follow.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Request

from labelmint.gateway.rest.messages import ModelModel, ModelsModel, VersionModel, model_model
from labelmint.gateway.rest.problems import documented
from labelmint.gateway.rest.resources import ModelName, Resources


def add_models(app: FastAPI, resources: Resources) -> None:
    @app.get("/v1/models", responses=documented(503), summary="List the served models")
    async def list_models() -> ModelsModel:
        return ModelsModel(models=[model_model(model) for model in await resources.sampler.catalog.list()])

    @app.get(
        "/v1/models/{model}",
        responses=documented(400, 404, 503),
        summary="Describe a model: task, digest, classes or keypoints, palette, calibration",
    )
    async def get_model(request: Request, model: ModelName, query: Annotated[VersionModel, Query()]) -> ModelModel:
        return model_model(await resources.find(request, model, query))
