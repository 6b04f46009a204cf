"""What the OpenAPI document says of answers, and the mending of what FastAPI guesses.

Rules of this file:
- The document at /docs is what the routes really take and answer; schemathesis holds it to that.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from labelmint.gateway.rest.messages import Problem
from labelmint.gateway.rest.middleware import OPEN_PATHS
from labelmint.gateway.rest.problems import documented

NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "If-None-Match names what the client holds already."}
}
VALIDATORS = {
    "ETag": {"description": "Strong; known before anything is minted.", "schema": {"type": "string"}},
    "Cache-Control": {"description": "Immutable where `revision` is given.", "schema": {"type": "string"}},
}
SAMPLE_ERRORS = (400, 404, 409, 410, 422, 429, 502, 503, 504)
BATCH_ERRORS = (400, 404, 410, 413, 429, 502, 503, 504)


def documented_bytes(media_type: str) -> dict[int | str, dict[str, Any]]:
    """The answers of a route whose body is of that media type."""
    answer = {
        "description": "The bytes.",
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}}},
        "headers": VALIDATORS,
    }
    return {**documented(*SAMPLE_ERRORS), **NOT_MODIFIED, 200: answer}


def answer_head(app: FastAPI) -> None:
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


def describe(app: FastAPI, tokens: bool) -> None:
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
