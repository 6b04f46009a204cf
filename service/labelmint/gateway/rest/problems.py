"""Errors of the REST API: every error is an RFC 9457 problem+json response, whichever part of the stack raised it.

Rules of this file:
- This is the only place where errors become HTTP responses. No code here depends on single classes of
  `labelmint.core.errors`.
- Unknown exceptions become an opaque 500. Their traceback goes only to the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from labelmint.core.errors import InvalidRequest, LabelmintError
from labelmint.core.policy import SEED_END
from labelmint.gateway.rest.messages import Problem

logger = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}

_DESCRIPTIONS = {
    400: "The request is invalid; `metadata.field` names the field.",
    401: "The token is missing or not known.",
    404: "There is no such model, or no such version of it.",
    409: "The model has another revision than the requested one.",
    410: "The model version was unloaded while the request waited.",
    413: "The body is too large.",
    422: "The JS gate rejected the sample, or it does not satisfy `where`.",
    429: "Too many requests are in flight, or a limit of the token is reached; see Retry-After.",
    502: "Triton failed to run the model.",
    503: "Triton is not ready, or the gateway is shutting down.",
    504: "The sample was not ready before the deadline.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of these errors."""
    return {
        status: {"description": _DESCRIPTIONS[status], "content": {PROBLEM_TYPE: {"schema": PROBLEM_SCHEMA}}}
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Register the handlers that turn every error into a problem response."""

    async def answer_http(request: Request, error: Exception) -> Response:
        """Handle Starlette's own errors: no such route, method not allowed."""
        assert isinstance(error, HTTPException)
        titles = {404: "No such path", 405: "Method not allowed"}
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(app, request))
        body = Problem(
            title=titles.get(error.status_code, "HTTP error"),
            status=error.status_code,
            detail=f"{error.detail}; the paths that exist are listed at /docs",
            reason="NO_SUCH_ROUTE",
            metadata={},
        )
        return JSONResponse(body.model_dump(), error.status_code, headers, PROBLEM_TYPE)

    app.add_exception_handler(LabelmintError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)


def problem(error: LabelmintError, headers: Mapping[str, str] | None = None) -> Response:
    body = Problem(
        title=error.title,
        status=error.http_status,
        detail=error.message,
        reason=error.reason,
        metadata=error.metadata,
    )
    return JSONResponse(body.model_dump(), error.http_status, {**error.http_headers, **(headers or {})}, PROBLEM_TYPE)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LabelmintError)
    cache_control = getattr(request.state, "cache_control", None)
    if error.lasting and cache_control is not None:
        return problem(error, {"Cache-Control": cache_control})
    return problem(error)


async def _answer_invalid(_: Request, error: Exception) -> Response:
    """Turn FastAPI's list of validation errors into one InvalidRequest that names the first field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    message = str(first["msg"])
    if first["type"] == "json_invalid":
        field, message = "body", f"is not JSON: {first['ctx']['error']}"
    elif first["type"] == "extra_forbidden":
        message = "unknown parameter; /docs lists the parameters that exist"
    elif field in ("seed", "style_seed"):
        message = f"{first['input']!r} is not a seed; give an integer from 0 to {SEED_END - 1} without leading zeros"
    return problem(InvalidRequest(field, message))


async def _answer_unexpected(_: Request, error: Exception) -> Response:
    logger.error("unexpected error while answering", exc_info=error)
    return problem(LabelmintError("an unexpected error happened; see the gateway's log"))


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Return the methods of all routes that match the path of a request."""
    found: set[str] = set()
    for route in app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found.update(getattr(route, "methods", None) or ())
    return sorted(found)
