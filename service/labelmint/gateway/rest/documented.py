"""Responses in the OpenAPI document, and corrections where FastAPI guesses wrong.

Rules of this file:
- The OpenAPI document describes exactly what the routes accept and return. Schemathesis tests this.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from labelmint.gateway.rest.messages import Problem
from labelmint.gateway.rest.middleware import OPEN_PATHS
from labelmint.gateway.rest.problems import documented

NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client already has this response: If-None-Match names its ETag."}
}
VALIDATORS = {
    "ETag": {"description": "Strong; known before the sample is generated.", "schema": {"type": "string"}},
    "Cache-Control": {"description": "Immutable if `revision` is given.", "schema": {"type": "string"}},
}
SAMPLE_ERRORS = (400, 404, 409, 410, 422, 429, 502, 503, 504)
SEEDS_ERRORS = (400, 404, 409, 410, 422, 429, 503, 504)
BATCH_ERRORS = (400, 404, 410, 413, 429, 502, 503, 504)


def documented_bytes(media_type: str) -> dict[int | str, dict[str, Any]]:
    """Document the responses of a route whose body has this media type."""
    answer = {
        "description": "The bytes.",
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}}},
        "headers": VALIDATORS,
    }
    return {**documented(*SAMPLE_ERRORS), **NOT_MODIFIED, 200: answer}


def answer_head(app: FastAPI) -> None:
    """Add a HEAD route for every GET route. The server omits the body, and the OpenAPI document says so."""
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
            response_model_exclude_unset=route.response_model_exclude_unset,
            dependencies=route.dependencies,
            responses=statuses,
            summary=f"As GET, without the body: {route.summary}",
            include_in_schema=route.include_in_schema,
            name=f"head_{route.name}",
        )


def describe(app: FastAPI, tokens: bool) -> None:
    """Correct the OpenAPI document where FastAPI guesses wrong."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    schemas["Problem"] = Problem.model_json_schema()
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                del responses["422"]  # this API answers an invalid request with 400
            if tokens and path not in OPEN_PATHS:
                responses.update({str(status): answer for status, answer in documented(401, 429).items()})
                operation["security"] = [{"bearer": []}]
            if method == "head":
                for answer in responses.values():
                    answer.pop("content", None)
    if tokens:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
